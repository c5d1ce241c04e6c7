// The C interface: handles around the C++ client, and nothing more.

#include "client/c/syncbn.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "client/c/kept_log.h"
#include "client/cc/batch_norm_pass.h"
#include "client/cc/device_runtime.h"
#include "client/cc/errors.h"
#include "client/cc/worker.h"
#include "kernels/cpu/batch_norm.h"
#include "plumbing/certificate.h"
#include "plumbing/log.h"
#include "plumbing/shared_file.h"
#include "server/http/http_server.h"
#include "server/master_server.h"
#include "vocabulary/revision.h"
#include "vocabulary/version.h"

struct syncbn_error {
  absl::Status status;
  syncbn::ErrorDetails details;
  std::string message;
};

struct syncbn_master {
  std::unique_ptr<syncbn::MasterServer> server;
  std::string target;
  std::unique_ptr<syncbn::http::HttpServer> http;  // Ends before the server.
  std::string http_address;
};

// Passes keep the worker that they belong to, so that one that outlives its handle fails instead of crashing.
struct syncbn_worker {
  std::shared_ptr<syncbn::Worker> worker;

  ~syncbn_worker() { worker->Close(); }
};

struct syncbn_round {
  syncbn::Round round;
};

struct syncbn_rounds {
  std::vector<syncbn::RoundKey> keys;
};

struct syncbn_forward {
  std::shared_ptr<syncbn::Worker> worker;
  syncbn::ForwardPass pass;
};

struct syncbn_backward {
  std::shared_ptr<syncbn::Worker> worker;
  syncbn::BackwardPass pass;
};

namespace {

using syncbn::TensorView;
using syncbn::VectorView;

syncbn_code Report(const absl::Status& status, syncbn_error** error) {
  if (status.ok()) return 0;
  if (syncbn::IsPending(status)) return SYNCBN_PENDING;
  if (error != nullptr) *error = new syncbn_error{status, syncbn::DetailsOf(status), std::string(status.message())};
  return static_cast<syncbn_code>(status.code());
}

syncbn_code ReportRounds(absl::StatusOr<std::vector<syncbn::RoundKey>> keys, syncbn_rounds** out,
                         syncbn_error** error) {
  if (!keys.ok()) return Report(keys.status(), error);
  *out = new syncbn_rounds{*std::move(keys)};
  return 0;
}

absl::Status Missing(const char* what) { return absl::InvalidArgumentError(absl::StrCat(what, " is NULL")); }

// Options as this library knows them, from a caller that may be older (shorter struct) or newer (longer).
template <typename Options>
absl::Status ReadOptions(const Options* given, Options* options) {
  std::memset(options, 0, sizeof(*options));
  if (given == nullptr) return absl::OkStatus();
  if (given->struct_size < sizeof(size_t)) {
    return absl::InvalidArgumentError(
        absl::StrCat("struct_size is ", given->struct_size, "; set it to the size of the struct"));
  }
  constexpr size_t kMostBytes = 4096;  // More is no later version's struct, but a size that was never set.
  if (given->struct_size > kMostBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("struct_size is ", given->struct_size, "; set it to the size of the struct"));
  }
  const char* const bytes = reinterpret_cast<const char*>(given);
  for (size_t i = sizeof(*options); i < given->struct_size; ++i) {
    if (bytes[i] != 0)
      return absl::UnimplementedError("an option is set that this version of the library does not know");
  }
  std::memcpy(options, given, std::min(given->struct_size, sizeof(*options)));
  return absl::OkStatus();
}

absl::StatusOr<std::string> FindTarget(syncbn_target_function find, void* user) {
  constexpr size_t kMostBytes = 4096;
  std::string text(kMostBytes, '\0');
  if (const syncbn_code code = find(text.data(), text.size(), user); code != 0) {
    return absl::Status(static_cast<absl::StatusCode>(code), absl::StrCat("find_target has failed with code ", code));
  }
  text.resize(strnlen(text.data(), text.size()));
  return text;
}

std::string Text(const char* text) { return text == nullptr ? std::string() : std::string(text); }

absl::Duration Timeout(int64_t nanoseconds) {
  return nanoseconds < 0 ? absl::InfiniteDuration() : absl::Nanoseconds(nanoseconds);
}

template <typename Enum>
absl::Status ReadEnum(int32_t value, int32_t first, int32_t last, Enum fallback, const char* name, Enum* out) {
  if (value == 0 && first > 0) {
    *out = fallback;
    return absl::OkStatus();
  }
  if (value < first || value > last) {
    return absl::InvalidArgumentError(absl::StrCat(name, " is ", value, "; it is ", first, " to ", last));
  }
  *out = static_cast<Enum>(value);
  return absl::OkStatus();
}

absl::Status ReadRole(int32_t value, syncbn::BackwardRole* role) {
  return ReadEnum(value, SYNCBN_BACKWARD_REQUIRED, SYNCBN_BACKWARD_NONE, syncbn::BackwardRole::kRequired,
                  "backward_role", role);
}

absl::Status ReadTensor(const syncbn_tensor* given, const char* name, TensorView* tensor) {
  if (given == nullptr) return Missing(name);
  tensor->data = given->data;
  tensor->shape.batch = given->batch;
  tensor->shape.channels = given->channels;
  tensor->shape.spatial = given->spatial;
  tensor->device_index = given->device_index;
  using kernels_type = syncbn::kernels::DataType;
  using kernels_layout = syncbn::kernels::Layout;
  if (absl::Status status = ReadEnum(given->type, SYNCBN_FLOAT32, SYNCBN_BFLOAT16, kernels_type::kFloat32,
                                     "a tensor's type", &tensor->shape.type);
      !status.ok()) {
    return status;
  }
  if (absl::Status status = ReadEnum(given->layout, SYNCBN_CHANNELS_FIRST, SYNCBN_CHANNELS_LAST,
                                     kernels_layout::kChannelsFirst, "a tensor's layout", &tensor->shape.layout);
      !status.ok()) {
    return status;
  }
  return ReadEnum(given->device, SYNCBN_DEVICE_CPU, SYNCBN_DEVICE_CUDA, syncbn::Device::kCpu, "a tensor's device",
                  &tensor->device);
}

absl::Status ReadVector(const syncbn_vector& given, const char* name, VectorView* vector) {
  vector->data = given.data;
  return ReadEnum(given.type, SYNCBN_FLOAT32, SYNCBN_BFLOAT16, syncbn::kernels::DataType::kFloat32, name,
                  &vector->type);
}

// The first that is not OK.
absl::Status First(std::initializer_list<absl::Status> statuses) {
  for (const absl::Status& status : statuses) {
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status ReadPassOptions(const syncbn_pass_options* given, syncbn::PassOptions* pass) {
  syncbn_pass_options options;
  if (absl::Status status = ReadOptions(given, &options); !status.ok()) return status;
  if (options.num_threads != 0) pass->num_threads = options.num_threads;
  pass->stream = options.stream;
  if (options.has_sequence != 0) pass->sequence = options.sequence;
  pass->stream_ordered = options.stream_ordered != 0;
  pass->again = options.again != 0;
  return ReadRole(options.backward_role, &pass->backward_role);
}

absl::Status ReadBackwardInputs(const syncbn_backward_inputs* given, syncbn::BackwardInputs* inputs) {
  if (given == nullptr) return Missing("inputs");
  syncbn_backward_inputs known;
  if (absl::Status status = ReadOptions(given, &known); !status.ok()) return status;
  inputs->x = known.x;
  inputs->relu = known.relu != 0;
  inputs->relu_mask = known.relu_mask;
  return First({ReadTensor(&known.dy, "dy", &inputs->dy), ReadVector(known.weight, "weight's type", &inputs->weight),
                ReadVector(known.bias, "bias's type", &inputs->bias)});
}

absl::Status ReadBackwardOutputs(const syncbn_backward_outputs* given, syncbn::BackwardOutputs* outputs) {
  if (given == nullptr) return Missing("outputs");
  syncbn_backward_outputs known;
  if (absl::Status status = ReadOptions(given, &known); !status.ok()) return status;
  outputs->dx = known.dx;
  outputs->d_residual = known.d_residual;
  return First({ReadVector(known.d_weight, "d_weight's type", &outputs->d_weight),
                ReadVector(known.d_bias, "d_bias's type", &outputs->d_bias)});
}

absl::Status ReadForwardOutputs(const syncbn_forward_outputs* given, syncbn::ForwardArguments* outputs) {
  if (given == nullptr) return Missing("outputs");
  syncbn_forward_outputs known;
  if (absl::Status status = ReadOptions(given, &known); !status.ok()) return status;
  outputs->momentum = known.momentum;
  outputs->batches = known.batches;
  outputs->cumulative = known.cumulative != 0;
  outputs->residual = known.residual;
  outputs->relu = known.relu != 0;
  outputs->relu_mask = known.relu_mask;
  return First({ReadVector(known.weight, "weight's type", &outputs->weight),
                ReadVector(known.bias, "bias's type", &outputs->bias),
                ReadVector(known.running_mean, "running_mean's type", &outputs->running_mean),
                ReadVector(known.running_var, "running_var's type", &outputs->running_var),
                ReadTensor(&known.y, "y", &outputs->y)});
}

absl::Status ReadEvaluateOptions(const syncbn_evaluate_options* given, syncbn::EvaluateArguments* options) {
  if (given == nullptr) return Missing("options");
  syncbn_evaluate_options known;
  if (absl::Status status = ReadOptions(given, &known); !status.ok()) return status;
  if (known.num_threads != 0) options->num_threads = known.num_threads;
  options->stream = known.stream;
  options->eps = known.eps;
  options->residual = known.residual;
  options->relu = known.relu != 0;
  options->relu_mask = known.relu_mask;
  return First({ReadVector(known.mean, "mean's type", &options->mean),
                ReadVector(known.var, "var's type", &options->var),
                ReadVector(known.weight, "weight's type", &options->weight),
                ReadVector(known.bias, "bias's type", &options->bias)});
}

// A pass of the parent's is left as it is: its device memory and its locks are the parent's.
template <typename Pass>
void Delete(Pass* pass) {
  if (pass != nullptr && pass->worker->CheckProcess().ok()) delete pass;
}

syncbn_code ReturnRound(absl::StatusOr<syncbn::Round> round, syncbn_round** out, syncbn_error** error) {
  if (!round.ok()) return Report(round.status(), error);
  *out = new syncbn_round{*std::move(round)};
  return 0;
}

absl::Span<const double> View(const double* values, size_t size) {
  return {values, values == nullptr ? size_t{0} : size};
}

// Zeros before a successful wait.
const syncbn::BatchStatistics& Known(const syncbn_forward* forward) {
  static const auto* const unknown = new syncbn::BatchStatistics();
  return forward->pass.statistics() == nullptr ? *unknown : *forward->pass.statistics();
}

size_t Ranks(const std::vector<uint32_t>& from, const uint32_t** ranks) {
  if (ranks != nullptr) *ranks = from.data();
  return from.size();
}

}  // namespace

// ---- Versions and errors --------------------------------------------------------------------------------------------

uint32_t syncbn_api_version(void) { return (SYNCBN_API_VERSION_MAJOR << 16) | SYNCBN_API_VERSION_MINOR; }

const char* syncbn_version(void) { return syncbn::kVersion; }

const char* syncbn_build_info(void) {
  static const std::string* const info = [] {
    const syncbn::DeviceRuntime* const cuda = syncbn::CudaRuntime();
    return new std::string(absl::StrCat("cpu=", syncbn::kernels::cpu::InstructionSet(),
                                        " cuda=", cuda == nullptr ? "no" : cuda->Version(),
                                        *syncbn::kRevision == '\0' ? "" : " commit=", syncbn::kRevision));
  }();
  return info->c_str();
}

void syncbn_error_destroy(syncbn_error* error) { delete error; }
syncbn_code syncbn_error_code(const syncbn_error* error) { return static_cast<syncbn_code>(error->status.code()); }
const char* syncbn_error_reason(const syncbn_error* error) { return error->details.reason.c_str(); }
const char* syncbn_error_message(const syncbn_error* error) { return error->message.c_str(); }
const char* syncbn_error_layer(const syncbn_error* error) { return error->details.layer.c_str(); }
size_t syncbn_error_ranks(const syncbn_error* error, const uint32_t** ranks) {
  return Ranks(error->details.ranks, ranks);
}

// ---- The log --------------------------------------------------------------------------------------------------------

void syncbn_set_log(syncbn_log_function function, void* user) {
  if (function == nullptr) return syncbn::SetLogSink(nullptr);
  syncbn::SetLogSink([function, user](syncbn::LogLevel level, absl::string_view line) {
    function(static_cast<int32_t>(level), std::string(line).c_str(), user);
  });
}

void syncbn_log_keep(int32_t level, const char* message, void*) {
  syncbn::KeepLogLine(static_cast<syncbn::LogLevel>(level), message);
}

int32_t syncbn_log_take(char* message, size_t size) {
  if (message == nullptr || size == 0) return syncbn::HasLogLine() ? 1 : 0;
  const std::optional<syncbn::LogLine> line = syncbn::TakeLogLine();
  if (!line.has_value()) return 0;
  message[line->text.copy(message, size - 1)] = '\0';
  return static_cast<int32_t>(line->level);
}

// ---- The master -----------------------------------------------------------------------------------------------------

syncbn_code syncbn_master_start(const syncbn_master_options* given, syncbn_master** out, syncbn_error** error) {
  if (out == nullptr) return Report(Missing("out"), error);
  syncbn_master_options options;
  if (absl::Status status = ReadOptions(given, &options); !status.ok()) return Report(status, error);
  syncbn::MasterServer::Options server;
  server.addresses = {options.address == nullptr ? "127.0.0.1:0" : options.address};
  server.insecure = options.insecure != 0;
  server.tls.cert_file = Text(options.cert_file);
  server.tls.key_file = Text(options.key_file);
  server.tls.trusted_ca_file = Text(options.trusted_ca_file);
  server.tls.client_cert_auth = options.client_cert_auth != 0;
  server.token = Text(options.token);
  server.revision = syncbn::kRevision;
  server.state_dir = Text(options.state_dir);
  const auto memory = syncbn::SharedMemoryOptions::FromEnvironment(server.shared_memory);
  if (!memory.ok()) return Report(memory.status(), error);
  server.shared_memory = memory->sharing;
  server.shared_memory_dir = memory->directory;
  auto started = syncbn::MasterServer::Start(std::move(server));
  if (!started.ok()) return Report(started.status(), error);
  std::string target = (*started)->target();
  *out = new syncbn_master{*std::move(started), std::move(target), nullptr, ""};
  return 0;
}

const char* syncbn_master_target(const syncbn_master* master) { return master->target.c_str(); }

syncbn_code syncbn_master_serve_http(syncbn_master* master, const char* address, const char* token,
                                     syncbn_error** error) {
  if (master == nullptr) return Report(Missing("master"), error);
  if (address == nullptr) return Report(Missing("address"), error);
  if (master->http != nullptr) {
    return Report(
        absl::FailedPreconditionError(absl::StrCat("the master serves HTTP on \"", master->http_address, "\" already")),
        error);
  }
  syncbn::http::HttpOptions options;
  options.address = address;
  options.token = Text(token);
  auto http = syncbn::http::HttpServer::Start(options, master->server->InProcessChannel());
  if (!http.ok()) return Report(http.status(), error);
  master->http = *std::move(http);
  master->http_address = master->http->address();
  return 0;
}

const char* syncbn_master_http_address(const syncbn_master* master) { return master->http_address.c_str(); }

size_t syncbn_master_workers(const syncbn_master* master) { return master->server->workers(); }

void syncbn_master_shutdown(syncbn_master* master, int64_t grace_ns) {
  master->server->Shutdown(grace_ns < 0 ? absl::InfiniteDuration() : absl::Nanoseconds(grace_ns));
}

void syncbn_master_destroy(syncbn_master* master) { delete master; }

syncbn_code syncbn_make_certificate(const char* host, const char* cert_file, const char* key_file,
                                    syncbn_error** error) {
  return Report(syncbn::MakeSelfSignedCertificate(Text(host), Text(cert_file), Text(key_file)), error);
}

// ---- The worker -----------------------------------------------------------------------------------------------------

syncbn_code syncbn_worker_join(const syncbn_worker_options* given, syncbn_worker** out, syncbn_error** error) {
  if (out == nullptr) return Report(Missing("out"), error);
  syncbn_worker_options known;
  if (absl::Status status = ReadOptions(given, &known); !status.ok()) return Report(status, error);
  syncbn::Worker::Options options;
  options.target = Text(known.target);
  if (known.find_target != nullptr) {
    options.find_target = [find = known.find_target, user = known.find_target_user] { return FindTarget(find, user); };
  }
  options.job = Text(known.job);
  options.group = Text(known.group);
  options.rank = known.rank;
  options.world_size = known.world_size;
  options.generation = known.generation;
  if (known.round_timeout_ns != 0) options.round_timeout = absl::Nanoseconds(known.round_timeout_ns);
  if (known.join_timeout_ns != 0) options.join_timeout = absl::Nanoseconds(known.join_timeout_ns);
  if (known.rejoin_grace_ns != 0) {
    options.rejoin_grace = absl::Nanoseconds(std::max<int64_t>(known.rejoin_grace_ns, 0));
  }
  options.min_workers = known.min_workers;
  options.description = Text(known.description);
  options.tls.trusted_ca_file = Text(known.trusted_ca_file);
  options.tls.cert_file = Text(known.cert_file);
  options.tls.key_file = Text(known.key_file);
  options.token = Text(known.token);
  if (absl::Status status = ReadEnum(known.missing_policy, SYNCBN_MISSING_FAIL, SYNCBN_MISSING_WAIT,
                                     syncbn::MissingPolicy::kFail, "missing_policy", &options.missing_policy);
      !status.ok()) {
    return Report(status, error);
  }
  auto worker = syncbn::Worker::Join(std::move(options));
  if (!worker.ok()) return Report(worker.status(), error);
  *out = new syncbn_worker{*std::move(worker)};
  return 0;
}

syncbn_code syncbn_worker_leave(syncbn_worker* worker, const char* reason, syncbn_error** error) {
  if (worker == nullptr) return Report(Missing("worker"), error);
  return Report(worker->worker->Leave(Text(reason)), error);
}

void syncbn_worker_close(syncbn_worker* worker) { worker->worker->Close(); }
void syncbn_worker_destroy(syncbn_worker* worker) { delete worker; }
uint32_t syncbn_worker_rank(const syncbn_worker* worker) { return worker->worker->rank(); }
uint32_t syncbn_worker_world_size(const syncbn_worker* worker) { return worker->worker->world_size(); }
uint64_t syncbn_worker_incarnation(const syncbn_worker* worker) { return worker->worker->incarnation(); }
uint64_t syncbn_worker_run_id(const syncbn_worker* worker) { return worker->worker->run_id(); }
int32_t syncbn_worker_shares_memory(const syncbn_worker* worker) { return worker->worker->shares_memory() ? 1 : 0; }

syncbn_code syncbn_worker_wait_for_members(syncbn_worker* worker, int64_t timeout_ns, syncbn_error** error) {
  if (worker == nullptr) return Report(Missing("worker"), error);
  return Report(worker->worker->WaitForMembers(Timeout(timeout_ns)), error);
}

syncbn_code syncbn_worker_resume_at(syncbn_worker* worker, uint64_t sequence, syncbn_error** error) {
  if (worker == nullptr) return Report(Missing("worker"), error);
  return Report(worker->worker->ResumeAt(sequence), error);
}

syncbn_code syncbn_worker_resume_layer_at(syncbn_worker* worker, const char* layer, int32_t phase, uint64_t sequence,
                                          syncbn_error** error) {
  if (worker == nullptr) return Report(Missing("worker"), error);
  if (phase < SYNCBN_PHASE_FORWARD || phase > SYNCBN_PHASE_SUM) {
    return Report(absl::InvalidArgumentError(absl::StrCat("phase is ", phase, ", not within 1 and 3")), error);
  }
  return Report(worker->worker->ResumeLayerAt({Text(layer), sequence, static_cast<syncbn::Phase>(phase)}), error);
}

syncbn_code syncbn_worker_next_rounds(const syncbn_worker* worker, syncbn_rounds** out, syncbn_error** error) {
  if (worker == nullptr || out == nullptr) return Report(Missing(worker == nullptr ? "worker" : "out"), error);
  return ReportRounds(worker->worker->NextRounds(), out, error);
}

syncbn_code syncbn_worker_newest_rounds(const syncbn_worker* worker, syncbn_rounds** out, syncbn_error** error) {
  if (worker == nullptr || out == nullptr) return Report(Missing(worker == nullptr ? "worker" : "out"), error);
  return ReportRounds(worker->worker->NewestRounds(), out, error);
}

size_t syncbn_rounds_size(const syncbn_rounds* rounds) { return rounds->keys.size(); }
const char* syncbn_rounds_layer(const syncbn_rounds* rounds, size_t index) { return rounds->keys[index].layer.c_str(); }
int32_t syncbn_rounds_phase(const syncbn_rounds* rounds, size_t index) {
  return static_cast<int32_t>(rounds->keys[index].phase);
}
uint64_t syncbn_rounds_sequence(const syncbn_rounds* rounds, size_t index) { return rounds->keys[index].sequence; }
void syncbn_rounds_destroy(syncbn_rounds* rounds) { delete rounds; }

void syncbn_worker_interrupt(syncbn_worker* worker) { worker->worker->Interrupt(); }

syncbn_code syncbn_worker_settle(syncbn_worker* worker, int64_t timeout_ns, syncbn_error** error) {
  if (worker == nullptr) return Report(Missing("worker"), error);
  return Report(worker->worker->Settle(Timeout(timeout_ns)), error);
}

syncbn_code syncbn_worker_declare_layer(syncbn_worker* worker, const syncbn_layer_options* given,
                                        syncbn_error** error) {
  if (worker == nullptr) return Report(Missing("worker"), error);
  syncbn_layer_options known;
  if (absl::Status status = ReadOptions(given, &known); !status.ok()) return Report(status, error);
  syncbn::LayerOptions layer;
  layer.name = Text(known.name);
  layer.channels = known.channels;
  layer.eps = known.eps;
  int eps_mode = SYNCBN_EPS_ADD;
  int numeric_policy = SYNCBN_NUMERIC_REFUSE;
  if (absl::Status status =
          First({ReadEnum(known.eps_mode, SYNCBN_EPS_ADD, SYNCBN_EPS_CLAMP, eps_mode, "eps_mode", &eps_mode),
                 ReadEnum(known.numeric_policy, SYNCBN_NUMERIC_REFUSE, SYNCBN_NUMERIC_PROPAGATE, numeric_policy,
                          "numeric_policy", &numeric_policy)});
      !status.ok()) {
    return Report(status, error);
  }
  layer.eps_mode = eps_mode == SYNCBN_EPS_CLAMP ? syncbn::EpsMode::kClamp : syncbn::EpsMode::kAdd;
  layer.numeric_policy =
      numeric_policy == SYNCBN_NUMERIC_PROPAGATE ? syncbn::NumericPolicy::kPropagate : syncbn::NumericPolicy::kRefuse;
  if (known.has_momentum != 0) layer.momentum = known.momentum;
  layer.biased_running_variance = known.biased_running_variance != 0;
  if (absl::Status status = ReadEnum(known.kind, SYNCBN_LAYER_BATCH_NORM, SYNCBN_LAYER_SUM,
                                     syncbn::LayerKind::kBatchNorm, "kind", &layer.kind);
      !status.ok()) {
    return Report(status, error);
  }
  return Report(worker->worker->DeclareLayer(layer), error);
}

// ---- Rounds ---------------------------------------------------------------------------------------------------------

syncbn_code syncbn_round_start_forward(syncbn_worker* worker, const char* layer, uint64_t sequence, int64_t count,
                                       const double* mean, const double* m2, size_t channels, int32_t backward_role,
                                       syncbn_round** out, syncbn_error** error) {
  if (worker == nullptr) return Report(Missing("worker"), error);
  if (layer == nullptr || out == nullptr) return Report(Missing(layer == nullptr ? "layer" : "out"), error);
  syncbn::BackwardRole role;
  if (absl::Status status = ReadRole(backward_role, &role); !status.ok()) return Report(status, error);
  return ReturnRound(
      worker->worker->StartForward(layer, sequence, count, View(mean, channels), View(m2, channels), role), out, error);
}

syncbn_code syncbn_round_start_backward(syncbn_worker* worker, const char* layer, uint64_t sequence,
                                        const double* sum_dy, const double* sum_dy_xmu, size_t channels,
                                        syncbn_round** out, syncbn_error** error) {
  if (worker == nullptr) return Report(Missing("worker"), error);
  if (layer == nullptr || out == nullptr) return Report(Missing(layer == nullptr ? "layer" : "out"), error);
  return ReturnRound(worker->worker->StartBackward(layer, sequence, View(sum_dy, channels), View(sum_dy_xmu, channels)),
                     out, error);
}

syncbn_code syncbn_round_start_sum(syncbn_worker* worker, const char* name, uint64_t sequence, const double* value,
                                   size_t length, syncbn_round** out, syncbn_error** error) {
  if (worker == nullptr) return Report(Missing("worker"), error);
  if (name == nullptr || out == nullptr) return Report(Missing(name == nullptr ? "name" : "out"), error);
  return ReturnRound(worker->worker->StartSum(name, sequence, View(value, length)), out, error);
}

syncbn_code syncbn_worker_flush(syncbn_worker* worker, syncbn_error** error) {
  if (worker == nullptr) return Report(Missing("worker"), error);
  return Report(worker->worker->Flush(), error);
}

syncbn_code syncbn_round_wait(syncbn_round* round, int64_t timeout_ns, syncbn_error** error) {
  if (round == nullptr) return Report(Missing("round"), error);
  return Report(round->round.Wait(Timeout(timeout_ns)), error);
}

uint64_t syncbn_round_sequence(const syncbn_round* round) { return round->round.sequence(); }
int64_t syncbn_round_count(const syncbn_round* round) { return round->round.result().count; }
size_t syncbn_round_length(const syncbn_round* round) { return round->round.result().first.size(); }
const double* syncbn_round_first(const syncbn_round* round) { return round->round.result().first.data(); }
const double* syncbn_round_second(const syncbn_round* round) {
  const std::vector<double>& second = round->round.result().second;
  return second.empty() ? nullptr : second.data();
}
int32_t syncbn_round_backward_required(const syncbn_round* round) {
  return round->round.result().backward_required ? 1 : 0;
}
size_t syncbn_round_missing_ranks(const syncbn_round* round, const uint32_t** ranks) {
  return Ranks(round->round.result().missing_ranks, ranks);
}
void syncbn_round_destroy(syncbn_round* round) { delete round; }

// ---- Passes ---------------------------------------------------------------------------------------------------------

syncbn_code syncbn_stream_order_check(int32_t device_index, syncbn_error** error) {
  return Report(syncbn::StreamOrderStatus(device_index), error);
}

syncbn_code syncbn_forward_start(syncbn_worker* worker, const char* layer, const syncbn_tensor* given_x,
                                 const syncbn_pass_options* given, syncbn_forward** out, syncbn_error** error) {
  if (worker == nullptr) return Report(Missing("worker"), error);
  if (layer == nullptr || out == nullptr) return Report(Missing(layer == nullptr ? "layer" : "out"), error);
  TensorView x;
  syncbn::PassOptions options;
  if (absl::Status status = First({ReadTensor(given_x, "x", &x), ReadPassOptions(given, &options)}); !status.ok()) {
    return Report(status, error);
  }
  auto pass = syncbn::ForwardPass::Start(*worker->worker, layer, x, options);
  if (!pass.ok()) return Report(pass.status(), error);
  *out = new syncbn_forward{worker->worker, *std::move(pass)};
  return 0;
}

syncbn_code syncbn_forward_wait(syncbn_forward* forward, int64_t timeout_ns, syncbn_error** error) {
  if (forward == nullptr) return Report(Missing("forward"), error);
  return Report(forward->pass.Wait(Timeout(timeout_ns)), error);
}

syncbn_code syncbn_forward_finish(syncbn_forward* forward, const syncbn_tensor* given_x,
                                  const syncbn_forward_outputs* given, syncbn_error** error) {
  if (forward == nullptr) return Report(Missing("forward"), error);
  TensorView x;
  syncbn::ForwardArguments outputs;
  if (absl::Status status = First({ReadTensor(given_x, "x", &x), ReadForwardOutputs(given, &outputs)}); !status.ok()) {
    return Report(status, error);
  }
  return Report(forward->pass.Finish(x, outputs), error);
}

int32_t syncbn_forward_stream_ordered(const syncbn_forward* forward) { return forward->pass.stream_ordered() ? 1 : 0; }
uint64_t syncbn_forward_sequence(const syncbn_forward* forward) { return forward->pass.sequence(); }
int64_t syncbn_forward_count(const syncbn_forward* forward) { return Known(forward).count; }
const double* syncbn_forward_mean(const syncbn_forward* forward) { return Known(forward).mean.data(); }
const double* syncbn_forward_var(const syncbn_forward* forward) { return Known(forward).var.data(); }
int32_t syncbn_forward_backward_required(const syncbn_forward* forward) {
  return Known(forward).backward_required ? 1 : 0;
}
void syncbn_forward_destroy(syncbn_forward* forward) { Delete(forward); }

syncbn_code syncbn_backward_start(const syncbn_forward* forward, const syncbn_backward_inputs* given_inputs,
                                  const syncbn_pass_options* given, syncbn_backward** out, syncbn_error** error) {
  if (forward == nullptr) return Report(Missing("forward"), error);
  if (out == nullptr) return Report(Missing("out"), error);
  syncbn::BackwardInputs inputs;
  syncbn::PassOptions options;
  if (absl::Status status = First({ReadBackwardInputs(given_inputs, &inputs), ReadPassOptions(given, &options)});
      !status.ok()) {
    return Report(status, error);
  }
  auto pass = syncbn::BackwardPass::Start(*forward->worker, forward->pass.statistics(), inputs, options);
  if (!pass.ok()) return Report(pass.status(), error);
  *out = new syncbn_backward{forward->worker, *std::move(pass)};
  return 0;
}

syncbn_code syncbn_backward_wait(syncbn_backward* backward, int64_t timeout_ns, syncbn_error** error) {
  if (backward == nullptr) return Report(Missing("backward"), error);
  return Report(backward->pass.Wait(Timeout(timeout_ns)), error);
}

syncbn_code syncbn_backward_finish(syncbn_backward* backward, const syncbn_backward_inputs* given_inputs,
                                   const syncbn_backward_outputs* given_outputs, syncbn_error** error) {
  if (backward == nullptr) return Report(Missing("backward"), error);
  syncbn::BackwardInputs inputs;
  syncbn::BackwardOutputs outputs;
  if (absl::Status status =
          First({ReadBackwardInputs(given_inputs, &inputs), ReadBackwardOutputs(given_outputs, &outputs)});
      !status.ok()) {
    return Report(status, error);
  }
  // The pass has its inputs from the start. Others here would be ignored, so they are refused.
  if (inputs.dy.data != backward->pass.inputs().dy.data || inputs.x != backward->pass.inputs().x) {
    return Report(absl::InvalidArgumentError("dy and x are not those that the backward pass was started with"), error);
  }
  return Report(backward->pass.Finish(outputs), error);
}

void syncbn_backward_destroy(syncbn_backward* backward) { Delete(backward); }

syncbn_code syncbn_evaluate(const syncbn_tensor* given_x, const syncbn_evaluate_options* given, void* y,
                            syncbn_error** error) {
  TensorView x;
  syncbn::EvaluateArguments options;
  if (absl::Status status = First({ReadTensor(given_x, "x", &x), ReadEvaluateOptions(given, &options)}); !status.ok()) {
    return Report(status, error);
  }
  return Report(syncbn::Evaluate(x, options, y), error);
}

syncbn_code syncbn_evaluate_backward(const syncbn_backward_inputs* given_inputs, const syncbn_evaluate_options* given,
                                     const syncbn_backward_outputs* given_outputs, syncbn_error** error) {
  syncbn::BackwardInputs inputs;
  syncbn::EvaluateArguments options;
  syncbn::BackwardOutputs outputs;
  if (absl::Status status = First({ReadBackwardInputs(given_inputs, &inputs), ReadEvaluateOptions(given, &options),
                                   ReadBackwardOutputs(given_outputs, &outputs)});
      !status.ok()) {
    return Report(status, error);
  }
  return Report(syncbn::EvaluateBackward(inputs, options, outputs), error);
}
