#include "plumbing/clock.h"

#include "absl/time/time.h"
#include "grpc/support/time.h"
#include "gtest/gtest.h"

namespace syncbn {
namespace {

TEST(ClockTest, TimesThatHaveComeAreTheInfinitePast) {
  const Clock clock;
  const gpr_timespec past = gpr_inf_past(GPR_CLOCK_MONOTONIC);
  EXPECT_EQ(gpr_time_cmp(clock.QueueDeadline(clock.Now()), past), 0);
  EXPECT_EQ(gpr_time_cmp(clock.QueueDeadline(clock.Now() - absl::Hours(1)), past), 0);
  EXPECT_EQ(gpr_time_cmp(clock.QueueDeadline(absl::InfinitePast()), past), 0);
}

TEST(ClockTest, TimesToComeKeepTheirDistance) {
  const Clock clock;
  const gpr_timespec before = gpr_now(GPR_CLOCK_MONOTONIC);
  const absl::Time now = clock.Now();
  const gpr_timespec deadline = clock.QueueDeadline(now + absl::Hours(1));
  // Not before the hour has passed since `before`, and not after one that begins here.
  const gpr_timespec hour = gpr_time_from_hours(1, GPR_TIMESPAN);
  EXPECT_GE(gpr_time_cmp(deadline, gpr_time_add(before, hour)), 0);
  EXPECT_LE(gpr_time_cmp(deadline, gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), hour)), 0);
  EXPECT_EQ(gpr_time_cmp(clock.QueueDeadline(absl::InfiniteFuture()), gpr_inf_future(GPR_CLOCK_MONOTONIC)), 0);
}

}  // namespace
}  // namespace syncbn
