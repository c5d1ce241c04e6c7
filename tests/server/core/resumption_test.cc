// The number at which members go on after a round that lacked some of them: the same for all, and beyond all in use.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/coordinator.h"
#include "server/core/error.h"
#include "tests/testing/engine.h"

namespace syncbn::core {
namespace {

using testing::BatchNormLayer;
using testing::Engine;
using testing::Forward;
using testing::Numbers;
using testing::ReasonOf;

const Numbers kNumbers{4, {1.0}, {0.5}};

class ResumptionTest : public ::testing::Test {
 protected:
  core::Join MakeJoin(Rank rank, bool resumes = true) const {
    core::Join join = testing::MakeJoin(rank, world_size_);
    join.resumes = resumes;
    join.config = config_;
    return join;
  }
  static StreamId Seat(Engine& engine, const core::Join& join) {
    const StreamId stream = engine.Join(join);
    engine.Declare(stream, {BatchNormLayer("a", 1), BatchNormLayer("b", 1)});
    return stream;
  }
  StreamId Join(Rank rank, bool resumes = true) { return Seat(engine_, MakeJoin(rank, resumes)); }
  // The rank comes from an earlier master.
  StreamId ComeBack(Engine& engine, Rank rank) const {
    core::Join join = MakeJoin(rank);
    join.run_id = 77;
    join.incarnation = 5;
    return Seat(engine, join);
  }
  void JoinAll(uint32_t world_size) {
    world_size_ = world_size;
    for (Rank rank = 0; rank < world_size; ++rank) workers_.push_back(Join(rank));
  }
  void Contribute(Rank rank, const RoundKey& key) { engine_.Contribute(workers_[rank], key, kNumbers); }
  void Block(Rank rank, const RoundKey& key) { engine_.ContributeAndBlock(workers_[rank], key, kNumbers); }
  // Returns the number that the rank was told with the key's one outcome, which has to be this failure.
  std::optional<uint64_t> Told(Rank rank, const RoundKey& key, const std::string& reason) const {
    const auto outcome = engine_.Outcome(workers_[rank], key);
    EXPECT_EQ(ReasonOf(*outcome), reason);
    return outcome->error.has_value() ? outcome->error->resume_at : std::nullopt;
  }

  uint32_t world_size_ = 2;
  GroupConfig config_;
  Engine engine_;
  std::vector<StreamId> workers_;
};

TEST_F(ResumptionTest, ADeadlockTellsAllOneNumberBeyondThoseInUse) {
  JoinAll(3);
  Contribute(1, Forward("a", 9));  // Nobody waits for it.
  Block(0, Forward("a", 4));
  Block(1, Forward("b", 3));
  Block(2, Forward("b", 3));
  EXPECT_EQ(Told(0, Forward("a", 4), kDeadlock), 10u);
  EXPECT_EQ(Told(1, Forward("b", 3), kDeadlock), 10u);
  EXPECT_EQ(Told(2, Forward("b", 3), kDeadlock), 10u);
  // One that contributes later is told the same.
  Contribute(0, Forward("b", 3));
  EXPECT_EQ(Told(0, Forward("b", 3), kDeadlock), 10u);
}

TEST_F(ResumptionTest, ATimeoutTellsItWhereAMissingRankWaitsElsewhere) {
  JoinAll(3);
  Contribute(0, Forward("b", 3));
  Contribute(1, Forward("b", 3));
  engine_.Advance(absl::Minutes(5));
  Contribute(2, Forward("a", 4));
  engine_.Advance(absl::Minutes(5));
  EXPECT_EQ(Told(0, Forward("b", 3), kRoundTimeout), 5u);
  EXPECT_EQ(Told(1, Forward("b", 3), kRoundTimeout), 5u);
  // One that contributes later is told the same.
  Contribute(2, Forward("b", 3));
  EXPECT_EQ(Told(2, Forward("b", 3), kRoundTimeout), 5u);
}

TEST_F(ResumptionTest, ALossTellsItWhereTheLostRankWaitedElsewhere) {
  JoinAll(2);
  Contribute(0, Forward("a", 4));
  engine_.Close(workers_[1]);
  engine_.Advance(absl::Seconds(1));
  EXPECT_EQ(Told(0, Forward("a", 4), kWorkerLost), std::nullopt);
  workers_[1] = Join(1);
  Contribute(1, Forward("b", 6));
  engine_.Close(workers_[1]);
  Contribute(0, Forward("a", 5));
  engine_.Advance(absl::Seconds(1));
  EXPECT_EQ(Told(0, Forward("a", 5), kWorkerLost), 7u);
}

TEST_F(ResumptionTest, ARestartTellsItWhereThePredecessorWaitedElsewhere) {
  JoinAll(2);
  Contribute(0, Forward("a", 4));
  Contribute(1, Forward("b", 4));
  engine_.Close(workers_[1]);
  workers_[1] = Join(1);
  EXPECT_EQ(Told(0, Forward("a", 4), kWorkerLost), 5u);
  Contribute(0, Forward("b", 4));
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[0], Forward("b", 4))), "") << "a successor has not undone it";
}

TEST_F(ResumptionTest, ALackOfWorkersTellsItWhereAMissingRankWaitsElsewhere) {
  config_.missing_policy = MissingPolicy::kProceed;
  config_.min_workers = 2;
  JoinAll(2);
  Contribute(0, Forward("a", 4));
  engine_.Advance(absl::Minutes(10));
  EXPECT_EQ(Told(0, Forward("a", 4), kTooFewWorkers), std::nullopt);
  Contribute(0, Forward("a", 5));
  engine_.Advance(absl::Minutes(5));
  Contribute(1, Forward("b", 4));
  engine_.Advance(absl::Minutes(5));
  EXPECT_EQ(Told(0, Forward("a", 5), kTooFewWorkers), 6u);
}

// ---- Ranks that are late, and have begun as many rounds -------------------------------------------------------------

TEST_F(ResumptionTest, OneThatSleepsAndComesLateGoesOnWithTheOthers) {
  JoinAll(3);
  Contribute(0, Forward("a", 4));
  Contribute(2, Forward("a", 4));
  engine_.Advance(absl::Minutes(10));
  EXPECT_EQ(Told(0, Forward("a", 4), kRoundTimeout), std::nullopt);
  Contribute(0, Forward("b", 4));
  Contribute(2, Forward("b", 4));
  Contribute(1, Forward("a", 4));
  EXPECT_EQ(Told(1, Forward("a", 4), kRoundTimeout), std::nullopt);
  Contribute(1, Forward("b", 4));
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[1], Forward("b", 4))), "");
}

TEST_F(ResumptionTest, OneThatLeavesALayerOutGoesOnWithTheOthers) {
  JoinAll(2);
  Contribute(0, Forward("a", 4));
  engine_.Advance(absl::Minutes(10));
  EXPECT_EQ(Told(0, Forward("a", 4), kRoundTimeout), std::nullopt);
  Contribute(0, Forward("b", 4));
  Contribute(1, Forward("b", 4));
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[1], Forward("b", 4))), "");
}

TEST_F(ResumptionTest, AnAnswerIsNoLongerAwaited) {
  JoinAll(2);
  Contribute(1, Forward("b", 3));
  engine_.Contribute(workers_[1], Forward("b", 3), kNumbers);  // The same once more.
  Contribute(0, Forward("b", 3));
  Contribute(0, Forward("a", 3));
  engine_.Advance(absl::Minutes(10));
  EXPECT_EQ(Told(0, Forward("a", 3), kRoundTimeout), std::nullopt);
}

TEST_F(ResumptionTest, ARoundBehindTheNewestNumberTellsIt) {
  JoinAll(2);
  Block(0, Forward("a", 7));
  Block(1, Forward("b", 3));
  EXPECT_EQ(Told(1, Forward("b", 3), kDeadlock), 8u);
  Contribute(1, Forward("b", 4));  // Begun ahead, before its sender was told.
  engine_.Advance(absl::Minutes(10));
  EXPECT_EQ(Told(1, Forward("b", 4), kRoundTimeout), 8u);
  Contribute(0, Forward("a", 8));
  engine_.Advance(absl::Minutes(10));
  EXPECT_EQ(Told(0, Forward("a", 8), kRoundTimeout), std::nullopt);
}

TEST_F(ResumptionTest, AnErrorOfANumberTellsNone) {
  JoinAll(2);
  engine_.Contribute(workers_[0], Forward("a", 0), {4, {1.0}, {-0.5}});
  EXPECT_EQ(Told(0, Forward("a", 0), kInvalidContribution), std::nullopt);
}

TEST_F(ResumptionTest, NoNumberBeforeAllHaveSaidThatTheyTakeIt) {
  workers_ = {Join(0), Join(1, /*resumes=*/false)};
  Block(0, Forward("a", 1));
  Block(1, Forward("b", 0));
  EXPECT_EQ(Told(0, Forward("a", 1), kDeadlock), std::nullopt);
  // Its successor does.
  engine_.Close(workers_[1]);
  workers_[1] = Join(1);
  Block(0, Forward("a", 2));
  Block(1, Forward("b", 1));
  EXPECT_EQ(Told(0, Forward("a", 2), kDeadlock), 3u);
  // One that has left does not count.
  engine_.Close(workers_[1]);
  workers_[1] = Join(1, /*resumes=*/false);
  Contribute(0, Forward("a", 3));
  engine_.Leave(workers_[1]);
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[0], Forward("a", 3))), "");
}

TEST_F(ResumptionTest, NoNumberWhileARankHasNeverBeenHere) {
  world_size_ = 3;
  workers_ = {Join(0), Join(1)};
  Contribute(0, Forward("a", 0));
  Contribute(1, Forward("b", 0));
  engine_.Advance(absl::Minutes(10));
  EXPECT_EQ(Told(0, Forward("a", 0), kRoundTimeout), std::nullopt);
}

TEST_F(ResumptionTest, RoundsThatEndTogetherTellOneNumber) {
  JoinAll(2);
  Contribute(0, Forward("a", 4));
  Contribute(0, Forward("b", 6));
  Contribute(1, Forward("a", 3));
  engine_.Advance(absl::Minutes(10));
  EXPECT_EQ(Told(0, Forward("a", 4), kRoundTimeout), 7u);
  EXPECT_EQ(Told(0, Forward("b", 6), kRoundTimeout), 7u);
  EXPECT_EQ(Told(1, Forward("a", 3), kRoundTimeout), 7u);
}

TEST_F(ResumptionTest, OneThatIsBehindIsToldWhereOthersWait) {
  JoinAll(2);
  Contribute(1, Forward("b", 3));
  engine_.Advance(absl::Minutes(5));
  Contribute(0, Forward("a", 4));
  engine_.Advance(absl::Minutes(5));
  EXPECT_EQ(Told(1, Forward("b", 3), kRoundTimeout), 5u);
  Contribute(1, Forward("a", 5));
  engine_.Advance(absl::Minutes(5));
  EXPECT_EQ(Told(0, Forward("a", 4), kRoundTimeout), 5u) << "a greater number would lead past the other";
  Contribute(0, Forward("a", 5));
  EXPECT_EQ(ReasonOf(*engine_.Outcome(workers_[0], Forward("a", 5))), "");
}

TEST_F(ResumptionTest, ANumberThatIsFarBeyondTheOthersDoesNotCount) {
  JoinAll(3);
  constexpr uint64_t kFar = (uint64_t{1} << 40) + 100;
  Contribute(2, Forward("a", kFar));
  Block(0, Forward("a", 4));
  Block(1, Forward("b", 3));
  Block(2, Forward("a", UINT64_MAX - 1));
  EXPECT_EQ(Told(0, Forward("a", 4), kDeadlock), 5u);
  // Less far is believed.
  engine_.Close(workers_[2]);
  Block(0, Forward("a", 5));
  Block(1, Forward("b", 5 + (uint64_t{1} << 40)));
  engine_.Advance(absl::Seconds(1));
  EXPECT_EQ(Told(0, Forward("a", 5), kWorkerLost), 6 + (uint64_t{1} << 40));
}

TEST_F(ResumptionTest, NoNumberAfterTheLast) {
  JoinAll(2);
  Block(0, Forward("a", UINT64_MAX - 1));
  Block(1, Forward("b", UINT64_MAX));
  EXPECT_EQ(Told(0, Forward("a", UINT64_MAX - 1), kDeadlock), std::nullopt);
}

TEST_F(ResumptionTest, AMasterWithoutMemoryTakesNumbersFromReports) {
  workers_ = {ComeBack(engine_, 0), ComeBack(engine_, 1)};
  FrameReceived frame;
  frame.stream = workers_[0];
  Error deadlock = DeadlockError("all wait", {1});
  deadlock.resume_at = 8;
  EndedReport report;
  report.key = Forward("a", 6);
  report.error = deadlock;
  frame.ended = {report};
  frame.forgotten = {Forward("b", 20)};
  frame.caught_up = true;
  engine_.On(frame);
  Contribute(1, Forward("a", 6));
  EXPECT_EQ(Told(1, Forward("a", 6), kDeadlock), 8u) << "what the other was told";
  FrameReceived rest;
  rest.stream = workers_[1];
  rest.caught_up = true;
  engine_.On(rest);
  Block(0, Forward("a", 7));
  Block(1, Forward("b", 21));
  EXPECT_EQ(Told(0, Forward("a", 7), kDeadlock), 22u);
}

TEST_F(ResumptionTest, AMasterWithoutMemoryTellsAgainWhatWasTold) {
  workers_ = {ComeBack(engine_, 0), ComeBack(engine_, 1)};
  EndedReport report;
  report.key = Forward("a", 6);
  report.error = DeadlockError("all wait", {1});
  report.error->resume_at = 8;
  for (const StreamId stream : workers_) {
    FrameReceived frame;
    frame.stream = stream;
    if (stream == workers_[0]) frame.ended = {report};
    frame.caught_up = true;
    engine_.On(frame);
  }
  Contribute(1, Forward("b", 7));
  engine_.Advance(absl::Minutes(10));
  EXPECT_EQ(Told(1, Forward("b", 7), kRoundTimeout), 8u);
}

TEST_F(ResumptionTest, AReportedNumberIsNotBelievedFarBeyondItsRound) {
  const auto told_after = [this](uint64_t resume_at) {
    Engine engine;
    const StreamId streams[] = {ComeBack(engine, 0), ComeBack(engine, 1)};
    FrameReceived frame;
    frame.stream = streams[0];
    EndedReport report;
    report.key = Forward("a", 6);
    report.error = DeadlockError("all wait", {1});
    report.error->resume_at = resume_at;
    frame.ended = {report};
    engine.On(frame);
    engine.Contribute(streams[1], Forward("a", 6), kNumbers);
    return engine.Outcome(streams[1], Forward("a", 6))->error->resume_at;
  };
  constexpr uint64_t kFar = (uint64_t{1} << 40) + 6;
  EXPECT_EQ(told_after(kFar), kFar);
  EXPECT_EQ(told_after(kFar + 1), std::nullopt);
}

// ---- Agreement by deadlines alone -----------------------------------------------------------------------------------

// A program of two layers a step, that goes on with the next step after an error, and never says that it is blocked.
class Program {
 public:
  Program(Engine* engine, StreamId stream) : engine_(*engine), stream_(stream) {}

  // Raises between the layers of its present step, and begins the next one.
  void Raise() { Begin(0); }
  // Looks for the outcome that it waits for, and goes on.
  void Look() {
    if (engine_.Outcomes(stream_, waits_for_).empty()) return;
    const auto outcome = engine_.Outcome(stream_, waits_for_);
    if (outcome->error.has_value()) {
      ++failed_;
      for (uint64_t& next : next_) next = std::max(next, outcome->error->resume_at.value_or(0));
      return Begin(0);
    }
    if (layer_ == 1) ++completed_;
    Begin(1 - layer_);
  }
  void Begin(int layer) {
    layer_ = layer;
    waits_for_ = Forward(layer == 0 ? "a" : "b", next_[layer]++);
    engine_.Contribute(stream_, waits_for_, kNumbers);
  }
  int failed() const { return failed_; }
  int completed() const { return completed_; }

 private:
  Engine& engine_;
  const StreamId stream_;
  uint64_t next_[2] = {0, 0};
  int layer_ = 0;
  RoundKey waits_for_;
  int failed_ = 0;
  int completed_ = 0;
};

// Lets `world_size` programs run, of which the first `raising` leave a step out, `apart` after each other. Returns
// them after an hour's deadlines.
std::vector<Program> RunApart(Engine* engine, const std::vector<StreamId>& workers, size_t raising,
                              absl::Duration apart) {
  std::vector<Program> programs;
  for (const StreamId stream : workers) programs.emplace_back(engine, stream);
  for (Program& program : programs) program.Begin(0);
  // The first layer of the first step alone completes: those who raise do not begin the second.
  for (size_t i = raising; i < programs.size(); ++i) programs[i].Look();
  for (size_t i = 0; i < raising; ++i) {
    engine->Advance(apart);
    programs[i].Raise();
  }
  for (int minute = 0; minute < 60; ++minute) {
    engine->Advance(absl::Minutes(1));
    for (int turn = 0; turn < 4; ++turn) {
      for (Program& program : programs) program.Look();
    }
  }
  return programs;
}

// World size and how many raise, of whom somebody is left behind; minutes between them.
using Apart = std::tuple<std::pair<uint32_t, size_t>, int>;
class ApartTest : public ResumptionTest, public ::testing::WithParamInterface<Apart> {};

TEST_P(ApartTest, DeadlinesLeadTogether) {
  const auto [sizes, minutes] = GetParam();
  const auto [world_size, raising] = sizes;
  JoinAll(world_size);
  for (const Program& program : RunApart(&engine_, workers_, raising, absl::Minutes(minutes))) {
    // Each that stays away for longer than the deadline costs the others a step more.
    EXPECT_LE(program.failed(), minutes < 10 ? 1 : 3);
    EXPECT_GT(program.completed(), 10);
  }
}

INSTANTIATE_TEST_SUITE_P(All, ApartTest,
                         ::testing::Combine(::testing::ValuesIn(std::vector<std::pair<uint32_t, size_t>>{
                                                {2, 1}, {3, 1}, {3, 2}, {4, 1}, {4, 2}, {4, 3}}),
                                            ::testing::Values(0, 1, 4, 9, 11, 25)));

}  // namespace
}  // namespace syncbn::core
