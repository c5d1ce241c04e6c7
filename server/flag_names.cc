#include "server/flag_names.h"

#include <algorithm>
#include <cctype>
#include <limits>
#include <numeric>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"

namespace syncbn {
namespace {

// Returns the number of insertions, deletions and replacements that turn one text into the other.
size_t EditDistance(absl::string_view a, absl::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i + 1);
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, diagonal + 1, row[j] + 1});
    }
  }
  return row.back();
}

}  // namespace

std::string WithHyphens(absl::string_view name) { return absl::StrReplaceAll(name, {{"_", "-"}}); }

std::string VariableOf(absl::string_view flag) {
  std::string name = absl::StrCat(kVariablePrefix, absl::StrReplaceAll(absl::StripPrefix(flag, "--"), {{"-", "_"}}));
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::toupper(c); });
  return name;
}

std::pair<std::string, size_t> Nearest(absl::string_view name, const std::vector<std::string>& known) {
  const std::string lower = absl::AsciiStrToLower(name);
  std::pair<std::string, size_t> best = {"", std::numeric_limits<size_t>::max()};
  for (const std::string& candidate : known) {
    if (const size_t distance = EditDistance(lower, absl::AsciiStrToLower(candidate)); distance < best.second)
      best = {candidate, distance};
  }
  return best;
}

}  // namespace syncbn
