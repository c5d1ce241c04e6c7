// Lines of the log about a certificate that expires, over the days before and after.

#include "server/expiry_notice.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace syncbn {
namespace {

using ::testing::ElementsAre;

const absl::Time kExpiry = absl::FromCivil(absl::CivilMinute(2030, 5, 20, 12, 30), absl::UTCTimeZone());

// Returns the hours before the expiry at which there is a line, looking each hour from `first` on.
std::vector<int> HoursOf(LogLevel level, int first, int last) {
  ExpiryNotice notice;
  std::vector<int> found;
  for (int hours = first; hours >= last; --hours) {
    const auto line = notice.Due(kExpiry, kExpiry - absl::Hours(hours));
    if (line.has_value() && line->level == level) found.push_back(hours);
  }
  return found;
}

TEST(ExpiryNoticeTest, WarnsOnceADayInTheLastWeek) {
  EXPECT_THAT(HoursOf(LogLevel::kWarning, 1000, -100), ElementsAre(168, 144, 120, 96, 72, 48, 24));
  EXPECT_THAT(HoursOf(LogLevel::kWarning, 30, -100), ElementsAre(30, 6)) << "at the start";
}

TEST(ExpiryNoticeTest, TellsOfTheEndAtOnceAndThenOnceADay) {
  EXPECT_THAT(HoursOf(LogLevel::kError, 1000, -50), ElementsAre(0, -24, -48));
  EXPECT_THAT(HoursOf(LogLevel::kError, 30, -10), ElementsAre(0)) << "six hours after a warning";
}

TEST(ExpiryNoticeTest, SaysWhenAndWhatToDo) {
  ExpiryNotice notice;
  EXPECT_EQ(notice.Due(kExpiry, kExpiry - absl::Hours(1))->text,
            "the certificate expires on 2030-05-20 12:30 UTC: replace its file and send SIGHUP");
  EXPECT_EQ(notice.Due(kExpiry, kExpiry)->text,
            "the certificate has expired on 2030-05-20 12:30 UTC, and no worker can connect: replace its file and send "
            "SIGHUP");
}

TEST(ExpiryNoticeTest, SaysNothingWithoutTls) {
  EXPECT_FALSE(ExpiryNotice().Due(absl::InfiniteFuture(), kExpiry).has_value());
}

}  // namespace
}  // namespace syncbn
