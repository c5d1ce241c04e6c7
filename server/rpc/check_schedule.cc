#include "server/rpc/check_schedule.h"

#include <algorithm>

namespace syncbn::rpc {
namespace {

// Times between two checks, in multiples of what the first one took.
constexpr int kPause = 50;
constexpr int kPauseIfGrown = 5;

}  // namespace

bool CheckSchedule::IsDue(absl::Time now, size_t resident) {
  smallest_ = std::min(smallest_, resident);
  const bool grown = resident - smallest_ >= kMuchGrowth;
  if (now < due_ && !(grown && now >= due_if_grown_)) return false;
  smallest_ = resident;
  return true;
}

void CheckSchedule::Checked(absl::Time now, absl::Duration cpu) {
  due_ = now + std::min(kPause * cpu, kLongest);
  due_if_grown_ = now + std::min(kPauseIfGrown * cpu, kLongest);
}

}  // namespace syncbn::rpc
