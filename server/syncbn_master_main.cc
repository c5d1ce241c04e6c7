// syncbn-master: a MasterServer as a process. Its flags, and nothing else.

#include <malloc.h>
#include <signal.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "server/stats_server.h"

namespace {

struct Flags {
  syncbn::MasterServer::Options server;
  double exit_timeout_s = 5.0;
  double max_lifetime_s = 0.0;
};

const CLI::Validator kSeconds(
    [](const std::string& text) {
      double value = 0.0;
      if (absl::SimpleAtod(text, &value) && value >= 0.0 && std::isfinite(value)) return std::string();
      return "\"" + text + "\" is not a number of seconds";
    },
    "SECONDS");

void Define(CLI::App& app, Flags& flags) {
  app.add_option("--address", flags.server.addresses,
                 "where to listen: HOST:PORT (port 0: any) or unix:PATH; may repeat")
      ->envname("SYNCBN_ADDRESS")
      ->delimiter(',')
      ->capture_default_str();
  app.add_flag("--insecure", flags.server.insecure, "listen beyond loopback without TLS")->envname("SYNCBN_INSECURE");
  app.add_option("--cert-file", flags.server.tls.cert_file, "PEM certificate: with it and its key, TLS alone is spoken")
      ->envname("SYNCBN_CERT_FILE");
  app.add_option("--key-file", flags.server.tls.key_file, "PEM key of the certificate")->envname("SYNCBN_KEY_FILE");
  app.add_option("--trusted-ca-file", flags.server.tls.trusted_ca_file, "PEM certificates that sign the workers'")
      ->envname("SYNCBN_TRUSTED_CA_FILE");
  app.add_flag("--client-cert-auth", flags.server.tls.client_cert_auth, "refuse workers without a trusted certificate")
      ->envname("SYNCBN_CLIENT_CERT_AUTH");
  app.add_option("--max-channels", flags.server.limits.max_channels, "most channels of a layer")
      ->envname("SYNCBN_MAX_CHANNELS")
      ->capture_default_str();
  app.add_option("--max-workers", flags.server.limits.max_workers, "most workers of a group")
      ->envname("SYNCBN_MAX_WORKERS")
      ->capture_default_str();
  app.add_option("--max-groups", flags.server.limits.max_groups, "most groups at one time")
      ->envname("SYNCBN_MAX_GROUPS")
      ->capture_default_str();
  app.add_option("--max-retained-bytes", flags.server.limits.max_retained_bytes,
                 "most bytes of ended rounds that a group remembers, for replays")
      ->envname("SYNCBN_MAX_RETAINED_BYTES")
      ->capture_default_str();
  app.add_option("--exit-timeout", flags.exit_timeout_s, "seconds that workers are given to drain at SIGTERM")
      ->envname("SYNCBN_EXIT_TIMEOUT")
      ->check(kSeconds)
      ->capture_default_str();
  app.add_option("--max-lifetime", flags.max_lifetime_s, "exit after this many seconds; 0: never")
      ->envname("SYNCBN_MAX_LIFETIME")
      ->check(kSeconds)
      ->capture_default_str();
  app.set_config("--config-file", "", "read flags from this file (TOML or INI)")->envname("SYNCBN_CONFIG_FILE");
  app.set_version_flag("--version", "syncbn-master 0.1.0");
}

// Waits for SIGTERM or SIGINT, for at most `lifetime_s` seconds if that is not 0.
void AwaitEnd(const sigset_t& signals, double lifetime_s) {
  if (lifetime_s == 0.0) {
    int signal = 0;
    sigwait(&signals, &signal);
    return;
  }
  const auto end = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(absl::Seconds(lifetime_s));
  while (true) {
    // A process that is stopped and continued is interrupted in this wait, without any of its signals.
    const timespec left =
        absl::ToTimespec(std::max(absl::FromChrono(end - std::chrono::steady_clock::now()), absl::ZeroDuration()));
    if (sigtimedwait(&signals, nullptr, &left) >= 0 || errno != EINTR) return;
  }
}

}  // namespace

int main(int argc, char** argv) {
  // Reads into buffers that hold many frames. With those of 8 KB, which gRPC would choose, every other frame of 256
  // channels arrives in two reads, and the first of them sends a window update. There is no other way to say so.
  setenv("GRPC_EXPERIMENTS", "-tcp_read_chunks", /*overwrite=*/0);
  // A frame of many layers is half a megabyte, and comes from every worker at once. From the heap they would leave
  // holes that outlive them; mapped, they go back. Setting the threshold keeps it from growing by itself.
  mallopt(M_MMAP_THRESHOLD, 64 << 10);

  // Before any thread exists, so that none of them takes the signals.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);

  Flags flags;
  CLI::App app("The master of syncbn: merges the batch statistics of workers.", "syncbn-master");
  Define(app, flags);
  CLI11_PARSE(app, argc, argv);

  auto server = syncbn::MasterServer::Start(flags.server);
  if (!server.ok()) {
    std::fprintf(stderr, "syncbn-master: %s\n", std::string(server.status().message()).c_str());
    return server.status().code() == absl::StatusCode::kInvalidArgument ? 2 : 1;
  }
  std::printf("syncbn-master ready on %s\n", absl::StrJoin((*server)->targets(), " ").c_str());
  std::fflush(stdout);
  AwaitEnd(signals, flags.max_lifetime_s);
  (*server)->Shutdown(absl::Seconds(flags.exit_timeout_s));
  std::printf("syncbn-master stopped\n");
  return 0;
}
