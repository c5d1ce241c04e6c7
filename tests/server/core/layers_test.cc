// Declarations of layers that agree and disagree, and the running statistics of layers.

#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/coordinator.h"
#include "server/core/error.h"
#include "tests/testing/engine.h"

namespace syncbn::core {
namespace {

using testing::BatchNormLayer;
using ::testing::DoubleEq;
using ::testing::ElementsAre;
using testing::Engine;
using testing::Forward;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::MakeJoin;
using testing::Numbers;
using testing::ReasonOf;
using testing::SumLayer;

const Numbers kNumbers{4, {1.0}, {0.5}};

Join JoinWith(Rank rank, uint32_t world_size, std::vector<LayerSpec> layers) {
  Join join = MakeJoin(rank, world_size);
  join.layers = std::move(layers);
  return join;
}

// ---- Sets declared at join ------------------------------------------------------------------------------------------

TEST(LayerSetTest, EqualSetsInAnyOrder) {
  Engine engine;
  engine.Join(JoinWith(0, 2, {BatchNormLayer("a", 1), BatchNormLayer("b", 2)}));
  EXPECT_FALSE(engine.log(engine.Join(JoinWith(1, 2, {BatchNormLayer("b", 2), BatchNormLayer("a", 1)}))).closed);
}

TEST(LayerSetTest, TheDifferenceIsSaidToBothAtOnce) {
  Engine engine;
  const StreamId first = engine.Join(JoinWith(0, 3, {BatchNormLayer("a", 64), BatchNormLayer("b", 2)}));
  const StreamId silent = engine.Join(MakeJoin(2, 3));
  const StreamId second =
      engine.Join(JoinWith(1, 3, {BatchNormLayer("a", 32), BatchNormLayer("c", 2), BatchNormLayer("d", 2)}));
  EXPECT_EQ(engine.log(second).close_reason(), kLayerSetMismatch);
  EXPECT_FALSE(engine.log(second).joined.has_value());
  const std::string& message = engine.log(second).closed_with->message;
  EXPECT_THAT(message, HasSubstr("rank 1 declares other layers than rank 0"));
  EXPECT_THAT(message, HasSubstr("layer \"a\" has channels 32 instead of 64"));
  EXPECT_THAT(message, HasSubstr("it alone has \"c\", \"d\""));
  EXPECT_THAT(message, HasSubstr("it lacks \"b\""));
  // Workers that know "a" learn of the disagreement about it; all learn of the refused worker.
  ASSERT_EQ(engine.log(first).layer_errors.size(), 2u);
  EXPECT_EQ(engine.log(first).layer_errors[0].layer, "a");
  EXPECT_STREQ(engine.log(first).layer_errors[0].error.reason, kLayerSpecMismatch);
  EXPECT_EQ(engine.log(first).layer_errors[1].layer, "");
  EXPECT_EQ(engine.log(first).layer_errors[1].error.message, message);
  ASSERT_EQ(engine.log(silent).layer_errors.size(), 1u);
  EXPECT_STREQ(engine.log(silent).layer_errors[0].error.reason, kLayerSetMismatch);
}

TEST(LayerSetTest, WhoComesBackMendedIsTaken) {
  Engine engine;
  const StreamId first = engine.Join(JoinWith(0, 2, {BatchNormLayer("a", 1)}));
  engine.Join(JoinWith(1, 2, {BatchNormLayer("a", 2)}));
  const StreamId corrected = engine.Join(JoinWith(1, 2, {BatchNormLayer("a", 1)}));
  EXPECT_FALSE(engine.log(corrected).closed);
  engine.Contribute(first, Forward("a", 0), kNumbers);
  engine.Contribute(corrected, Forward("a", 0), kNumbers);
  EXPECT_EQ(ReasonOf(*engine.Outcome(first, Forward("a", 0))), "");
}

TEST(LayerSetTest, RoundsThatWaitForTheRefusedFailAtOnceAndUntilItIsMended) {
  Engine engine;
  const StreamId first = engine.Join(JoinWith(0, 3, {BatchNormLayer("a", 1)}));
  const StreamId second = engine.Join(JoinWith(1, 3, {BatchNormLayer("a", 1)}));
  engine.Contribute(first, Forward("a", 0), kNumbers);
  engine.Join(JoinWith(2, 3, {BatchNormLayer("b", 1)}));
  const auto before = engine.Outcome(first, Forward("a", 0));
  EXPECT_EQ(ReasonOf(*before), kLayerSetMismatch);
  EXPECT_THAT(before->error->message, HasSubstr("it alone has \"b\""));
  EXPECT_THAT(before->error->ranks, ElementsAre(2u));
  // Contributions of the others get the same outcome, and so does a round that begins now.
  engine.Contribute(second, Forward("a", 0), kNumbers);
  EXPECT_EQ(ReasonOf(*engine.Outcome(second, Forward("a", 0))), kLayerSetMismatch);
  engine.Contribute(second, Forward("a", 1), kNumbers);
  EXPECT_EQ(ReasonOf(*engine.Outcome(second, Forward("a", 1))), kLayerSetMismatch);
  const StreamId corrected = engine.Join(JoinWith(2, 3, {BatchNormLayer("a", 1)}));
  for (const StreamId stream : {first, second, corrected}) engine.Contribute(stream, Forward("a", 2), kNumbers);
  EXPECT_EQ(ReasonOf(*engine.Outcome(corrected, Forward("a", 2))), "");
}

TEST(LayerSetTest, ARefusedJoinHarmsNobodyWhoIsPresent) {
  Engine engine;
  const StreamId first = engine.Join(JoinWith(0, 2, {BatchNormLayer("a", 1)}));
  const StreamId second = engine.Join(JoinWith(1, 2, {BatchNormLayer("a", 1)}));
  engine.Contribute(first, Forward("a", 0), kNumbers);
  EXPECT_EQ(engine.log(engine.Join(JoinWith(1, 2, {BatchNormLayer("a", 2)}))).close_reason(), kRankTaken);
  EXPECT_FALSE(engine.Layer("a").summary.conflict.has_value());
  engine.Contribute(second, Forward("a", 0), kNumbers);
  EXPECT_EQ(ReasonOf(*engine.Outcome(first, Forward("a", 0))), "");
}

TEST(LayerSetTest, ManyDifferencesAreNamedInPart) {
  Engine engine;
  std::vector<LayerSpec> mine, yours;
  for (int i = 0; i < 100; ++i) {
    mine.push_back(BatchNormLayer(std::string(200, 'n') + std::to_string(i), 1));
    yours.push_back(BatchNormLayer(std::string(200, 'n') + std::to_string(i), 2));
  }
  engine.Join(JoinWith(0, 2, mine));
  const StreamId refused = engine.Join(JoinWith(1, 2, yours));
  EXPECT_EQ(engine.log(refused).close_reason(), kLayerSetMismatch);
  EXPECT_THAT(engine.log(refused).closed_with->message, HasSubstr("and 95 more differ"));
  EXPECT_LT(engine.log(refused).closed_with->message.size(), 2000u);
}

TEST(LayerSetTest, WhoDeclaresNothingAtJoinMayDeclareLater) {
  Engine engine;
  const StreamId first = engine.Join(JoinWith(0, 2, {BatchNormLayer("a", 1)}));
  const StreamId second = engine.Join(1, 2, {BatchNormLayer("a", 1), BatchNormLayer("more", 3)});
  EXPECT_FALSE(engine.log(first).closed);
  EXPECT_FALSE(engine.log(second).closed);
  EXPECT_THAT(engine.log(first).layer_errors, IsEmpty());
}

TEST(LayerSetTest, AMalformedSpecAtJoinLeavesNoTrace) {
  Engine engine;
  const StreamId bad = engine.Join(JoinWith(0, 2, {BatchNormLayer("ok", 1), BatchNormLayer("bad", 0)}));
  EXPECT_EQ(engine.log(bad).close_reason(), kMalformedFrame);
  EXPECT_FALSE(engine.log(bad).joined.has_value());
  EXPECT_THAT(engine.coordinator().ListGroups(), IsEmpty());
  EXPECT_EQ(engine.coordinator().NextDeadline(), absl::InfiniteFuture());
}

TEST(LayerSetTest, AMalformedJoinEndsNoOtherGeneration) {
  Engine engine;
  const StreamId worker = engine.Join(JoinWith(0, 2, {BatchNormLayer("a", 1)}));
  Join next = JoinWith(1, 2, {BatchNormLayer("a", 0)});
  next.generation = 1;
  EXPECT_EQ(engine.log(engine.Join(next)).close_reason(), kMalformedFrame);
  EXPECT_FALSE(engine.log(worker).closed);
}

TEST(LayerSetTest, AMalformedJoinTakesNoSeat) {
  Engine engine;
  const StreamId worker = engine.Join(JoinWith(0, 2, {BatchNormLayer("a", 1)}));
  EXPECT_EQ(engine.log(engine.Join(JoinWith(0, 2, {BatchNormLayer("a", 0)}))).close_reason(), kMalformedFrame);
  EXPECT_FALSE(engine.log(worker).closed);
}

struct SpecCase {
  std::string name;
  LayerSpec spec;
};

class MalformedSpecTest : public ::testing::TestWithParam<SpecCase> {};

TEST_P(MalformedSpecTest, ClosesTheStream) {
  Engine engine;
  const StreamId bad = engine.Join(0, 2);
  const StreamId good = engine.Join(1, 2);
  engine.Declare(bad, {GetParam().spec});
  EXPECT_EQ(engine.log(bad).close_reason(), kMalformedFrame);
  EXPECT_FALSE(engine.log(good).closed);
  EXPECT_THAT(engine.View().members[0].state, MemberState::kLost);
}

LayerSpec With(void (*change)(LayerSpec&)) {
  LayerSpec spec = BatchNormLayer("a", 1);
  change(spec);
  return spec;
}

INSTANTIATE_TEST_SUITE_P(All, MalformedSpecTest,
                         ::testing::Values(SpecCase{"NoName", With([](LayerSpec& spec) { spec.name = ""; })},
                                           SpecCase{"NoChannels", With([](LayerSpec& spec) { spec.channels = 0; })},
                                           SpecCase{"NegativeEps", With([](LayerSpec& spec) { spec.eps = -1.0; })},
                                           SpecCase{"NanEps", With([](LayerSpec& spec) { spec.eps = NAN; })},
                                           SpecCase{"InfiniteEps", With([](LayerSpec& spec) { spec.eps = INFINITY; })},
                                           SpecCase{"NanMomentum", With([](LayerSpec& spec) { spec.momentum = NAN; })}),
                         [](const auto& info) { return info.param.name; });

// ---- Conflicts ------------------------------------------------------------------------------------------------------

class DifferenceTest : public ::testing::TestWithParam<SpecCase> {};

TEST_P(DifferenceTest, IsNamedToAllWhoKnowTheLayer) {
  Engine engine;
  const StreamId a = engine.Join(0, 3, {BatchNormLayer("a", 1)});
  const StreamId stranger = engine.Join(2, 3);
  const StreamId b = engine.Join(1, 3, {GetParam().spec});
  for (const StreamId stream : {a, b}) {
    ASSERT_EQ(engine.log(stream).layer_errors.size(), 1u);
    EXPECT_STREQ(engine.log(stream).layer_errors[0].error.reason, kLayerSpecMismatch);
    EXPECT_THAT(engine.log(stream).layer_errors[0].error.ranks, ElementsAre(1));
    EXPECT_THAT(engine.log(stream).layer_errors[0].error.message, HasSubstr(GetParam().name));
  }
  EXPECT_THAT(engine.log(stranger).layer_errors, IsEmpty());
  EXPECT_TRUE(engine.Layer("a").summary.conflict.has_value());
}

INSTANTIATE_TEST_SUITE_P(
    All, DifferenceTest,
    ::testing::Values(
        SpecCase{"channels", With([](LayerSpec& spec) { spec.channels = 2; })},
        SpecCase{"kind", With([](LayerSpec& spec) { spec.kind = LayerKind::kSum; })},
        SpecCase{"eps", With([](LayerSpec& spec) { spec.eps = 1e-3; })},
        SpecCase{"eps_mode", With([](LayerSpec& spec) { spec.eps_mode = EpsMode::kClamp; })},
        SpecCase{"numeric_policy", With([](LayerSpec& spec) { spec.numeric_policy = NumericPolicy::kPropagate; })},
        SpecCase{"biased_running_variance", With([](LayerSpec& spec) { spec.biased_running_variance = true; })}),
    [](const auto& info) { return info.param.name; });

TEST(ConflictTest, MomentumIsNotCompared) {
  Engine engine;
  LayerSpec spec = BatchNormLayer("a", 1);
  const StreamId a = engine.Join(0, 2, {spec});
  spec.momentum = 0.3;
  engine.Join(1, 2, {spec});
  EXPECT_THAT(engine.log(a).layer_errors, IsEmpty());
  EXPECT_EQ(engine.Layer("a").summary.spec.momentum, 0.3) << "the last one declared counts";
}

TEST(ConflictTest, RoundsFailAtOnceAndUntilTheyAgree) {
  Engine engine;
  const StreamId a = engine.Join(0, 2, {BatchNormLayer("a", 1), BatchNormLayer("other", 1)});
  engine.Contribute(a, Forward("a", 0), kNumbers);
  engine.Contribute(a, Forward("other", 0), kNumbers);
  const StreamId b = engine.Join(1, 2, {BatchNormLayer("a", 2)});
  EXPECT_EQ(ReasonOf(*engine.Outcome(a, Forward("a", 0))), kLayerSpecMismatch);
  EXPECT_THAT(engine.Outcomes(a, Forward("other", 0)), IsEmpty()) << "that layer is not in conflict";
  engine.Contribute(b, Forward("a", 1), kNumbers);
  EXPECT_EQ(ReasonOf(*engine.Outcome(b, Forward("a", 1))), kLayerSpecMismatch);

  engine.Declare(b, {BatchNormLayer("a", 1)});
  EXPECT_FALSE(engine.Layer("a").summary.conflict.has_value());
  engine.Contribute(a, Forward("a", 2), kNumbers);
  engine.Contribute(b, Forward("a", 2), kNumbers);
  EXPECT_EQ(ReasonOf(*engine.Outcome(a, Forward("a", 2))), "");
}

TEST(ConflictTest, AllMayAgreeUponTheOther) {
  Engine engine;
  const StreamId a = engine.Join(0, 2, {BatchNormLayer("a", 1)});
  const StreamId b = engine.Join(1, 2, {BatchNormLayer("a", 2)});
  engine.Declare(a, {BatchNormLayer("a", 2)});
  EXPECT_FALSE(engine.Layer("a").summary.conflict.has_value());
  EXPECT_EQ(engine.Layer("a").summary.spec.channels, 2u);
  const Numbers two{4, {1.0, 2.0}, {0.5, 0.5}};
  engine.Contribute(a, Forward("a", 5), two);
  engine.Contribute(b, Forward("a", 5), two);
  EXPECT_EQ(engine.Outcome(a, Forward("a", 5))->first.size(), 2u);
}

// Nobody else knows the layer, so a single declaration changes it, and there is no conflict to announce.
TEST(ConflictTest, ARestartWithOtherLayersIsRefusedOnceAndTakenThen) {
  Engine engine;
  engine.Join(MakeJoin(1, 2));  // Keeps the restart from beginning a new run.
  engine.Close(engine.Join(JoinWith(0, 2, {BatchNormLayer("a", 1)})));
  EXPECT_EQ(engine.log(engine.Join(JoinWith(0, 2, {BatchNormLayer("a", 2)}))).close_reason(), kLayerSetMismatch);
  EXPECT_FALSE(engine.log(engine.Join(JoinWith(0, 2, {BatchNormLayer("a", 2)}))).closed);
}

TEST(ConflictTest, WhoHasLeftDisagreesWithNobody) {
  Engine engine;
  const StreamId first = engine.Join(0, 2, {BatchNormLayer("a", 1)});
  const StreamId second = engine.Join(1, 2, {BatchNormLayer("a", 2)});
  engine.Leave(second);
  EXPECT_FALSE(engine.Layer("a").summary.conflict.has_value());
  engine.Contribute(first, Forward("a", 0), kNumbers);
  EXPECT_EQ(ReasonOf(*engine.Outcome(first, Forward("a", 0))), "");
}

TEST(ConflictTest, WhatRemainsOfThoseWhoDeviatedIsAdopted) {
  Engine engine;
  const StreamId first = engine.Join(0, 2, {BatchNormLayer("a", 2)});
  const StreamId second = engine.Join(1, 2, {BatchNormLayer("a", 1)});
  engine.Leave(first);
  EXPECT_FALSE(engine.Layer("a").summary.conflict.has_value());
  engine.Contribute(second, Forward("a", 0), kNumbers);
  EXPECT_EQ(ReasonOf(*engine.Outcome(second, Forward("a", 0))), "");
}

TEST(ConflictTest, ASuccessorIsNotHeldToWhatItsPredecessorDeclared) {
  Engine engine;
  const StreamId first = engine.Join(0, 2, {BatchNormLayer("a", 1)});
  engine.Close(engine.Join(1, 2, {BatchNormLayer("a", 2)}));
  const StreamId successor = engine.Join(MakeJoin(1, 2));
  engine.Contribute(first, Forward("a", 0), kNumbers);
  engine.Declare(successor, {BatchNormLayer("a", 1)});
  engine.Contribute(successor, Forward("a", 0), kNumbers);
  EXPECT_EQ(ReasonOf(*engine.Outcome(first, Forward("a", 0))), "");
}

// ---- Running statistics ---------------------------------------------------------------------------------------------

class RunningTest : public ::testing::Test {
 protected:
  void Start(std::optional<double> momentum, bool biased = false) {
    LayerSpec spec = BatchNormLayer("a", 1);
    spec.momentum = momentum;
    spec.biased_running_variance = biased;
    for (Rank rank = 0; rank < 2; ++rank) workers_.push_back(engine_.Join(rank, 2, {spec}));
  }
  // Rank 0 contributes this, and rank 1 an empty batch.
  void Round(uint64_t sequence, int64_t count, double mean, double m2) {
    engine_.Contribute(workers_[0], Forward("a", sequence), {count, {mean}, {m2}});
    engine_.Contribute(workers_[1], Forward("a", sequence), {0, {}, {}});
  }
  RunningStatisticsView Running() { return engine_.Layer("a").running; }

  Engine engine_;
  std::vector<StreamId> workers_;
};

TEST_F(RunningTest, BeginsWithTheStandardNormal) {
  Start(0.1);
  EXPECT_THAT(Running().mean, ElementsAre(0.0));
  EXPECT_THAT(Running().var, ElementsAre(1.0));
  EXPECT_EQ(Running().updates, 0u);
}

TEST_F(RunningTest, MomentumWeighsTheNew) {
  Start(0.1);
  Round(0, 5, 10.0, 8.0);
  EXPECT_THAT(Running().mean, ElementsAre(DoubleEq(0.9 * 0.0 + 0.1 * 10.0)));
  EXPECT_THAT(Running().var, ElementsAre(DoubleEq(0.9 * 1.0 + 0.1 * 2.0))) << "8 / (5 - 1)";
  Round(1, 3, 20.0, 2.0);
  EXPECT_THAT(Running().mean, ElementsAre(DoubleEq(0.9 * 1.0 + 0.1 * 20.0)));
  EXPECT_THAT(Running().var, ElementsAre(DoubleEq(0.9 * 1.1 + 0.1 * 1.0)));
  EXPECT_EQ(Running().updates, 2u);
}

TEST_F(RunningTest, WithoutMomentumTheAverage) {
  Start(std::nullopt);
  Round(0, 5, 10.0, 8.0);
  Round(1, 3, 20.0, 2.0);
  Round(2, 2, 60.0, 6.0);
  EXPECT_THAT(Running().mean, ElementsAre(DoubleEq(30.0)));
  EXPECT_THAT(Running().var, ElementsAre(DoubleEq((2.0 + 1.0 + 6.0) / 3.0)));
}

TEST_F(RunningTest, BiasedIfTheLayerSaysSo) {
  Start(0.5, true);
  Round(0, 4, 0.0, 8.0);
  EXPECT_THAT(Running().var, ElementsAre(DoubleEq(0.5 * 1.0 + 0.5 * 2.0))) << "8 / 4";
}

TEST_F(RunningTest, AnEmptyRoundChangesNothing) {
  Start(0.1);
  Round(0, 0, 0.0, 0.0);
  EXPECT_EQ(Running().updates, 0u);
  EXPECT_THAT(Running().mean, ElementsAre(0.0));
}

TEST_F(RunningTest, OneValueHasAMeanButNoUnbiasedVariance) {
  Start(0.5);
  Round(0, 1, 6.0, 0.0);
  EXPECT_THAT(Running().mean, ElementsAre(3.0));
  EXPECT_THAT(Running().var, ElementsAre(1.0));
  EXPECT_EQ(Running().updates, 1u);
}

TEST_F(RunningTest, ReplaysAndFailuresUpdateNothing) {
  Start(0.1);
  Round(0, 5, 10.0, 8.0);
  for (int i = 0; i < 3; ++i) Round(0, 5, 10.0, 8.0);
  Round(1, 5, NAN, 8.0);
  EXPECT_EQ(Running().updates, 1u);
  EXPECT_THAT(Running().mean, ElementsAre(DoubleEq(1.0)));
  EXPECT_EQ(engine_.Layer("a").summary.rounds_completed, 1u);
  EXPECT_EQ(engine_.Layer("a").summary.rounds_failed, 1u);
}

TEST_F(RunningTest, MomentumMayChangeOnTheWay) {
  Start(0.1);
  LayerSpec spec = BatchNormLayer("a", 1);
  spec.momentum = 1.0;
  engine_.Declare(workers_[0], {spec});
  Round(0, 5, 10.0, 8.0);
  EXPECT_THAT(Running().mean, ElementsAre(10.0));
}

}  // namespace
}  // namespace syncbn::core
