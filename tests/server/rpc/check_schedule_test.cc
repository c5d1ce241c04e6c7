// When connections are checked.

#include "server/rpc/check_schedule.h"

#include <algorithm>
#include <vector>

#include "gtest/gtest.h"
#include "server/rpc/resident_memory.h"

namespace syncbn::rpc {
namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kBefore = 50 * kMiB;

class CheckScheduleTest : public ::testing::Test {
 protected:
  // Returns whether a check is due so many milliseconds after the last one.
  bool IsDue(int ms, size_t resident) { return schedule_.IsDue(checked_ + absl::Milliseconds(ms), resident); }

  // Checks at once, which takes so much.
  void Check(size_t resident, absl::Duration cpu) {
    checked_ += absl::Hours(1);
    ASSERT_TRUE(IsDue(0, resident));
    schedule_.Checked(checked_, cpu);
  }

  absl::Time checked_ = absl::UnixEpoch();
  CheckSchedule schedule_;
};

TEST_F(CheckScheduleTest, ChecksTakeAFiftiethOfTheTime) {
  EXPECT_TRUE(IsDue(0, kBefore)) << "there was none";
  Check(kBefore, absl::Milliseconds(2));
  EXPECT_FALSE(IsDue(99, kBefore));
  EXPECT_TRUE(IsDue(100, kBefore));
}

TEST_F(CheckScheduleTest, TheNextCheckIsNeverFarAway) {
  Check(kBefore, absl::Seconds(1));
  EXPECT_FALSE(IsDue(999, kBefore + 8 * kMiB));
  EXPECT_TRUE(IsDue(1000, kBefore));
}

TEST_F(CheckScheduleTest, GrowthBringsTheNextCheckForward) {
  Check(kBefore, absl::Milliseconds(2));
  EXPECT_FALSE(IsDue(9, kBefore + 8 * kMiB));
  EXPECT_FALSE(IsDue(10, kBefore + 8 * kMiB - 1));
  EXPECT_TRUE(IsDue(10, kBefore + 8 * kMiB));
  EXPECT_FALSE(IsDue(20, kBefore + 15 * kMiB)) << "it has been checked with a part of it";
  EXPECT_TRUE(IsDue(20, kBefore + 16 * kMiB));
}

TEST_F(CheckScheduleTest, GrowthCountsFromTheSmallestSize) {
  Check(kBefore, absl::Milliseconds(2));
  EXPECT_FALSE(IsDue(10, kBefore - 20 * kMiB));
  EXPECT_FALSE(IsDue(20, kBefore - 13 * kMiB));
  EXPECT_TRUE(IsDue(30, kBefore - 12 * kMiB));
}

TEST(ResidentMemoryTest, GrowsWithWhatIsWritten) {
  const ResidentMemory memory;
  const size_t before = memory.bytes();
  EXPECT_GT(before, size_t{0});
  const std::vector<char> written(64 * kMiB, 'x');
  EXPECT_EQ(std::count(written.begin(), written.end(), 'x'), 64 * kMiB);
  EXPECT_GT(memory.bytes(), before + 48 * kMiB);
}

}  // namespace
}  // namespace syncbn::rpc
