#include "client/cc/targets.h"

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace syncbn {

absl::StatusOr<std::vector<std::string>> SplitTargets(absl::string_view list) {
  if (absl::StripAsciiWhitespace(list).empty()) {
    return absl::InvalidArgumentError("a worker needs the target of its master");
  }
  std::vector<std::string> targets;
  for (const absl::string_view part : absl::StrSplit(list, ',')) {
    targets.emplace_back(absl::StripAsciiWhitespace(part));
    if (targets.back().empty()) {
      return absl::InvalidArgumentError(absl::StrCat("the list of targets \"", list, "\" has an empty one"));
    }
  }
  return targets;
}

absl::Status TargetTurn::SetList(absl::string_view list) {
  if (list == list_) return absl::OkStatus();
  auto targets = SplitTargets(list);
  if (!targets.ok()) return targets.status();
  list_ = std::string(list);
  targets_ = *std::move(targets);
  position_ = 0;
  failures_ = 0;
  return absl::OkStatus();
}

bool TargetTurn::Failed() {
  if (targets_.empty()) return true;
  ++position_;
  return ++failures_ % targets_.size() == 0;
}

}  // namespace syncbn
