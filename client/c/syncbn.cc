// The C interface: versions, errors, the log and the master. The other functions are in worker.cc and passes.cc.

#include "client/c/syncbn.h"

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "client/c/arguments.h"
#include "client/c/handles.h"
#include "client/c/kept_log.h"
#include "client/cc/device_runtime.h"
#include "kernels/cpu/batch_norm.h"
#include "plumbing/certificate.h"
#include "plumbing/log.h"
#include "plumbing/shared_file.h"
#include "server/http/http_server.h"
#include "server/master_server.h"
#include "vocabulary/revision.h"
#include "vocabulary/version.h"

using syncbn::c::Missing;
using syncbn::c::ReadOptions;
using syncbn::c::Report;
using syncbn::c::Text;

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
  return syncbn::c::Ranks(error->details.ranks, ranks);
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
  auto master = std::make_unique<syncbn_master>();
  master->server = *std::move(started);
  master->target = std::move(target);
  *out = master.release();
  return 0;
}

const char* syncbn_master_target(const syncbn_master* master) { return master->target.c_str(); }

syncbn_code syncbn_master_serve_http(syncbn_master* master, const char* address, const char* token,
                                     syncbn_error** error) {
  if (master == nullptr) return Report(Missing("master"), error);
  if (address == nullptr) return Report(Missing("address"), error);
  const absl::MutexLock lock(&master->mutex);
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

const char* syncbn_master_http_address(const syncbn_master* master) {
  const absl::MutexLock lock(&master->mutex);
  return master->http_address.c_str();
}

size_t syncbn_master_workers(const syncbn_master* master) { return master->server->workers(); }

void syncbn_master_shutdown(syncbn_master* master, int64_t grace_ns) {
  master->server->Shutdown(syncbn::c::Timeout(grace_ns));
}

void syncbn_master_destroy(syncbn_master* master) { delete master; }

syncbn_code syncbn_make_certificate(const char* host, const char* cert_file, const char* key_file,
                                    syncbn_error** error) {
  return Report(syncbn::MakeSelfSignedCertificate(Text(host), Text(cert_file), Text(key_file)), error);
}
