// The C interface: workers and their rounds.

#include "client/cc/worker.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "client/c/arguments.h"
#include "client/c/handles.h"
#include "client/c/syncbn.h"

namespace {

using syncbn::c::First;
using syncbn::c::Missing;
using syncbn::c::ReadEnum;
using syncbn::c::ReadOptions;
using syncbn::c::Report;
using syncbn::c::Text;
using syncbn::c::Timeout;

syncbn_code ReportRounds(absl::StatusOr<std::vector<syncbn::RoundKey>> keys, syncbn_rounds** out,
                         syncbn_error** error) {
  if (!keys.ok()) return Report(keys.status(), error);
  *out = new syncbn_rounds{*std::move(keys)};
  return 0;
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

syncbn_code ReturnRound(absl::StatusOr<syncbn::Round> round, syncbn_round** out, syncbn_error** error) {
  if (!round.ok()) return Report(round.status(), error);
  *out = new syncbn_round{*std::move(round)};
  return 0;
}

absl::Span<const double> View(const double* values, size_t size) {
  return {values, values == nullptr ? size_t{0} : size};
}

}  // namespace

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
  if (known.join_cancelled != nullptr) {
    options.join_is_cancelled = [flag = known.join_cancelled] { return __atomic_load_n(flag, __ATOMIC_ACQUIRE) != 0; };
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
  if (absl::Status status = syncbn::c::ReadRole(backward_role, &role); !status.ok()) return Report(status, error);
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
  return syncbn::c::Ranks(round->round.result().missing_ranks, ranks);
}
void syncbn_round_destroy(syncbn_round* round) { delete round; }
