// The three places that flags come from, as CLI11 does not read them: the config file, the environment, and the command
// line.
//
// Thread safety: the environment is read and changed, so no other thread may be running.

#ifndef SYNCBN_SERVER_FLAG_SOURCES_H_
#define SYNCBN_SERVER_FLAG_SOURCES_H_

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"

namespace syncbn {

// The most that is read of a config file.
inline constexpr size_t kMostConfigBytes = 1 << 20;

// Returns a reader of config files whose keys are among `known`, flags without leading hyphens. It throws
// CLI::ConfigError, with the line, where CLI11 would ignore unknown keys, close lists that are open, or read a device
// without an end.
std::shared_ptr<CLI::Config> MakeStrictConfig(std::vector<std::string> known);

// Reads the variables that hold a token itself, SYNCBN_TOKEN and SYNCBN_INSPECTION_TOKEN. There are no such flags,
// since other users see the command line. Throws CLI::ValidationError for one that is no token, and for one beside the
// flag that names a file, whose token would be in `*token` or `*inspection_token` already.
void ReadTokenVariables(std::string* token, std::string* inspection_token);

// Accepts SYNCBN_MAX-WORKERS for SYNCBN_MAX_WORKERS, and appends warnings of variables that are almost known to
// `*doubts`: they cannot be refused, since workers have variables with the same prefix. `names` are the flags, without
// leading hyphens.
void ReadEnvironment(const std::vector<std::string>& names, std::vector<std::string>* doubts);

// Returns the arguments as CLI11 wants them: in reverse, names with hyphens, and the config file as an argument, since
// CLI11 looks for its variable only after it has read the other arguments.
std::vector<std::string> ReadArguments(int argc, char** argv);

}  // namespace syncbn

#endif  // SYNCBN_SERVER_FLAG_SOURCES_H_
