// The bound on work in a row.

#include "server/rpc/burst.h"

#include "gtest/gtest.h"

namespace syncbn::rpc {
namespace {

constexpr absl::Duration kPause = absl::Milliseconds(10);

absl::Time At(int ms) { return absl::UnixEpoch() + absl::Milliseconds(ms); }

TEST(BurstTest, IsSpentAfterSoMuchUntilATurnWithoutAnEvent) {
  Burst burst(3, kPause);
  burst.Add(2, At(0));
  EXPECT_FALSE(burst.spent());
  burst.Add(1, At(0));
  EXPECT_TRUE(burst.spent());
  burst.EndTurn(/*quiet=*/false, At(1));
  EXPECT_TRUE(burst.spent());
  burst.EndTurn(/*quiet=*/true, At(1));
  EXPECT_FALSE(burst.spent());
  burst.Add(2, At(1));
  EXPECT_FALSE(burst.spent()) << "what was done before the pause counts no more";
}

TEST(BurstTest, ThePauseOfAQueueThatIsNeverQuietBeginsWithTheEndOfTheWork) {
  Burst burst(3, kPause);
  for (int ms = 0; ms <= 40; ms += 20) {
    burst.EndTurn(false, At(ms));
    EXPECT_FALSE(burst.spent()) << "too little has been done for a pause";
    burst.Add(1, At(ms));
  }
  EXPECT_TRUE(burst.spent());
  burst.EndTurn(false, At(49));
  EXPECT_TRUE(burst.spent());
  burst.EndTurn(false, At(50));
  EXPECT_FALSE(burst.spent());
}

TEST(BurstTest, QuietTurnsBeginItAnew) {
  Burst burst(3, kPause);
  for (int ms = 0; ms < 10; ++ms) {
    burst.Add(2, At(ms));
    burst.EndTurn(true, At(ms));
    EXPECT_FALSE(burst.spent()) << ms;
  }
}

}  // namespace
}  // namespace syncbn::rpc
