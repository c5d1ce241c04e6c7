#include "server/core/error.h"

#include <algorithm>

namespace syncbn::core {

std::string RankList(const std::vector<Rank>& ranks) {
  constexpr size_t kShown = 8;
  if (ranks.empty()) return "no rank";
  if (ranks.size() == 1) return absl::StrCat("rank ", ranks[0]);
  std::string text = "ranks ";
  const bool cut = ranks.size() > kShown;
  const size_t listed = cut ? kShown : ranks.size() - 1;
  for (size_t i = 0; i < listed; ++i) absl::StrAppend(&text, i == 0 ? "" : ", ", ranks[i]);
  if (cut) {
    absl::StrAppend(&text, " and ", ranks.size() - kShown, " more");
  } else {
    absl::StrAppend(&text, " and ", ranks.back());
  }
  return text;
}

std::string Describe(const RoundKey& key) {
  switch (key.phase) {
    case Phase::kForward:
      return absl::StrCat("forward round ", key.sequence, " of layer \"", key.layer, "\"");
    case Phase::kBackward:
      return absl::StrCat("backward round ", key.sequence, " of layer \"", key.layer, "\"");
    case Phase::kSum:
      return absl::StrCat("sum ", key.sequence, " of vector \"", key.layer, "\"");
  }
  return "";
}

}  // namespace syncbn::core
