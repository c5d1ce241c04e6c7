// syncbn-master's flags: from the command line, a config file and the environment.

#ifndef SYNCBN_SERVER_FLAGS_H_
#define SYNCBN_SERVER_FLAGS_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "plumbing/log.h"
#include "server/stats_server.h"

namespace syncbn {

struct Flags {
  MasterServer::Options server;
  LogLevel log_level = LogLevel::kInfo;
  // Time that workers are given to drain at a signal.
  absl::Duration exit_timeout = absl::Seconds(5);
  // Infinite: until a signal comes.
  absl::Duration max_lifetime = absl::InfiniteDuration();
  // Variables named almost like one of ours, each as a sentence.
  std::vector<std::string> doubts;
};

// Fills in `flags`; what is not given keeps its default. The command line goes before the config file, and that before
// the environment. In names, '-' and '_' are the same. Returns the exit code if the process is to end: 0 after --help
// and --version, which are printed, and 2 after an error, of which stderr has one line. Before any thread is started:
// it may change the environment.
std::optional<int> ParseFlags(int argc, char** argv, Flags* flags);

}  // namespace syncbn

#endif  // SYNCBN_SERVER_FLAGS_H_
