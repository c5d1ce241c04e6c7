// Layers that all workers redeclare: with another width or eps, or a sum of another length.

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/coordinator.h"
#include "server/core/error.h"
#include "tests/testing/engine.h"

namespace syncbn::core {
namespace {

using testing::Backward;
using testing::BatchNormLayer;
using ::testing::ElementsAre;
using testing::Engine;
using testing::Forward;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::MakeJoin;
using testing::Numbers;
using testing::ReasonOf;
using testing::Sum;
using testing::SumLayer;

// Numbers of `channels` channels, with count 4 and mean and M2 that depend on the rank.
Numbers Moments(uint32_t channels, Rank rank = 0) {
  return {4, std::vector<double>(channels, 1.0 + rank), std::vector<double>(channels, 0.5)};
}
Numbers Vector(uint32_t elements, double value) { return {0, std::vector<double>(elements, value), {}}; }
Numbers Gradients(uint32_t channels) {
  return {0, std::vector<double>(channels, 2.0), std::vector<double>(channels, 3.0)};
}

std::vector<StreamId> JoinAll(Engine& engine, uint32_t world_size, const LayerSpec& layer,
                              const GroupConfig& config = GroupConfig()) {
  std::vector<StreamId> streams;
  for (Rank rank = 0; rank < world_size; ++rank) {
    Join join = MakeJoin(rank, world_size);
    join.config = config;
    streams.push_back(engine.Join(join));
    engine.Declare(streams.back(), {layer});
  }
  return streams;
}

class AllRedeclareTest : public ::testing::TestWithParam<uint32_t> {};

// Each worker takes its steps in order, and the workers interleave at random: every round completes, without a
// mismatch.
TEST_P(AllRedeclareTest, ASumOfAnotherLengthInAnyOrderOfArrival) {
  const uint32_t world_size = GetParam();
  for (uint32_t seed = 1; seed <= 50; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    Engine engine;
    std::vector<StreamId> workers;
    for (Rank rank = 0; rank < world_size; ++rank) workers.push_back(engine.Join(MakeJoin(rank, world_size)));
    const std::vector<uint32_t> lengths = {23, 41, 41, 23, 7};
    // Step 2 n declares, step 2 n + 1 contributes; workers run ahead of each other as far as they like.
    std::vector<size_t> done(world_size, 0);
    for (size_t left = world_size * 2 * lengths.size(); left > 0;) {
      const Rank rank = random() % world_size;
      if (done[rank] == 2 * lengths.size()) continue;
      const size_t step = done[rank]++;
      --left;
      if (step % 2 == 0) {
        engine.Declare(workers[rank], {SumLayer("g", lengths[step / 2])});
      } else {
        engine.Contribute(workers[rank], Sum("g", step / 2), Vector(lengths[step / 2], 1.0 + rank));
      }
    }
    for (const StreamId worker : workers) {
      EXPECT_THAT(engine.log(worker).layer_errors, IsEmpty());
      for (size_t round = 0; round < lengths.size(); ++round) {
        const auto outcome = engine.Outcome(worker, Sum("g", round));
        ASSERT_EQ(ReasonOf(*outcome), "") << outcome->error->message;
        EXPECT_EQ(outcome->first, std::vector<double>(lengths[round], world_size * (world_size + 1) / 2.0));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Workers, AllRedeclareTest, ::testing::Values(1, 2, 3, 5, 40),
                         [](const auto& info) { return std::to_string(info.param); });

TEST(RedeclareTest, ARoundInFlightCompletesUnderItsOwnDeclaration) {
  Engine engine;
  const auto workers = JoinAll(engine, 2, BatchNormLayer("a", 1));
  engine.Contribute(workers[0], Forward("a", 0), Moments(1));
  engine.Declare(workers[0], {BatchNormLayer("a", 3)});
  EXPECT_THAT(engine.ended(), IsEmpty());
  engine.Contribute(workers[0], Forward("a", 1), Moments(3));
  engine.Contribute(workers[1], Forward("a", 0), Moments(1));
  EXPECT_EQ(engine.Outcome(workers[0], Forward("a", 0))->first.size(), 1u);
  EXPECT_THAT(engine.Outcomes(workers[0], Forward("a", 1)), IsEmpty()) << "it waits";
  engine.Declare(workers[1], {BatchNormLayer("a", 3)});
  engine.Contribute(workers[1], Forward("a", 1), Moments(3));
  EXPECT_EQ(engine.Outcome(workers[1], Forward("a", 1))->first.size(), 3u);
  EXPECT_EQ(engine.Layer("a").summary.spec.channels, 3u);
}

TEST(RedeclareTest, TwoModelsOfOneNameTakeTurns) {
  Engine engine;
  const auto workers = JoinAll(engine, 2, BatchNormLayer("1", 2));
  for (uint64_t step = 0; step < 6; step += 2) {
    for (const StreamId worker : workers) {
      engine.Declare(worker, {BatchNormLayer("1", 2)});
      engine.Contribute(worker, Forward("1", step), Moments(2));
      engine.Declare(worker, {BatchNormLayer("1", 5)});
      engine.Contribute(worker, Forward("1", step + 1), Moments(5));
    }
    // Backward rounds go the other way, and each has the size of its forward round.
    for (const StreamId worker : workers) {
      engine.Contribute(worker, Backward("1", step + 1), Gradients(5));
      engine.Contribute(worker, Backward("1", step), Gradients(2));
    }
    for (const StreamId worker : workers) {
      EXPECT_EQ(engine.Outcome(worker, Forward("1", step))->first.size(), 2u);
      EXPECT_EQ(engine.Outcome(worker, Forward("1", step + 1))->first.size(), 5u);
      EXPECT_EQ(engine.Outcome(worker, Backward("1", step))->first, std::vector<double>(2, 4.0));
      EXPECT_EQ(engine.Outcome(worker, Backward("1", step + 1))->first, std::vector<double>(5, 4.0));
    }
  }
  for (const StreamId worker : workers) EXPECT_THAT(engine.log(worker).layer_errors, IsEmpty());
}

TEST(RedeclareTest, OneKeyIsMadeUnderOneDeclaration) {
  Engine engine;
  const auto workers = JoinAll(engine, 3, BatchNormLayer("a", 1));
  LayerSpec other = BatchNormLayer("a", 1);
  other.eps = 0.25;  // The same numbers would fit.
  engine.Declare(workers[0], {other});
  engine.Contribute(workers[0], Forward("a", 0), Moments(1));
  engine.Contribute(workers[1], Forward("a", 0), Moments(1));
  for (const StreamId worker : {workers[0], workers[1]}) {
    const auto outcome = engine.Outcome(worker, Forward("a", 0));
    EXPECT_EQ(ReasonOf(*outcome), kLayerSpecMismatch);
    EXPECT_THAT(outcome->error->ranks, ElementsAre(1));
    EXPECT_THAT(outcome->error->message, HasSubstr("rank 1 has eps 1e-05 instead of 0.25"));
  }
  engine.Contribute(workers[2], Forward("a", 0), Moments(1));
  EXPECT_EQ(ReasonOf(*engine.Outcome(workers[2], Forward("a", 0))), kLayerSpecMismatch) << "one outcome";
  for (const StreamId worker : workers) {
    engine.Declare(worker, {other});
    engine.Contribute(worker, Forward("a", 1), Moments(1));
  }
  EXPECT_EQ(engine.Outcome(workers[1], Forward("a", 1))->count, 12);
}

TEST(RedeclareTest, WhoNeverDoesIsNamedAtTheDeadline) {
  Engine engine;
  const auto workers = JoinAll(engine, 3, SumLayer("g", 23));
  for (const Rank rank : {0, 2}) {
    engine.Declare(workers[rank], {SumLayer("g", 41)});
    engine.Contribute(workers[rank], Sum("g", 0), Vector(41, 1.0));
  }
  EXPECT_THAT(engine.ended(), IsEmpty());
  engine.Advance(*engine.View().config.round_timeout);
  const auto outcome = engine.Outcome(workers[0], Sum("g", 0));
  EXPECT_EQ(ReasonOf(*outcome), kRoundTimeout);
  EXPECT_THAT(outcome->error->ranks, ElementsAre(1));
  EXPECT_THAT(outcome->error->message, HasSubstr("to rank 1 the layer has channels 23 instead of 41"));
}

TEST(RedeclareTest, AProceedingGroupGoesOnWithoutHim) {
  GroupConfig config;
  config.missing_policy = MissingPolicy::kProceed;
  config.min_workers = 2;
  Engine engine;
  const auto workers = JoinAll(engine, 3, SumLayer("g", 2), config);
  for (const Rank rank : {0, 2}) {
    engine.Declare(workers[rank], {SumLayer("g", 3)});
    engine.Contribute(workers[rank], Sum("g", 0), Vector(3, 1.0 + rank));
  }
  engine.Advance(*engine.View().config.round_timeout);
  const auto outcome = engine.Outcome(workers[0], Sum("g", 0));
  EXPECT_EQ(outcome->first, std::vector<double>(3, 4.0));
  EXPECT_THAT(outcome->missing_ranks, ElementsAre(1));
}

TEST(RedeclareTest, AnEndedRoundOfTheOldDeclarationAnswersReplays) {
  Engine engine;
  const auto workers = JoinAll(engine, 2, SumLayer("g", 2));
  for (const StreamId worker : workers) engine.Contribute(worker, Sum("g", 0), Vector(2, 1.0));
  const auto outcome = engine.Outcome(workers[0], Sum("g", 0));
  for (const StreamId worker : workers) engine.Declare(worker, {SumLayer("g", 3)});
  const StreamId again = engine.Reconnect(workers[0]);
  engine.Declare(again, {SumLayer("g", 3)});
  engine.Contribute(again, Sum("g", 0), Vector(2, 1.0));
  EXPECT_EQ(engine.Outcome(again, Sum("g", 0)), outcome);
}

// The worker resends the rounds that were in flight, under the declaration that it had then, and goes on.
TEST(RedeclareTest, AReconnectGoesThroughTheDeclarationsAgain) {
  Engine engine;
  const auto workers = JoinAll(engine, 2, SumLayer("g", 2));
  engine.Contribute(workers[0], Sum("g", 0), Vector(2, 1.0));
  engine.Declare(workers[0], {SumLayer("g", 3)});
  engine.Contribute(workers[0], Sum("g", 1), Vector(3, 1.0));
  const StreamId again = engine.Reconnect(workers[0]);
  engine.Declare(again, {SumLayer("g", 2)});
  engine.Contribute(again, Sum("g", 0), Vector(2, 1.0));
  engine.Declare(again, {SumLayer("g", 3)});
  engine.Contribute(again, Sum("g", 1), Vector(3, 1.0));
  EXPECT_THAT(engine.ended(), IsEmpty());
  engine.Contribute(workers[1], Sum("g", 0), Vector(2, 2.0));
  engine.Declare(workers[1], {SumLayer("g", 3)});
  engine.Contribute(workers[1], Sum("g", 1), Vector(3, 2.0));
  EXPECT_EQ(engine.Outcome(again, Sum("g", 0))->first, std::vector<double>(2, 3.0));
  EXPECT_EQ(engine.Outcome(again, Sum("g", 1))->first, std::vector<double>(3, 3.0));
}

// One worker has moved on to the new declaration and the other has not; the master has forgotten both declarations.
TEST(RedeclareTest, ARestartedMasterMeetsWorkersOnEitherSide) {
  Engine engine;
  engine.Advance(absl::Hours(1));
  std::vector<StreamId> workers;
  for (Rank rank = 0; rank < 2; ++rank) {
    Join join = MakeJoin(rank, 2);
    join.run_id = 77;
    join.incarnation = 1;
    join.layers = {SumLayer("g", rank == 0 ? 3 : 2)};
    workers.push_back(engine.Join(join));
    ASSERT_TRUE(engine.log(workers.back()).joined.has_value());
    EXPECT_THAT(engine.log(workers.front()).layer_errors, IsEmpty());
  }
  engine.Contribute(workers[0], Sum("g", 5), Vector(3, 1.0));
  EXPECT_THAT(engine.ended(), IsEmpty());
  engine.Declare(workers[1], {SumLayer("g", 3)});
  engine.Contribute(workers[1], Sum("g", 5), Vector(3, 2.0));
  EXPECT_EQ(engine.Outcome(workers[0], Sum("g", 5))->first, std::vector<double>(3, 3.0));
}

// Two programs are equal; the faster one has made both declarations before the slower one makes any.
TEST(RedeclareTest, AFirstWordThatAnotherHasSaidBeforeIsNoDispute) {
  Engine engine;
  const StreamId fast = engine.Join(0, 2, {BatchNormLayer("a", 1)});
  engine.Contribute(fast, Forward("a", 0), Moments(1));
  engine.Declare(fast, {BatchNormLayer("a", 2)});
  engine.Contribute(fast, Forward("a", 1), Moments(2));
  const StreamId slow = engine.Join(1, 2, {BatchNormLayer("a", 1)});
  EXPECT_THAT(engine.log(fast).layer_errors, IsEmpty());
  engine.Contribute(slow, Forward("a", 0), Moments(1));
  engine.Declare(slow, {BatchNormLayer("a", 2)});
  engine.Contribute(slow, Forward("a", 1), Moments(2));
  EXPECT_EQ(engine.Outcome(fast, Forward("a", 0))->count, 8);
  EXPECT_EQ(engine.Outcome(fast, Forward("a", 1))->count, 8);
}

// The worker restarts with the declaration that the others are about to make.
TEST(RedeclareTest, ARestartedRankMayBeAheadOfTheOthers) {
  Engine engine;
  const auto workers = JoinAll(engine, 2, SumLayer("g", 2));
  for (const StreamId worker : workers) engine.Contribute(worker, Sum("g", 0), Vector(2, 1.0));
  engine.Close(workers[1]);
  const StreamId reborn = engine.Join(1, 2, {SumLayer("g", 3)});
  EXPECT_THAT(engine.log(workers[0]).layer_errors, IsEmpty());
  engine.Contribute(reborn, Sum("g", 1), Vector(3, 1.0));
  EXPECT_THAT(engine.Outcomes(reborn, Sum("g", 1)), IsEmpty());
  engine.Declare(workers[0], {SumLayer("g", 3)});
  engine.Contribute(workers[0], Sum("g", 1), Vector(3, 1.0));
  EXPECT_EQ(engine.Outcome(reborn, Sum("g", 1))->first, std::vector<double>(3, 2.0));
}

TEST(RedeclareTest, ATrueDisagreementIsToldAtOnce) {
  Engine engine;
  const StreamId a = engine.Join(0, 2, {BatchNormLayer("a", 1)});
  engine.Declare(a, {BatchNormLayer("a", 2)});
  engine.Contribute(a, Forward("a", 0), Moments(2));
  const StreamId b = engine.Join(1, 2, {BatchNormLayer("a", 7)});
  for (const StreamId stream : {a, b}) ASSERT_EQ(engine.log(stream).layer_errors.size(), 1u);
  EXPECT_EQ(ReasonOf(*engine.Outcome(a, Forward("a", 0))), kLayerSpecMismatch);
  EXPECT_THAT(engine.Outcome(a, Forward("a", 0))->error->message, HasSubstr("rank 1 has channels 7 instead of 2"));
}

TEST(RedeclareTest, ALayerMayBecomeASum) {
  Engine engine;
  const auto workers = JoinAll(engine, 2, BatchNormLayer("a", 1));
  for (const StreamId worker : workers) engine.Contribute(worker, Forward("a", 0), Moments(1));
  engine.Declare(workers[0], {SumLayer("a", 4)});
  engine.Contribute(workers[0], Sum("a", 0), Vector(4, 1.0));
  engine.Contribute(workers[0], Backward("a", 0), Gradients(1));
  engine.Contribute(workers[1], Backward("a", 0), Gradients(1));
  engine.Declare(workers[1], {SumLayer("a", 4)});
  engine.Contribute(workers[1], Sum("a", 0), Vector(4, 1.0));
  EXPECT_EQ(engine.Outcome(workers[1], Backward("a", 0))->first, std::vector<double>(1, 4.0));
  EXPECT_EQ(engine.Outcome(workers[1], Sum("a", 0))->first, std::vector<double>(4, 2.0));
}

// ---- Running statistics ---------------------------------------------------------------------------------------------

TEST(RedeclareRunningTest, GoOnWithAnotherEpsAndMomentumAndBeginAnewWithAnotherSize) {
  Engine engine;
  LayerSpec spec = BatchNormLayer("a", 1);
  spec.momentum = 0.5;
  const auto workers = JoinAll(engine, 2, spec);
  for (const StreamId worker : workers) engine.Contribute(worker, Forward("a", 0), Moments(1, 1));  // Mean 2.
  EXPECT_EQ(engine.Layer("a").running.mean, std::vector<double>(1, 1.0));
  spec.eps = 0.25;
  spec.momentum = 0.25;
  for (const StreamId worker : workers) engine.Declare(worker, {spec});
  EXPECT_EQ(engine.Layer("a").running.updates, 1u);
  for (const StreamId worker : workers) engine.Contribute(worker, Forward("a", 1), Moments(1, 4));  // Mean 5.
  EXPECT_EQ(engine.Layer("a").running.mean, std::vector<double>(1, 2.0)) << "3/4 of 1, and 1/4 of 5";
  EXPECT_EQ(engine.Layer("a").running.updates, 2u);
  // A round of the old size is in flight when the first round of the new size completes.
  for (const StreamId worker : workers) {
    if (worker == workers[0]) engine.Contribute(worker, Forward("a", 2), Moments(1));
    spec.channels = 3;
    engine.Declare(worker, {spec});
    engine.Contribute(worker, Forward("a", 3), Moments(3, 3));  // Mean 4.
  }
  EXPECT_EQ(engine.Layer("a").running.mean, std::vector<double>(3, 1.0)) << "1/4 of 4";
  EXPECT_EQ(engine.Layer("a").running.updates, 1u);
  spec.channels = 1;
  engine.Declare(workers[1], {spec});
  engine.Contribute(workers[1], Forward("a", 2), Moments(1));
  EXPECT_EQ(ReasonOf(*engine.Outcome(workers[0], Forward("a", 2))), "");
  EXPECT_EQ(engine.Layer("a").batch->first.size(), 3u);
}

}  // namespace
}  // namespace syncbn::core
