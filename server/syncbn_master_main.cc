// syncbn-master: a MasterServer as a process of its own.

#include <fcntl.h>
#include <malloc.h>
#include <signal.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "grpcpp/ext/channelz_service_plugin.h"
#include "plumbing/grpc_process.h"
#include "plumbing/log.h"
#include "server/expiry_notice.h"
#include "server/flags.h"
#include "server/http/http_server.h"
#include "server/http/inspection_client.h"
#include "server/http/round_log.h"
#include "server/log/process_log.h"
#include "server/master_server.h"
#include "server/systemd.h"
#include "server/watchdog.h"
#include "vocabulary/revision.h"
#include "vocabulary/version.h"

namespace {

using syncbn::Log;
using syncbn::LogField;
using syncbn::LogLevel;
using syncbn::http::HttpOptions;
using syncbn::http::HttpServer;
using syncbn::http::InspectionClient;

constexpr char kDefaultHttpAddress[] = "127.0.0.1:8080";

// Opens descriptors 0 to 2 if they are closed, so that no socket gets a number that output is written to.
void OpenStandardDescriptors() {
  int descriptor = open("/dev/null", O_RDWR);
  while (descriptor >= 0 && descriptor <= STDERR_FILENO) descriptor = open("/dev/null", O_RDWR);
  if (descriptor >= 0) close(descriptor);
}

// Returns the limit of descriptors in force.
rlim_t DescriptorLimit() {
  rlimit limit = {};
  return getrlimit(RLIMIT_NOFILE, &limit) == 0 ? limit.rlim_cur : 0;
}

// Raises the soft limit of descriptors, of which each worker takes one. The default is low for programs that use
// select().
void RaiseDescriptorLimit() {
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= limit.rlim_max) return;
  const rlim_t before = limit.rlim_cur;
  limit.rlim_cur = limit.rlim_max;
  if (setrlimit(RLIMIT_NOFILE, &limit) == 0) {
    Log(LogLevel::kInfo, absl::StrCat("raised the limit of descriptors from ", before, " to ", limit.rlim_cur));
  }
}

// Serves the pages about the master. Returns null if they are off, or if nobody has asked for them and the usual port
// is taken: two masters on one host are common.
absl::StatusOr<std::unique_ptr<HttpServer>> ServeHttp(const syncbn::Flags& flags, const syncbn::MasterServer& server) {
  if (flags.http_address.has_value() && flags.http_address->empty()) return nullptr;
  HttpOptions options;
  options.address = flags.http_address.value_or(kDefaultHttpAddress);
  options.token = flags.server.inspection_token.empty() ? flags.server.token : flags.server.inspection_token;
  options.pages_open = flags.server.inspection.value_or(true);
  options.metrics_max_ranks = flags.metrics_max_ranks;
  auto http = HttpServer::Start(options, server.InProcessChannel());
  if (http.ok()) {
    const char* const what = options.pages_open ? "status page, metrics and probes" : "metrics and probes";
    const char* const condition = options.pages_open && !options.token.empty() ? "; the page needs the token" : "";
    Log(LogLevel::kInfo, absl::StrCat(what, " on http://", (*http)->address(), "/", condition),
        {LogField{"event", "http"}, LogField{"address", (*http)->address()}});
  } else if (!flags.http_address.has_value()) {
    Log(LogLevel::kInfo, absl::StrCat("no status page: ", http.status().message(), "; --http-address gives another"));
    return nullptr;
  }
  return http;
}

// Writes the rounds that each group remembers to the log.
void DumpRounds(const InspectionClient& client) {
  if (const absl::Status status = syncbn::http::LogRounds(client); !status.ok()) {
    Log(LogLevel::kWarning, absl::StrCat("the rounds cannot be written to the log: ", status.message()));
  }
}

// Returns the signals that the program waits for.
sigset_t Signals() {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGUSR1}) sigaddset(&signals, signal);
  return signals;
}

void Reload(syncbn::MasterServer& server) {
  const absl::Status status = server.ReloadCertificates();
  if (status.ok()) {
    Log(LogLevel::kInfo, absl::StrCat("reloaded the certificates; they are valid until ",
                                      syncbn::ExpiryText(server.certificate_expiry())));
  } else if (absl::IsFailedPrecondition(status)) {
    Log(LogLevel::kInfo, absl::StrCat("SIGHUP is ignored: ", status.message()));
  } else {
    Log(LogLevel::kError, absl::StrCat("the certificates stay as they were: ", status.message()));
  }
}

// Waits for SIGTERM or SIGINT, at most for `lifetime`; reloads the certificates at SIGHUP, and writes the newest rounds
// to the log at SIGUSR1. Tells systemd's watchdog, if there is one, that the master answers, and the log that the
// certificate expires. Returns the reason to end.
std::string AwaitEnd(syncbn::MasterServer& server, absl::Duration lifetime) {
  constexpr absl::Duration kLongestWait = absl::Hours(1);  // For the certificate's end.
  const sigset_t signals = Signals();
  const auto start = std::chrono::steady_clock::now();
  const InspectionClient client(server.InProcessChannel());
  syncbn::SystemdWatchdog watchdog;
  syncbn::ExpiryNotice expiry;
  while (true) {
    if (const auto line = expiry.Due(server.certificate_expiry(), absl::Now())) Log(line->level, line->text);
    const absl::Duration left = lifetime - absl::FromChrono(std::chrono::steady_clock::now() - start);
    if (left <= absl::ZeroDuration()) return "its lifetime has ended";
    watchdog.Poke([&client] { return client.GetMaster().ok(); });
    const timespec wait = absl::ToTimespec(std::min({left, kLongestWait, watchdog.interval()}));
    switch (sigtimedwait(&signals, nullptr, &wait)) {
      case SIGTERM:
        return "SIGTERM";
      case SIGINT:
        return "SIGINT";
      case SIGHUP:
        Reload(server);
        break;
      case SIGUSR1:
        DumpRounds(client);
        break;
      default:  // The wait is over, or the process was stopped and continued.
        break;
    }
  }
}

std::vector<LogField> ReadyFields(const syncbn::MasterServer& server) {
  return {{"event", "ready"},
          {"version", syncbn::kVersion},
          {"revision", syncbn::kRevision},
          {"addresses", absl::StrJoin(server.targets(), ",")}};
}

std::string Describe(const syncbn::MasterServer& server, const syncbn::Flags& flags) {
  const auto& tls = flags.server.tls;
  const std::string commit = *syncbn::kRevision == '\0' ? "" : absl::StrCat(" (commit ", syncbn::kRevision, ")");
  std::string text =
      absl::StrCat("syncbn-master ", syncbn::kVersion, commit, " listens on ", absl::StrJoin(server.targets(), " "));
  if (tls.cert_file.empty() && !tls.auto_tls) {
    absl::StrAppend(&text, "; no TLS");
  } else {
    absl::StrAppend(&text, "; TLS, certificate valid until ", syncbn::ExpiryText(server.certificate_expiry()),
                    tls.client_cert_auth ? ", workers authenticated" : ", workers not authenticated");
  }
  absl::StrAppend(&text, flags.server.token.empty() ? "; no token" : "; workers need the token");
  const auto& limits = flags.server.limits;
  absl::StrAppend(&text, "; at most ", server.max_connections(), " connections, ", limits.max_groups, " groups, ",
                  limits.max_workers, " workers, ", limits.max_channels, " channels, ", DescriptorLimit(),
                  " descriptors");
  return text;
}

constexpr int kDeadExitCode = 3;

// Ends the process if the server does not answer for `patience`. Returns null if that is infinite.
absl::StatusOr<std::unique_ptr<syncbn::Watchdog>> Watch(syncbn::MasterServer& server, absl::Duration patience) {
  if (patience == absl::InfiniteDuration()) return nullptr;
  return syncbn::Watchdog::Start(
      patience, [&server] { return server.Probe(); },
      [patience] {
        Log(LogLevel::kError,
            absl::StrCat("the master has not answered its own probes for ", absl::FormatDuration(patience),
                         "; the process ends with code ", kDeadExitCode, ", so that it is started again"));
        _exit(kDeadExitCode);
      });
}

// Tells what a restart may cure, by 1, from what someone must change first.
int ExitCode(const absl::Status& status) {
  const bool for_someone = absl::IsInvalidArgument(status) || absl::IsDataLoss(status) ||  // A damaged state file.
                           absl::IsFailedPrecondition(status);                             // One of a newer version.
  return for_someone ? 2 : 1;
}

void TuneAllocator() {
  // A frame of many layers takes half a megabyte, and arrives from every worker at once. On the heap, such frames would
  // leave holes; mapped memory is returned. Setting the threshold keeps it from growing by itself. Read buffers stay
  // below it, and a few free ones stay at the end of the heap: getting a page back costs more than merging its
  // contents.
  mallopt(M_MMAP_THRESHOLD, 256 << 10);
  mallopt(M_TRIM_THRESHOLD, 4 << 20);
}

}  // namespace

int main(int argc, char** argv) {
  OpenStandardDescriptors();
  syncbn::PrepareGrpc();  // Before any thread exists.
  TuneAllocator();
  // Block the signals before any thread exists, so that no thread takes them.
  const sigset_t signals = Signals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);

  syncbn::Flags flags;
  if (const auto code = syncbn::ParseFlags(argc, argv, &flags)) return *code;
  syncbn::LogToStderr(flags.log_level, flags.log_format);
  for (const std::string& doubt : flags.doubts) Log(LogLevel::kWarning, doubt);
  RaiseDescriptorLimit();
  grpc::channelz::experimental::InitChannelzService();  // For every server of the process; there is one.

  flags.server.revision = syncbn::kRevision;
  auto server = syncbn::MasterServer::Start(flags.server);
  if (!server.ok()) {
    std::fprintf(stderr, "syncbn-master: %s\n", std::string(server.status().message()).c_str());
    return ExitCode(server.status());
  }
  auto http = ServeHttp(flags, **server);
  if (!http.ok()) {
    std::fprintf(stderr, "syncbn-master: %s\n", std::string(http.status().message()).c_str());
    return http.status().code() == absl::StatusCode::kInvalidArgument ? 2 : 1;
  }
  auto watchdog = Watch(**server, flags.watchdog);
  if (!watchdog.ok()) {
    std::fprintf(stderr, "syncbn-master: %s\n", std::string(watchdog.status().message()).c_str());
    return ExitCode(watchdog.status());
  }
  Log(LogLevel::kInfo, Describe(**server, flags), ReadyFields(**server));
  syncbn::NotifySystemd("READY=1");
  std::printf("syncbn-master ready on %s\n", absl::StrJoin((*server)->targets(), " ").c_str());
  std::fflush(stdout);
  const std::string reason = AwaitEnd(**server, flags.max_lifetime);
  watchdog->reset();
  Log(LogLevel::kInfo, absl::StrCat("shutting down: ", reason), {LogField{"event", "shutdown"}});
  syncbn::NotifySystemd("STOPPING=1");
  (*server)->Shutdown(flags.exit_timeout);
  Log(LogLevel::kInfo, "stopped");
  std::printf("syncbn-master stopped\n");
  return 0;
}
