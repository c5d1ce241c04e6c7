// The frames that a session sends, their order, and its handling of the answers.

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "client/cc/errors.h"
#include "client/cc/session/chunks.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/cc/session/session_harness.h"
#include "vocabulary/derived_name.h"

namespace syncbn::session {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

LayerOptions BatchNorm(const std::string& name, uint32_t channels) {
  LayerOptions layer;
  layer.name = name;
  layer.channels = channels;
  return layer;
}

class RoundsTest : public ::testing::Test {
 protected:
  void SetUp() override { harness_.Join(); }

  static Options InChunksOfOne() {
    Options options;
    options.chunks = {/*least=*/1, /*most=*/1, /*under_way=*/0};
    return options;
  }

  Harness harness_{InChunksOfOne()};
};

// ---- Frames ---------------------------------------------------------------------------------------------------------

TEST_F(RoundsTest, WhatIsReadyGoesInOneFrame) {
  harness_.Sum("a");
  harness_.Sum("b");
  EXPECT_THAT(harness_.Send(), ElementsAre("declare a:1", "declare b:1", "a/0", "b/0"));
  harness_.Sum("a");
  EXPECT_THAT(harness_.Send(), IsEmpty()) << "a frame is being written";
  harness_.Written();
  EXPECT_THAT(harness_.Send(), ElementsAre("a/1")) << "the layer is known";
  harness_.Written();
  EXPECT_THAT(harness_.Send(), IsEmpty());
}

TEST_F(RoundsTest, AFullFrameLeavesTheRestToTheNext) {
  for (const char* name : {"a", "b", "c"}) harness_.Begin({name, 0, Phase::kSum}, 1, size_t{9} << 20);
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("declare a:1", "declare b:1", "a/0", "b/0"));
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("declare c:1", "c/0"));
}

TEST_F(RoundsTest, WhatIsUnansweredIsSentAgainInItsOrder) {
  harness_.Sum("b");
  harness_.Sum("a");
  harness_.SendAndWrite();
  harness_.Sum("c");
  harness_.Answer("b", 0);
  harness_.Break();
  harness_.Sum("d");
  harness_.Join();
  EXPECT_THAT(Words(harness_.frames.back()),
              ElementsAre("join", "declare a:1", "declare b:1", "declare c:1", "declare d:1"));
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("a/0", "c/0", "d/0"));
  for (const char* name : {"a", "c", "d"}) harness_.Answer(name, 0);
  EXPECT_THAT(harness_.completed, SizeIs(4));
}

TEST_F(RoundsTest, ARoundEndsOnceHoweverOftenItIsAnswered) {
  const ContributionPtr round = harness_.Sum("v");
  harness_.SendAndWrite();
  harness_.Answer("v", 0);
  harness_.Answer("v", 0);
  harness_.Answer("foreign", 5);
  EXPECT_THAT(harness_.completion_order, ElementsAre(round.get()));
}

// Sums of gradients may be negative, variances may not: what a result is depends on what it was sent as.
TEST_F(RoundsTest, AResultOfAnotherKindIsRefused) {
  ASSERT_TRUE(harness_.session().Declare(BatchNorm("bn", 1)).ok());
  const ContributionPtr forward = harness_.Begin({"bn", 0, Phase::kForward}, 1);
  harness_.SendAndWrite();
  Outcome outcome;
  outcome.key = forward->key();
  outcome.payload = Phase::kBackward;
  outcome.result.first = {1.0};
  outcome.result.second = {-1.0};
  harness_.Answer(outcome);
  ASSERT_TRUE(harness_.completed.count(forward.get()) != 0);
  EXPECT_EQ(harness_.completed.at(forward.get()).status.code(), absl::StatusCode::kInternal);
}

TEST_F(RoundsTest, ALateRoundIsAWarning) {
  ServerFrame frame;
  frame.late_rounds = {{{"v", 4, Phase::kSum}, absl::Milliseconds(10'049), {1, 2}, 5}, {}};
  harness_.Apply(harness_.session().OnFrame(std::move(frame), harness_.now()));
  EXPECT_THAT(harness_.notices,
              ElementsAre("round 4 of layer \"v\" has waited 10s for ranks 1, 2 and 3 more; rounds that wait as well: "
                          "1; it goes on until round_timeout (10m)"));
}

// ---- Sequences ------------------------------------------------------------------------------------------------------

TEST_F(RoundsTest, SequencesCountForEachLayerAndPhase) {
  ASSERT_TRUE(harness_.session().Declare(BatchNorm("bn", 1)).ok());
  const auto next = [&](Phase phase, uint64_t sequence = kNextSequence) {
    return harness_.Begin({"bn", sequence, phase}, 1)->key().sequence;
  };
  EXPECT_EQ(next(Phase::kForward), 0u);
  EXPECT_EQ(next(Phase::kForward), 1u);
  EXPECT_EQ(next(Phase::kBackward), 0u);
  EXPECT_EQ(next(Phase::kForward, 10), 10u);
  EXPECT_EQ(next(Phase::kForward, 5), 5u);
  EXPECT_EQ(next(Phase::kForward), 11u);
  EXPECT_EQ(harness_.Sum("v")->key().sequence, 0u);
  ASSERT_TRUE(harness_.session().ResumeAt(100).ok());
  EXPECT_EQ(next(Phase::kForward), 100u);
  EXPECT_EQ(harness_.Sum("v")->key().sequence, 100u);
  EXPECT_EQ(harness_.session().ResumeAt(kNextSequence).code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(harness_.session().ResumeAt(kGreatestSequence).ok());
  EXPECT_EQ(next(Phase::kForward), kGreatestSequence);
  EXPECT_EQ(harness_.Begin({"bn", kNextSequence, Phase::kForward}, 1), nullptr);
  EXPECT_EQ(harness_.last_status.code(), absl::StatusCode::kOutOfRange);
}

TEST_F(RoundsTest, ACheckpointKeepsTheNextSequences) {
  ASSERT_TRUE(harness_.session().Declare(BatchNorm("bn", 1)).ok());
  ASSERT_TRUE(harness_.session().ResumeAt(3).ok());
  harness_.Begin({"bn", kNextSequence, Phase::kForward}, 1);
  harness_.Begin({"bn", kNextSequence, Phase::kForward}, 1);
  harness_.Begin({"bn", 3, Phase::kBackward}, 1);
  harness_.Sum("v", 1, 8);
  const std::vector<RoundKey> next = harness_.session().NextRounds();
  EXPECT_THAT(next, ElementsAre(RoundKey{"", 3, Phase::kForward}, RoundKey{"bn", 5, Phase::kForward},
                                RoundKey{"bn", 4, Phase::kBackward}, RoundKey{"bn", 3, Phase::kSum},
                                RoundKey{"v", 3, Phase::kForward}, RoundKey{"v", 3, Phase::kBackward},
                                RoundKey{"v", 9, Phase::kSum}));
  Harness successor;
  ASSERT_TRUE(successor.session().ResumeAt(next[0].sequence).ok());
  for (size_t i = 1; i < next.size(); ++i) ASSERT_TRUE(successor.session().ResumeLayerAt(next[i]).ok());
  EXPECT_EQ(successor.session().NextRounds(), next);
  EXPECT_EQ(successor.Sum("v")->key().sequence, 9u);
  EXPECT_EQ(successor.Sum("w")->key().sequence, 3u);
}

TEST_F(RoundsTest, AfterAnErrorWithANumberAllBeginThere) {
  const auto failed = [](std::optional<uint64_t> resume_at) {
    ErrorDetails details{"DEADLOCK", "v", {}};
    details.resume_at = resume_at;
    return MakeStatus(absl::StatusCode::kAborted, "all wait", details);
  };
  ASSERT_TRUE(harness_.session().Declare(BatchNorm("bn", 1)).ok());
  harness_.Sum("v", 1, 8);
  harness_.Begin({"bn", kNextSequence, Phase::kForward}, 1);
  harness_.session().ResumeAfter(failed(5));
  EXPECT_EQ(harness_.Begin({"bn", kNextSequence, Phase::kForward}, 1)->key().sequence, 5u);
  EXPECT_EQ(harness_.Sum("v")->key().sequence, 9u) << "it is beyond";
  EXPECT_EQ(harness_.Sum("w")->key().sequence, 5u) << "it has had no round";
  EXPECT_EQ(harness_.Begin({"bn", 0, Phase::kBackward}, 1)->key().sequence, 0u) << "its forward round's";
  EXPECT_EQ(harness_.session().NextRounds().front().sequence, 5u) << "for a checkpoint";
  harness_.session().ResumeAfter(failed(3));
  harness_.session().ResumeAfter(failed(std::nullopt));
  harness_.session().ResumeAfter(failed(kNextSequence));
  harness_.session().ResumeAfter(absl::InternalError("none of a master's"));
  EXPECT_EQ(harness_.Sum("w")->key().sequence, 6u);
}

TEST_F(RoundsTest, WhatCannotBeResumedAtIsRefused) {
  const auto code = [&](RoundKey key) { return harness_.session().ResumeLayerAt(key).code(); };
  EXPECT_EQ(code({"", 0, Phase::kSum}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({std::string(256, 'x'), 0, Phase::kSum}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({"v", kNextSequence, Phase::kSum}), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(harness_.session().NextRounds(), SizeIs(1)) << "a refusal has changed nothing";
}

TEST_F(RoundsTest, ANewWorkerKnowsWhereItsGroupStoodWhenItJoined) {
  Harness harness;
  harness.newest_rounds = {{"bn", 6, Phase::kForward}, {"v", 5, Phase::kSum}};
  harness.Join();
  EXPECT_EQ(harness.session().newest_rounds(), harness.newest_rounds);
  const std::vector<RoundKey> before = std::exchange(harness.newest_rounds, {});
  harness.Break();
  harness.Join();
  EXPECT_EQ(harness.session().newest_rounds(), before) << "also after a reconnect";
}

TEST_F(RoundsTest, WhatCannotBeginIsRefused) {
  const auto code_of = [&](RoundKey key, size_t length) {
    EXPECT_EQ(harness_.Begin(std::move(key), length), nullptr);
    return harness_.last_status.code();
  };
  EXPECT_EQ(code_of({"bn", 0, Phase::kForward}, 1), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(code_of({"v", 0, Phase::kSum}, 0), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(harness_.session().Declare(BatchNorm("bn", 0)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(harness_.session().Declare(BatchNorm("", 1)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(harness_.session().Declare(BatchNorm(std::string(256, 'x'), 1)).code(), absl::StatusCode::kInvalidArgument);
  for (const std::string& name : {std::string("bn\xff"), std::string("\xed\xa0\x80"), std::string()}) {
    EXPECT_EQ(code_of({name, 0, Phase::kSum}, 1), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(harness_.session().Declare(BatchNorm(name, 1)).code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(harness_.session().ResumeLayerAt({name, 1, Phase::kSum}).code(), absl::StatusCode::kInvalidArgument);
  }
  code_of({"bn\xff", 0, Phase::kSum}, 1);
  EXPECT_EQ(harness_.last_status.message(), "a layer's name is not UTF-8: \"bn\\xff\"");
  ASSERT_NE(harness_.Sum("v", 3, 7), nullptr);
  EXPECT_EQ(code_of({"v", 7, Phase::kSum}, 3), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(harness_.SendAndWrite(), SizeIs(6)) << "a refusal has begun nothing";
}

// ---- Declarations ---------------------------------------------------------------------------------------------------

TEST_F(RoundsTest, ALayerThatChangesWaitsForTheNextFrame) {
  Session& session = harness_.session();
  ASSERT_TRUE(session.Declare(BatchNorm("bn", 2)).ok());
  harness_.Begin({"bn", kNextSequence, Phase::kForward}, 2);
  ASSERT_TRUE(session.Declare(BatchNorm("bn", 5)).ok());
  harness_.Begin({"bn", kNextSequence, Phase::kForward}, 5);
  harness_.Begin({"bn", 0, Phase::kBackward}, 2);
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("declare bn:2", "bn/0"));
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("declare bn:5", "bn/1", "bn/0b"));
  EXPECT_EQ(session.FindLayer("bn")->channels, 5u);
  EXPECT_EQ(session.FindLayer("other"), nullptr);
}

TEST_F(RoundsTest, ANewStreamDeclaresAsTheOldestUnansweredRoundWasBegun) {
  Session& session = harness_.session();
  for (const uint32_t channels : {2, 3, 4}) {
    ASSERT_TRUE(session.Declare(BatchNorm("bn", channels)).ok());
    harness_.Begin({"bn", kNextSequence, Phase::kForward}, channels);
    harness_.SendAndWrite();
  }
  ASSERT_TRUE(session.Declare(BatchNorm("bn", 9)).ok());
  harness_.SendAndWrite();
  harness_.Answer(RoundKey{"bn", 0, Phase::kForward}, {0, 0}, {0, 0});
  harness_.Break();
  harness_.Join();
  EXPECT_THAT(Words(harness_.frames.back()), ElementsAre("join", "declare bn:3"));
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("bn/1"));
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("declare bn:4", "bn/2"));
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("declare bn:9"));
  harness_.Break();
  harness_.Join();  // The complete set, too, is what the oldest round was begun under.
  EXPECT_THAT(Words(harness_.frames.back()), ElementsAre("join", "declare bn:3"));
}

TEST_F(RoundsTest, TheSameDeclarationIsNotRepeated) {
  ASSERT_TRUE(harness_.session().Declare(BatchNorm("bn", 2)).ok());
  ASSERT_TRUE(harness_.session().Declare(BatchNorm("bn", 2)).ok());
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("declare bn:2"));
  ASSERT_TRUE(harness_.session().Declare(BatchNorm("bn", 2)).ok());
  EXPECT_THAT(harness_.Send(), IsEmpty());
  LayerOptions layer = BatchNorm("bn", 2);
  layer.momentum = 0.5;
  ASSERT_TRUE(harness_.session().Declare(layer).ok());
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("declare bn:2"));
}

// ---- Long vectors ---------------------------------------------------------------------------------------------------

// The contributions of a frame.
std::vector<std::string> Rounds(const std::vector<std::string>& words) {
  std::vector<std::string> rounds;
  for (const std::string& word : words) {
    if (word.find("declare") != 0) rounds.push_back(word);
  }
  return rounds;
}

TEST_F(RoundsTest, ALongVectorDoesNotGoFasterThanItsAnswersCome) {
  harness_.Sum("v", 7);
  EXPECT_THAT(Rounds(harness_.SendAndWrite()), ElementsAre("v#0/0", "v#1/0", "v#2/0", "v#3/0"));
  EXPECT_THAT(harness_.SendAndWrite(), IsEmpty());
  harness_.Answer("v#1", 0);
  EXPECT_THAT(Rounds(harness_.SendAndWrite()), ElementsAre("v#4/0"));
  harness_.Answer("v#0", 0);
  harness_.Answer("v#2", 0);
  EXPECT_THAT(Rounds(harness_.SendAndWrite()), ElementsAre("v#5/0", "v#6/0"));
}

TEST(ChunksTest, TheLengthsAreTheProtocols) {
  // The table of PROTOCOL.md, section 4, and what lies on either side of its steps.
  const std::pair<size_t, size_t> lengths_and_chunks[] = {
      {1, 16384},           {16385, 16384},       {2097152, 16384},       {2097153, 32768},
      {4194304, 32768},     {4194305, 65536},     {67108864, 524288},     {67108865, 1048576},
      {134217728, 1048576}, {134217729, 1048576}, {10000000000, 1048576},
  };
  for (const auto& [length, chunk] : lengths_and_chunks) {
    EXPECT_EQ(ChunkElements(length, ChunkLimits()), chunk) << length;
  }
}

TEST(ChunksTest, OfShortOnesSoManyAreUnderWayAsMastersKeep) {
  Options options;
  options.chunks = {/*least=*/10, /*most=*/10, /*under_way=*/60};
  Harness harness{options};
  harness.Join();
  harness.Sum("v", 95);
  EXPECT_THAT(Rounds(harness.SendAndWrite()), SizeIs(6));
  harness.Answer("v#0", 0);
  harness.Answer("v#1", 0);
  EXPECT_THAT(Rounds(harness.SendAndWrite()), ElementsAre("v#6/0", "v#7/0"));
  harness.Answer("v#2", 0);
  harness.Answer("v#3", 0);
  EXPECT_THAT(Rounds(harness.SendAndWrite()), ElementsAre("v#8/0", "v#9/0")) << "the last has 5";
}

TEST_F(RoundsTest, TheNamesOfChunksHaveAtMost255Bytes) {
  const std::string name(254, 'x');
  harness_.Sum(name, 2);
  EXPECT_THAT(Rounds(harness_.SendAndWrite()),
              ElementsAre(absl::StrCat(DerivedName(name, "#0"), "/0"), absl::StrCat(DerivedName(name, "#1"), "/0")));
}

TEST_F(RoundsTest, TheFirstChunkOfAnotherVectorMayAlwaysGo) {
  harness_.Sum("x", 6);
  harness_.Sum("y", 3);
  harness_.Sum("short");
  EXPECT_THAT(Rounds(harness_.SendAndWrite()), ElementsAre("x#0/0", "x#1/0", "x#2/0", "x#3/0", "y#0/0", "short/0"));
  harness_.Answer("x#0", 0);
  EXPECT_THAT(Rounds(harness_.SendAndWrite()), IsEmpty()) << "four are under way";
  harness_.Answer("y#0", 0);
  EXPECT_THAT(Rounds(harness_.SendAndWrite()), ElementsAre("x#4/0", "y#1/0"));
}

TEST_F(RoundsTest, ANewStreamBeginsALongVectorAgain) {
  harness_.Sum("v", 7);
  harness_.SendAndWrite();
  harness_.Answer("v#0", 0);
  harness_.Break();
  harness_.Join();
  EXPECT_THAT(Rounds(harness_.SendAndWrite()), ElementsAre("v#1/0", "v#2/0", "v#3/0", "v#4/0"));
}

TEST_F(RoundsTest, WhoLeavesSendsAllOfIt) {
  harness_.Sum("v", 7);
  harness_.session().Leave("finished");
  EXPECT_THAT(Rounds(harness_.SendAndWrite()),
              ElementsAre("v#0/0", "v#1/0", "v#2/0", "v#3/0", "v#4/0", "v#5/0", "v#6/0", "leave"));
}

// ---- Blocked --------------------------------------------------------------------------------------------------------

TEST_F(RoundsTest, AWorkerOfOneThreadIsBlockedWithItsContribution) {
  const ContributionPtr round = harness_.Sum("v");
  harness_.session().Blocked(round, /*sure=*/true, harness_.now());
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("declare v:1", "v/0", "blocked v/0"));
  harness_.session().Blocked(round, true, harness_.now());
  EXPECT_THAT(harness_.Send(), IsEmpty()) << "it is said once";
}

TEST_F(RoundsTest, BlockedIsWorthAFrameOfItsOwnAfterAWhile) {
  for (const bool sure : {true, false}) {
    const ContributionPtr round = harness_.Sum("v");
    harness_.SendAndWrite();
    harness_.session().Blocked(round, sure, harness_.now());
    const absl::Duration pause = absl::Milliseconds(sure ? 20 : 200);
    EXPECT_EQ(harness_.session().NextTimer(), harness_.now() + pause);
    EXPECT_THAT(harness_.Send(), IsEmpty());
    harness_.Advance(pause - absl::Milliseconds(1));
    const size_t before = harness_.frames.size();
    harness_.Advance(absl::Milliseconds(1));
    ASSERT_EQ(harness_.frames.size(), before + 1);
    EXPECT_THAT(Words(harness_.frames.back()), ElementsAre(absl::StrCat("blocked v/", sure ? 0 : 1)));
    harness_.Written();
  }
}

TEST_F(RoundsTest, AnUnsureWorkerIsNotBlockedWithItsContribution) {
  const ContributionPtr round = harness_.Sum("v");
  harness_.session().Blocked(round, /*sure=*/false, harness_.now());
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("declare v:1", "v/0"));
}

TEST_F(RoundsTest, AWorkerIsNotBlockedWhileThereIsMoreToSend) {
  harness_.Sum("v", 6);
  const ContributionPtr last = harness_.Sum("w");
  harness_.session().Blocked(last, true, harness_.now());
  EXPECT_THAT(Rounds(harness_.SendAndWrite()), ElementsAre("v#0/0", "v#1/0", "v#2/0", "v#3/0", "w/0"));
  for (const char* name : {"v#0", "v#1", "v#2", "v#3"}) harness_.Answer(name, 0);
  EXPECT_THAT(Rounds(harness_.SendAndWrite()), ElementsAre("v#4/0", "v#5/0", "blocked w/0"));
}

TEST_F(RoundsTest, AMasterThatWasToldIsToldThatItIsOver) {
  const ContributionPtr round = harness_.Sum("v");
  harness_.session().Blocked(round, true, harness_.now());
  harness_.SendAndWrite();
  harness_.session().Unblocked(/*retract=*/true);
  const size_t before = harness_.frames.size();
  EXPECT_THAT(harness_.SendAndWrite(), IsEmpty());
  EXPECT_EQ(harness_.frames.size(), before + 1) << "an empty frame";
  harness_.SendAndWrite();
  EXPECT_EQ(harness_.frames.size(), before + 1) << "once";
}

TEST_F(RoundsTest, AMasterIsToldAgainAfterAFrameThatTookItBack) {
  const ContributionPtr first = harness_.Sum("v");
  harness_.session().Blocked(first, true, harness_.now());
  harness_.SendAndWrite();
  harness_.Sum("w");  // The wait was over before its round.
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("declare w:1", "w/0"));
  harness_.Advance(absl::Seconds(10));
  EXPECT_THAT(harness_.Send(), IsEmpty()) << "nobody waits for the first now";
  harness_.session().Blocked(first, true, harness_.now());
  harness_.Advance(absl::Milliseconds(20));
  EXPECT_THAT(Words(harness_.frames.back()), ElementsAre("blocked v/0"));
}

TEST_F(RoundsTest, AWaitThatGoesOnSaysNothingNew) {
  const ContributionPtr round = harness_.Sum("v");
  harness_.session().Blocked(round, true, harness_.now());
  harness_.SendAndWrite();
  harness_.session().Unblocked(/*retract=*/false);  // A short wait between.
  harness_.session().Blocked(round, true, harness_.now());
  const size_t before = harness_.frames.size();
  harness_.Advance(absl::Seconds(1));
  EXPECT_EQ(harness_.frames.size(), before);
  harness_.session().Unblocked(false);
  harness_.session().Unblocked(true);
  harness_.SendAndWrite();
  EXPECT_EQ(harness_.frames.size(), before + 1) << "the master still took it for blocked";
}

TEST_F(RoundsTest, ABlockedWorkerWhoseChunksMustWaitHasNoTimer) {
  harness_.Sum("v", 6);
  const ContributionPtr last = harness_.Sum("w");
  harness_.session().Blocked(last, true, harness_.now());
  harness_.SendAndWrite();
  EXPECT_GT(harness_.session().NextTimer(), harness_.now() + absl::Seconds(1)) << "it would be due for ever";
}

TEST_F(RoundsTest, NothingIsTakenBackThatWasNotSaid) {
  const ContributionPtr round = harness_.Sum("v");
  harness_.SendAndWrite();
  harness_.session().Blocked(round, true, harness_.now());
  harness_.session().Unblocked(true);
  harness_.Advance(absl::Seconds(1));
  harness_.session().Blocked(round, true, harness_.now());
  harness_.Advance(absl::Seconds(1));
  harness_.Written();
  harness_.Answer("v", 0);
  const size_t before = harness_.frames.size();
  harness_.session().Unblocked(true);
  harness_.SendAndWrite();
  EXPECT_EQ(harness_.frames.size(), before) << "the outcome has taken it back";
  EXPECT_THAT(Words(harness_.frames.back()), ElementsAre("blocked v/0"));
}

TEST_F(RoundsTest, ANewMasterIsToldAgain) {
  const ContributionPtr round = harness_.Sum("v");
  harness_.session().Blocked(round, true, harness_.now());
  harness_.SendAndWrite();
  harness_.Break();
  harness_.Join();
  EXPECT_THAT(harness_.SendAndWrite(), ElementsAre("v/0", "blocked v/0"));
}

// ---- Results --------------------------------------------------------------------------------------------------------

TEST_F(RoundsTest, ResultsThatNoMergeGivesAreRefused) {
  const double nan = std::nan(""), infinity = std::numeric_limits<double>::infinity();
  struct Case {
    NumericPolicy policy;
    int64_t count;
    std::vector<double> mean, var;
    const char* text;  // Empty: accepted.
  };
  const std::vector<Case> cases = {
      {NumericPolicy::kRefuse, 6, {1, -2}, {1, 0}, ""},
      {NumericPolicy::kPropagate, 6, {1, nan}, {1, infinity}, ""},
      {NumericPolicy::kRefuse, -1, {1, 0}, {1, 1}, "count of -1"},
      {NumericPolicy::kRefuse, 6, {1, nan}, {1, 1}, "mean of nan for channel 1"},
      {NumericPolicy::kRefuse, 6, {-infinity, 0}, {1, 1}, "mean of -inf for channel 0"},
      {NumericPolicy::kRefuse, 6, {1, 0}, {1, infinity}, "variance of inf for channel 1"},
      {NumericPolicy::kPropagate, 6, {1, 0}, {1, -infinity}, "variance of -inf for channel 1"},
      {NumericPolicy::kRefuse, 6, {1}, {1, 1}, "1 and 2 elements"},
      {NumericPolicy::kRefuse, 6, {1, 1}, {}, "2 and 0 elements"},
      {NumericPolicy::kRefuse, 6, {1, 1, 1}, {1, 1, 1}, "3 and 3 elements"},
  };
  for (const Case& c : cases) {
    LayerOptions layer = BatchNorm("bn", 2);
    layer.numeric_policy = c.policy;
    ASSERT_TRUE(harness_.session().Declare(layer).ok());
    const ContributionPtr round = harness_.Begin({"bn", kNextSequence, Phase::kForward}, 2);
    harness_.SendAndWrite();
    Outcome outcome;
    outcome.key = round->key();
    outcome.result.count = c.count;
    outcome.result.first = c.mean;
    outcome.result.second = c.var;
    harness_.Answer(outcome);
    const Complete& complete = harness_.completed.at(round.get());
    EXPECT_EQ(complete.status.ok(), std::string(c.text).empty()) << complete.status;
    if (complete.status.ok()) continue;
    EXPECT_EQ(complete.status.code(), absl::StatusCode::kInternal);
    EXPECT_THAT(std::string(complete.status.message()), AllOf(HasSubstr(c.text), HasSubstr("\"bn\"")));
  }
}

TEST_F(RoundsTest, AnEmptyBackwardBatchKnowsNoLength) {
  ASSERT_TRUE(harness_.session().Declare(BatchNorm("bn", 2)).ok());
  const ContributionPtr round = harness_.Begin({"bn", 0, Phase::kBackward}, 0);
  harness_.SendAndWrite();
  harness_.Answer(RoundKey{"bn", 0, Phase::kBackward}, {1, 2, 3}, {4, 5, 6});
  EXPECT_TRUE(harness_.completed.at(round.get()).status.ok());
  EXPECT_THAT(harness_.completed.at(round.get()).result.second, ElementsAre(4, 5, 6));
}

TEST_F(RoundsTest, AFailedRoundKeepsTheStatusOfTheMaster) {
  const ContributionPtr round = harness_.Sum("v");
  harness_.SendAndWrite();
  Outcome outcome;
  outcome.key = round->key();
  outcome.status = MakeStatus(absl::StatusCode::kUnavailable, "lost", {"WORKER_LOST", "v", {1}});
  harness_.Answer(outcome);
  EXPECT_EQ(harness_.completed.at(round.get()).status, outcome.status);
  EXPECT_FALSE(harness_.ended.has_value());
}

TEST_F(RoundsTest, AFrameThatNothingPendingCanFillIsNotWorthReading) {
  Session& session = harness_.session();
  EXPECT_TRUE(session.CheckFrameLength(size_t{32} << 20).ok());
  const absl::Status status = session.CheckFrameLength((size_t{32} << 20) + 1);
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), HasSubstr("takes 33554432 at most"));
  harness_.Sum("v");
  EXPECT_TRUE(session.CheckFrameLength((size_t{32} << 20) + 1).ok());
  harness_.Apply(session.OnBadFrame(status));
  EXPECT_EQ(*harness_.ended, status);
}

}  // namespace
}  // namespace syncbn::session
