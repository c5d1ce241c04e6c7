// The addresses under which a worker looks for its master, in turn.

#ifndef SYNCBN_CLIENT_CC_SESSION_TARGETS_H_
#define SYNCBN_CLIENT_CC_SESSION_TARGETS_H_

#include <cstddef>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace syncbn {

// Splits a list at its commas and trims the parts. *Errors*: INVALID_ARGUMENT for an empty list, and for a part that is
// empty or not an address: a URL, or without a port in 1 .. 65535.
absl::StatusOr<std::vector<std::string>> SplitTargets(absl::string_view list);

// Chooses the target that is tried next.
//
// *Thread safety*: none.
class TargetTurn {
 public:
  // Takes the list as it is now; a list that differs from the one before starts at its first target. *Errors*: those of
  // SplitTargets; the list before it stays.
  absl::Status SetList(absl::string_view list);

  const std::string& current() const { return targets_[position_ % targets_.size()]; }
  // Returns the whole list, for messages; empty if there has been none.
  const std::string& list() const { return list_; }
  bool has_several() const { return targets_.size() > 1; }

  // Notes that the current target has been reached. It is the first to be tried after a break.
  void Reached() { failures_ = 0; }
  // Notes that it has failed and moves on to the next. Returns true if every target of the list has failed once more,
  // so that it is time for a pause.
  bool Failed();

 private:
  std::string list_;
  std::vector<std::string> targets_;
  size_t position_ = 0;
  size_t failures_ = 0;
};

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_SESSION_TARGETS_H_
