// Flags of syncbn-master, from the command line, a config file and the environment.

#ifndef SYNCBN_SERVER_FLAGS_H_
#define SYNCBN_SERVER_FLAGS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "plumbing/log.h"
#include "server/log/process_log.h"
#include "server/master_server.h"

namespace syncbn {

struct Flags {
  MasterServer::Options server;
  LogLevel log_level = LogLevel::kInfo;
  LogFormat log_format = LogFormat::kText;
  // Address of the pages about the master. Unset: 127.0.0.1:8080, if it is free. Empty: none.
  std::optional<std::string> http_address;
  // Groups of more workers have no metrics by rank.
  uint32_t metrics_max_ranks = 256;
  // Time for workers to drain after a signal.
  absl::Duration exit_timeout = absl::Seconds(5);
  // Time without an answer to the master's own probes after which the process ends; infinite: never.
  absl::Duration watchdog = absl::Minutes(1);
  // Time after which the process ends by itself.
  absl::Duration max_lifetime = absl::InfiniteDuration();
  // Warnings about variables whose names are almost those of flags.
  std::vector<std::string> doubts;
};

// Fills in `flags`; flags that are not given keep their defaults. The command line takes precedence over the config
// file, and that over the environment. In names, '-' and '_' are the same. To be called before any thread is started,
// since it may change the environment.
//
// Returns: nothing if the process is to go on; otherwise its exit code, which is 0 after --help and --version, and 2
// after an error, which is reported as one line on stderr.
std::optional<int> ParseFlags(int argc, char** argv, Flags* flags);

}  // namespace syncbn

#endif  // SYNCBN_SERVER_FLAGS_H_
