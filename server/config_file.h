// The text of syncbn-master's config file.

#ifndef SYNCBN_SERVER_CONFIG_FILE_H_
#define SYNCBN_SERVER_CONFIG_FILE_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace syncbn {

struct ConfigEntry {
  int line = 0;  // The one that the key stands in; the first is 1.
  std::string key;
  std::vector<std::string> values;  // At least one, each without its quotes.
};

// Parses the part that TOML and INI have in common, and lists of values:
//
//     # a comment; so is a line that begins with ';'
//     key = value
//     key = "value", 'value' # A comment begins with '#' outside of quotes. Without quotes, spaces part values too.
//     key = ["value",
//            "value"]
//     key
//
// A key without a value has the value "true". Nothing is escaped within quotes. A byte-order mark is skipped.
//
// Returns: the entries in their order; a key may be there several times.
// Errors: INVALID_ARGUMENT, naming the line, for a section other than [default], an absent key, a list or a quote that
// is not closed, an empty list, text after a list or a quote, and control characters.
absl::StatusOr<std::vector<ConfigEntry>> ParseConfigFile(absl::string_view text);

}  // namespace syncbn

#endif  // SYNCBN_SERVER_CONFIG_FILE_H_
