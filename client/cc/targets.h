// The addresses under which a worker looks for its master, in turn.

#ifndef SYNCBN_CLIENT_CC_TARGETS_H_
#define SYNCBN_CLIENT_CC_TARGETS_H_

#include <cstddef>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace syncbn {

// The parts of a list that commas separate, without the spaces around them. INVALID_ARGUMENT if there is none, or if
// one is empty or no address: a URL, or without a port in 1 .. 65535.
absl::StatusOr<std::vector<std::string>> SplitTargets(absl::string_view list);

// Which target is tried next. Not thread-safe.
class TargetTurn {
 public:
  // The list as it is now. It may be another one each time.
  absl::Status SetList(absl::string_view list);

  const std::string& current() const { return targets_[position_ % targets_.size()]; }
  // The whole list, for messages.
  const std::string& list() const { return list_; }
  bool has_several() const { return targets_.size() > 1; }

  // The current target has been reached: it is the first to be tried after a break.
  void Reached() { failures_ = 0; }
  // It has failed. Whether each of the list has failed once more, so that it is time for a pause.
  bool Failed();

 private:
  std::string list_;
  std::vector<std::string> targets_;
  size_t position_ = 0;
  size_t failures_ = 0;
};

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_TARGETS_H_
