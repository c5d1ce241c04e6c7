// Threads that are added while gRPC keeps the others.

#include "server/rpc/relief_watch.h"

#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace syncbn::rpc {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

class ReliefWatchTest : public ::testing::Test {
 protected:
  ReliefWatchTest() { first_.there = first_.in_grpc = true; }

  // Looks after so much time of a thread. Returns what was asked for.
  std::vector<bool> Spend(LoopTurn& turn, int ms) {
    turn.cpu += absl::Milliseconds(ms);
    asked_.clear();
    watch_.Look(progress_);
    return asked_;
  }

  LoopProgress progress_;
  LoopTurn& first_ = progress_.turns[0];
  LoopTurn& second_ = progress_.turns[1];
  std::vector<bool> asked_;
  ReliefWatch watch_{[this](bool add) { asked_.push_back(add); }};
};

TEST_F(ReliefWatchTest, AThreadThatGrpcKeepsIsRelieved) {
  EXPECT_THAT(Spend(first_, 100), IsEmpty()) << "it is seen for the first time";
  EXPECT_THAT(Spend(first_, 1), IsEmpty());
  EXPECT_THAT(Spend(first_, 1), ElementsAre(true));
  ++first_.number;
  EXPECT_THAT(Spend(first_, 100), IsEmpty());
}

TEST_F(ReliefWatchTest, NotOneThatWaitsOrHandlesAnEvent) {
  Spend(first_, 1);
  EXPECT_THAT(Spend(first_, 0), IsEmpty());
  first_.in_grpc = false;
  ++first_.number;
  Spend(first_, 1);
  EXPECT_THAT(Spend(first_, 100), IsEmpty());
}

TEST_F(ReliefWatchTest, OneIsAddedOnlyIfAllAreKept) {
  Spend(first_, 1);
  EXPECT_THAT(Spend(first_, 5), ElementsAre(true));
  second_.there = second_.in_grpc = true;
  EXPECT_THAT(Spend(first_, 5), ElementsAre(false));
  EXPECT_THAT(Spend(second_, 5), ElementsAre(true));
  second_ = {};
  EXPECT_THAT(Spend(first_, 5), ElementsAre(true));
}

// Another thread in the same place, whose clock and numbers begin anew.
TEST_F(ReliefWatchTest, AThreadIsNotTakenForItsPredecessor) {
  first_.there = false;
  second_.there = second_.in_grpc = true;
  Spend(second_, 50);
  second_ = {};
  Spend(second_, 0);
  second_.there = second_.in_grpc = true;
  EXPECT_THAT(Spend(second_, 1), IsEmpty());
  EXPECT_THAT(Spend(second_, 2), ElementsAre(true));
}

}  // namespace
}  // namespace syncbn::rpc
