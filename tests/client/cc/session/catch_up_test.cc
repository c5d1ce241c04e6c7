// The frames of a worker that comes to a master without memory of earlier rounds.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "client/cc/errors.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/cc/session/session_harness.h"

namespace syncbn::session {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

class CatchUpTest : public ::testing::Test {
 protected:
  CatchUpTest() { harness_.memory = 1; }

  // Contributes to a sum and hears the outcome.
  void Complete(const std::string& name, uint64_t digest = 9) {
    const ContributionPtr sum = harness_.Sum(name);
    harness_.SendAndWrite();
    Outcome outcome;
    outcome.key = sum->key();
    outcome.payload = Phase::kSum;
    outcome.result.first = {1.0};
    outcome.digest = digest;
    harness_.Answer(outcome);
  }
  // Comes back to a master with this memory.
  void Return(uint64_t memory) {
    harness_.memory = memory;
    harness_.Break();
    harness_.Join();
  }

  void HearOfLeaves(std::vector<uint32_t> left, uint64_t version = 0) {
    harness_.left = left;
    ServerFrame frame;
    frame.membership = Membership{1, std::move(left), version};
    harness_.Apply(harness_.session().OnFrame(std::move(frame), harness_.now()));
  }

  Harness harness_;
};

TEST_F(CatchUpTest, TheSameMasterIsToldNothingAgain) {
  harness_.Join();
  Complete("v");
  harness_.Sum("w");
  harness_.SendAndWrite();
  Return(1);
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("w/0", "caught up"));
  EXPECT_THAT(harness_.Send(), IsEmpty());
}

TEST_F(CatchUpTest, AnotherMasterIsToldWhatHasEndedInItsPlace) {
  harness_.Join();
  Complete("v");
  harness_.Sum("w");
  harness_.SendAndWrite();
  Complete("v");
  Return(2);
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("repeat v/0", "w/0", "repeat v/1", "caught up"));
  EXPECT_EQ(harness_.frames.back().contributions.front()->repeats()->digest, 9u);
  Return(3);
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("repeat v/0", "w/0", "repeat v/1", "caught up"));
}

TEST_F(CatchUpTest, ItSaysThatItHasCaughtUpEvenWithNothing) {
  harness_.Join();
  EXPECT_THAT(harness_.Send(), IsEmpty()) << "a new worker has nothing to catch up with";
  Return(2);
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("caught up"));
}

TEST_F(CatchUpTest, AMasterWithoutAMemoryIsToldNothing) {
  harness_.Join();
  Complete("v");
  Return(0);
  EXPECT_THAT(harness_.Send(), IsEmpty());
}

TEST_F(CatchUpTest, FailuresAreReportedAndRefusalsAreNot) {
  harness_.Join();
  for (const bool refused : {false, true}) {
    const ContributionPtr sum = harness_.Sum("v");
    harness_.SendAndWrite();
    Outcome outcome;
    outcome.key = sum->key();
    outcome.status = absl::UnavailableError("lost");
    outcome.refused = refused;
    harness_.Answer(outcome);
  }
  Return(2);
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("report v/0", "caught up"));
}

TEST_F(CatchUpTest, TheNewestRoundsOfEachLayerAreHeld) {
  harness_.Join();
  Complete("w");
  for (int i = 0; i < 20; ++i) Complete("v");
  Return(2);
  const std::vector<std::string> words = harness_.SendAndWrite();
  EXPECT_EQ(words.size(), 1u + 16 + 1);
  EXPECT_EQ(words.front(), "repeat w/0");
  EXPECT_EQ(words[1], "repeat v/4");
  ASSERT_EQ(harness_.frames.back().forgotten.size(), 1u);
  EXPECT_EQ(harness_.frames.back().forgotten[0].sequence, 3u);
}

TEST(RoundLogTest, BytesAreBounded) {
  Options options;
  options.log.bytes = 3000;
  Harness harness(options);
  harness.memory = 1;
  harness.Join();
  for (int i = 0; i < 5; ++i) {
    harness.Begin({"v", kNextSequence, Phase::kSum}, 1, /*bytes=*/600);
    harness.SendAndWrite();
    harness.Answer("v", i);
  }
  harness.memory = 2;
  harness.Break();
  harness.Join();
  EXPECT_THAT(harness.SendAndWrite(), ElementsAre("repeat v/3", "repeat v/4", "caught up"));
}

TEST(RoundLogTest, AForwardRoundIsHeldUntilItsBackwardRoundHasEnded) {
  Options options;
  options.log.rounds = 1;
  Harness harness(options);
  harness.memory = 1;
  harness.Join();
  LayerOptions layer;
  layer.name = "a";
  layer.channels = 1;
  ASSERT_TRUE(harness.session().Declare(layer).ok());
  const auto complete = [&harness](Phase phase, uint64_t sequence) {
    harness.Begin({"a", sequence, phase}, 1);
    harness.SendAndWrite();
    Outcome outcome;
    outcome.key = {"a", sequence, phase};
    outcome.payload = phase;
    outcome.result.first = outcome.result.second = {1.0};
    outcome.result.backward_required = phase == Phase::kForward;
    harness.Answer(outcome);
  };
  const auto held = [&harness] {
    ++harness.memory;
    harness.Break();
    harness.Join();
    return harness.SendAndWrite();
  };
  for (uint64_t sequence = 0; sequence < 3; ++sequence) complete(Phase::kForward, sequence);
  EXPECT_THAT(held(), ElementsAre("repeat a/0", "repeat a/1", "repeat a/2", "caught up"));
  complete(Phase::kBackward, 2);
  complete(Phase::kBackward, 1);
  EXPECT_THAT(held(), ElementsAre("repeat a/0", "repeat a/1", "repeat a/1b", "caught up"));
}

TEST_F(CatchUpTest, WhoHasLeftAndWhetherARoundHasEndedIsSaid) {
  harness_.Join();
  HearOfLeaves({2});
  Return(2);
  const auto join = [this]() -> const Join& {
    for (auto written = harness_.frames.rbegin();; ++written) {
      if (written->join.has_value()) return *written->join;
    }
  };
  EXPECT_THAT(join().left_ranks, ElementsAre(2));
  EXPECT_TRUE(join().without_outcome);
  harness_.SendAndWrite();
  Complete("v");
  Return(3);
  EXPECT_FALSE(join().without_outcome);
}

TEST_F(CatchUpTest, ARankThatComesBackToLeaveAgainHadLeftBefore) {
  harness_.Join();
  HearOfLeaves({2});
  harness_.Sum("v");
  harness_.SendAndWrite();
  Return(2);
  HearOfLeaves({});   // It is back,
  HearOfLeaves({2});  // and has not been told the outcome in between, which would have been told here before.
  Return(3);
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("v/0", "caught up"));
  EXPECT_THAT(harness_.frames.back().left_ranks, ElementsAre(2));
  HearOfLeaves({});
  Return(4);  // The outcome may have been told to it, and lost for this worker.
  HearOfLeaves({2});
  Return(5);
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("v/0", "caught up"));
  EXPECT_THAT(harness_.frames.back().left_ranks, IsEmpty());
}

TEST_F(CatchUpTest, WhoHadLeftBeforeARoundEndedIsSaid) {
  harness_.Join();
  harness_.Sum("v");
  harness_.SendAndWrite();
  HearOfLeaves({2});  // It would have heard the outcome before, if rank 2 had been told it.
  harness_.Sum("w");
  harness_.SendAndWrite();
  EXPECT_THAT(harness_.frames.back().left_ranks, IsEmpty()) << "this master knows";
  Return(2);
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("v/0", "w/0", "caught up"));
  EXPECT_THAT(harness_.frames.back().left_ranks, ElementsAre(2));
  HearOfLeaves({1, 2});  // The outcomes may be on their way behind this.
  harness_.Sum("x");
  harness_.SendAndWrite();
  EXPECT_THAT(harness_.frames.back().left_ranks, IsEmpty());
  Return(3);
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("v/0", "w/0"));
  EXPECT_THAT(harness_.frames.back().left_ranks, ElementsAre(2));
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("x/0", "caught up"));
  EXPECT_THAT(harness_.frames.back().left_ranks, ElementsAre(1, 2));
  HearOfLeaves({1});  // Rank 2 is back.
  Return(4);
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("v/0", "w/0"));
  EXPECT_THAT(harness_.frames.back().left_ranks, IsEmpty());
}

// A worker that leaves waits for this, because it may hold what others have not been told the end of.
TEST_F(CatchUpTest, ALeaveThatWasReadIsConfirmedAtOnce) {
  harness_.Join();
  HearOfLeaves({}, 4);
  EXPECT_THAT(harness_.SendAndWrite(), IsEmpty()) << "nobody has left";
  HearOfLeaves({2}, 5);
  const size_t before = harness_.frames.size();
  harness_.SendAndWrite();
  ASSERT_EQ(harness_.frames.size(), before + 1);
  EXPECT_EQ(harness_.frames.back().membership_read, 5u);
  EXPECT_THAT(harness_.SendAndWrite(), IsEmpty());
  EXPECT_EQ(harness_.frames.size(), before + 1) << "once";
  harness_.session().Leave("finished");
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("leave"));
  HearOfLeaves({1, 2}, 6);
  harness_.SendAndWrite();
  EXPECT_EQ(harness_.frames.size(), before + 2) << "nothing follows a leave";
}

TEST_F(CatchUpTest, AnyFrameTellsWhichMembershipWasRead) {
  harness_.Join();
  ServerFrame frame;
  frame.membership = Membership{2, {}, 3};
  harness_.Apply(harness_.session().OnFrame(std::move(frame), harness_.now()));
  harness_.Sum("v");
  harness_.SendAndWrite();
  EXPECT_EQ(harness_.frames.back().membership_read, 3u);
  harness_.Sum("v");
  harness_.SendAndWrite();
  EXPECT_EQ(harness_.frames.back().membership_read, 0u) << "the master knows";
}

TEST_F(CatchUpTest, AMemberMayBeToldAnotherRun) {
  harness_.Join();
  ServerFrame frame;
  frame.joined = Joined{1, 78, absl::Seconds(1), Membership{1, {}}, 1, {}};
  harness_.Apply(harness_.session().OnFrame(std::move(frame), harness_.now()));
  Return(1);
  for (const ClientFrame& written : harness_.frames) {
    if (!written.join.has_value() || written.join->run_id == 0) continue;
    EXPECT_EQ(written.join->run_id, 78u);
  }
}

}  // namespace
}  // namespace syncbn::session
