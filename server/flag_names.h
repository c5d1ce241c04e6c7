// Names of flags as people write them: on the command line, in a config file, as variables of the environment.
//
// Thread safety: pure functions.

#ifndef SYNCBN_SERVER_FLAG_NAMES_H_
#define SYNCBN_SERVER_FLAG_NAMES_H_

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"

namespace syncbn {

inline constexpr char kVariablePrefix[] = "SYNCBN_";

// Returns the name with '-' for '_'.
std::string WithHyphens(absl::string_view name);

// Returns the variable of a flag, with or without its leading hyphens: SYNCBN_MAX_WORKERS for --max-workers.
std::string VariableOf(absl::string_view flag);

// Returns the known name nearest to the given one, ignoring case, and its distance in changed characters.
std::pair<std::string, size_t> Nearest(absl::string_view name, const std::vector<std::string>& known);

}  // namespace syncbn

#endif  // SYNCBN_SERVER_FLAG_NAMES_H_
