// The queues of streams that wait: whose turn it is, and who goes on when no stream lags any more.

#include "server/rpc/lanes.h"

#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace syncbn::rpc {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

TEST(LanesTest, GroupsTakeTurns) {
  Lanes lanes;
  Lane* const first = lanes.Enter({"job", "first"});
  Lane* const second = lanes.Enter({"job", "second"});
  EXPECT_EQ(lanes.Enter({"job", "first"}), first);
  EXPECT_FALSE(lanes.has_backlog());
  for (const core::StreamId id : {1, 2, 3}) lanes.AddToBacklog(*first, id);
  lanes.AddToBacklog(*second, 4);
  std::vector<core::StreamId> turns;
  while (lanes.has_backlog()) turns.push_back(lanes.NextTurn());
  EXPECT_THAT(turns, ElementsAre(1, 4, 2, 3));
}

TEST(LanesTest, StreamsWaitUntilNoneLags) {
  Lanes lanes;
  Lane* const lane = lanes.Enter({"job", "group"});
  lanes.Enter({"job", "group"});
  lane->lagging = 2;
  lane->waiting = {7, 8};
  EXPECT_THAT(lanes.CatchUp(*lane), IsEmpty());
  EXPECT_THAT(lanes.CatchUp(*lane), ElementsAre(7, 8));
  EXPECT_THAT(lane->waiting, IsEmpty());
}

TEST(LanesTest, ALaneGoesWithItsLastStream) {
  Lanes lanes;
  Lane* const lane = lanes.Enter({"job", "group"});
  lanes.Enter({"job", "group"});
  lanes.AddToBacklog(*lane, 1);
  lanes.Leave(lane);
  EXPECT_TRUE(lanes.has_backlog());
  lanes.Leave(lane);
  EXPECT_FALSE(lanes.has_backlog());
  EXPECT_EQ(lanes.Enter({"job", "group"})->streams, 1u);
}

TEST(LanesDeathTest, ALaneThatLagsIsNotLeft) {
  Lanes lanes;
  Lane* const lane = lanes.Enter({"job", "group"});
  lane->lagging = 1;
  EXPECT_DEATH(lanes.Leave(lane), "lags");
  EXPECT_DEATH(lanes.NextTurn(), "has_backlog");
}

}  // namespace
}  // namespace syncbn::rpc
