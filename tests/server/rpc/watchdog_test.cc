// The watchdog: when it gives a master up, and when it does not.

#include "server/watchdog.h"

#include <atomic>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"

namespace syncbn {
namespace {

constexpr absl::Duration kSoon = absl::Milliseconds(6);

TEST(WatchdogTest, GivesUpAMasterThatNeverAnswers) {
  std::atomic<int> probes = 0, deaths = 0;
  absl::Notification dead;
  {
    const auto watchdog = Watchdog::Start(
        kSoon,
        [&] {
          ++probes;
          return false;
        },
        [&] {
          ++deaths;
          dead.Notify();
        });
    ASSERT_TRUE(watchdog.ok());
    dead.WaitForNotification();
  }
  EXPECT_EQ(probes, Watchdog::kProbes);
  EXPECT_EQ(deaths, 1);
}

TEST(WatchdogTest, OneAnswerIsEnough) {
  std::atomic<int> probes = 0, deaths = 0;
  absl::Notification many;
  {
    const auto watchdog = Watchdog::Start(
        kSoon,
        [&] {
          if (++probes == 10 * Watchdog::kProbes) many.Notify();
          return probes % Watchdog::kProbes == 0;  // All but the last of a row go unanswered.
        },
        [&] { ++deaths; });
    ASSERT_TRUE(watchdog.ok());
    many.WaitForNotification();
  }
  EXPECT_EQ(deaths, 0);
}

TEST(WatchdogTest, StopsWithoutWaiting) {
  const auto watchdog = Watchdog::Start(
      absl::Hours(1000), [] { return true; }, [] {});
  EXPECT_TRUE(watchdog.ok());
}

}  // namespace
}  // namespace syncbn
