// Views of the engine from outside.

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/coordinator.h"
#include "tests/testing/engine.h"

namespace syncbn::core {
namespace {

using testing::BatchNormLayer;
using ::testing::ElementsAre;
using testing::Engine;
using testing::Forward;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::MakeJoin;
using testing::Numbers;
using testing::SumLayer;

const Numbers kNumbers{4, {1.0}, {0.5}};

TEST(ViewsTest, NothingAtFirst) {
  const Coordinator coordinator;
  EXPECT_THAT(coordinator.ListGroups(), IsEmpty());
  EXPECT_EQ(coordinator.NextDeadline(), absl::InfiniteFuture());
}

TEST(ViewsTest, UnknownNamesAreNotFoundAndTellWhatThereIs) {
  Engine engine;
  engine.Join(0, 1, {BatchNormLayer("a", 1)});
  const auto group = engine.coordinator().GetGroup({"j", "x"}, engine.now());
  EXPECT_EQ(group.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(group.status().message()), HasSubstr("there are: \"j\"/\"g\""));
  const auto layer = engine.coordinator().GetLayer(Engine::group(), "x");
  EXPECT_EQ(layer.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(layer.status().message()), HasSubstr("no layer \"x\" among its 1"));
  EXPECT_FALSE(engine.coordinator().GetLayer({"j", "x"}, "a").ok());
  EXPECT_FALSE(engine.coordinator().ListLayers({"x", "g"}).ok());
}

TEST(ViewsTest, GroupsAreListedByName) {
  Engine engine;
  Join join = MakeJoin(0, 1);
  for (const char* name : {"z", "a", "m"}) {
    join.id.group = name;
    engine.Join(join);
  }
  std::vector<std::string> names;
  for (const GroupSummary& summary : engine.coordinator().ListGroups()) names.push_back(summary.id.group);
  EXPECT_THAT(names, ElementsAre("a", "m", "z"));
}

TEST(ViewsTest, MembersAndTheirStates) {
  Engine engine;
  std::vector<StreamId> workers;
  for (Rank rank = 0; rank < 3; ++rank) {
    Join join = MakeJoin(rank, 4);
    join.description = "worker " + std::to_string(rank);
    workers.push_back(engine.Join(join));
    engine.Declare(workers.back(), {BatchNormLayer("a", 1)});
    engine.Advance(absl::Seconds(1));
  }
  engine.ContributeAndBlock(workers[0], Forward("a", 0), kNumbers);
  engine.Close(workers[1]);
  engine.Leave(workers[2]);
  const GroupView view = engine.View();
  EXPECT_EQ(view.summary.world_size, 4u);
  EXPECT_EQ(view.summary.present, 1u);
  EXPECT_EQ(view.summary.layers, 1u);
  EXPECT_EQ(view.summary.rounds_in_flight, 1u);
  EXPECT_EQ(view.config.round_timeout, absl::Minutes(10));
  ASSERT_EQ(view.members.size(), 4u);
  EXPECT_EQ(view.members[0].state, MemberState::kPresent);
  EXPECT_EQ(view.members[0].description, "worker 0");
  EXPECT_EQ(view.members[0].incarnation, 1u);
  EXPECT_EQ(view.members[0].contributions, 1u);
  EXPECT_EQ(view.members[0].joined_at, engine.now() - absl::Seconds(3));
  EXPECT_THAT(view.members[0].blocked_on, ElementsAre(Forward("a", 0)));
  EXPECT_EQ(view.members[1].state, MemberState::kLost);
  EXPECT_EQ(view.members[2].state, MemberState::kLeft);
  EXPECT_EQ(view.members[3].state, MemberState::kAbsent);
}

TEST(ViewsTest, PendingRoundsOldestFirst) {
  Engine engine;
  std::vector<StreamId> workers;
  for (Rank rank = 0; rank < 3; ++rank) workers.push_back(engine.Join(rank, 3, {BatchNormLayer("a", 1)}));
  engine.Contribute(workers[1], Forward("a", 7), kNumbers);
  engine.Advance(absl::Seconds(4));
  engine.Contribute(workers[0], Forward("a", 3), kNumbers);
  engine.Contribute(workers[2], Forward("a", 3), kNumbers);
  engine.Advance(absl::Seconds(1));
  const GroupView view = engine.View();
  ASSERT_EQ(view.pending.size(), 2u);
  EXPECT_EQ(view.pending[0].key, Forward("a", 7));
  EXPECT_THAT(view.pending[0].arrived_ranks, ElementsAre(1));
  EXPECT_THAT(view.pending[0].missing_ranks, ElementsAre(0, 2));
  EXPECT_EQ(view.pending[0].age, absl::Seconds(5));
  EXPECT_EQ(view.pending[0].time_left, absl::Minutes(10) - absl::Seconds(5));
  EXPECT_EQ(view.pending[1].key, Forward("a", 3));
  EXPECT_THAT(view.pending[1].missing_ranks, ElementsAre(1));
}

TEST(ViewsTest, OfManyRoundsAndRanksTheFirstAreShownAndAllCounted) {
  Engine engine;
  const StreamId worker = engine.Join(0, 300, {BatchNormLayer("a", 1)});
  FrameReceived frame;
  frame.stream = worker;
  for (uint64_t sequence = 0; sequence < 500; ++sequence) {
    frame.contributions.push_back({Forward("a", 499 - sequence), 0, BackwardRole::kRequired, {}, {}});
    frame.blocked_on.push_back(Forward("a", sequence));
  }
  frame.blocked_on.push_back(Forward("a", 7));  // Again: it counts once.
  engine.On(frame);
  engine.Contribute(worker, Forward("a", 1000), kNumbers);
  engine.On(frame);
  const GroupView view = engine.View();
  EXPECT_EQ(view.summary.rounds_in_flight, 501u);
  ASSERT_EQ(view.pending.size(), 100u);
  EXPECT_EQ(view.pending[99].key, Forward("a", 99));
  EXPECT_THAT(view.pending[0].arrived_ranks, ElementsAre(0));
  EXPECT_EQ(view.pending[0].missing_ranks.size(), 64u);
  EXPECT_EQ(view.pending[0].missing, 299u);
  EXPECT_EQ(view.members[0].blocked_on.size(), 8u);
  EXPECT_EQ(view.members[0].blocked_on_count, 500u);
}

// A frame of 8 bytes may result in the zeros of a wide layer: those of many layers are not all kept.
TEST(ViewsTest, ABatchIsForgottenLikeAnyOtherResult) {
  Limits limits;
  limits.max_retained_bytes = 1000;
  Coordinator coordinator(limits);
  FrameReceived frame;
  frame.stream = 1;
  frame.join = MakeJoin(0, 1);
  for (int i = 0; i < 10; ++i) frame.layers.push_back(BatchNormLayer("wide" + std::to_string(i), 100));
  for (const LayerSpec& layer : frame.layers) {
    frame.contributions.push_back({Forward(layer.name, 0), 0, BackwardRole::kNone, {}, {}});
  }
  coordinator.On(frame, absl::UnixEpoch());  // Drops the effects: only the engine keeps the outcomes.
  int kept = 0;
  for (const LayerSpec& layer : frame.layers) {
    const auto view = coordinator.GetLayer(Engine::group(), layer.name);
    ASSERT_TRUE(view.ok()) << view.status();
    EXPECT_EQ(view->summary.newest_sequence, 0u);
    if (view->batch != nullptr) ++kept;
  }
  EXPECT_EQ(kept, 4) << "1600 bytes each: the newest four";
}

TEST(ViewsTest, TheLastToArriveIsCounted) {
  Engine engine;
  std::vector<StreamId> workers;
  for (Rank rank = 0; rank < 2; ++rank) workers.push_back(engine.Join(rank, 2, {BatchNormLayer("a", 1)}));
  for (uint64_t sequence = 0; sequence < 5; ++sequence) {
    engine.Contribute(workers[sequence == 0 ? 1 : 0], Forward("a", sequence), kNumbers);
    engine.Contribute(workers[sequence == 0 ? 0 : 1], Forward("a", sequence), kNumbers);
  }
  EXPECT_EQ(engine.View().members[0].last_arrivals, 1u);
  EXPECT_EQ(engine.View().members[1].last_arrivals, 4u);
  EXPECT_EQ(engine.View().summary.rounds_completed, 5u);
}

TEST(ViewsTest, LayersAndTheirNewestBatch) {
  Engine engine;
  const StreamId worker = engine.Join(0, 1, {SumLayer("s", 2), BatchNormLayer("a", 1)});
  EXPECT_EQ(engine.Layer("a").batch, nullptr);
  EXPECT_FALSE(engine.Layer("a").summary.newest_sequence.has_value());
  engine.Contribute(worker, Forward("a", 8), kNumbers);
  engine.Contribute(worker, Forward("a", 5), kNumbers);
  EXPECT_EQ(engine.Layer("a").batch, engine.Outcome(worker, Forward("a", 8))) << "by sequence, not by time";
  const auto layers = engine.coordinator().ListLayers(Engine::group());
  ASSERT_TRUE(layers.ok());
  ASSERT_EQ(layers->size(), 2u);
  EXPECT_EQ((*layers)[0].spec.name, "a");
  EXPECT_EQ((*layers)[0].newest_sequence, 8u);
  EXPECT_EQ((*layers)[0].rounds_completed, 2u);
  EXPECT_EQ((*layers)[1].spec.kind, LayerKind::kSum);
  EXPECT_THAT(engine.Layer("s").running.mean, IsEmpty());
}

}  // namespace
}  // namespace syncbn::core
