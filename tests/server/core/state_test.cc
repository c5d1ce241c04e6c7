// The state that a master stores; the next master goes on with it as if the first had never ended.

#include "server/core/state.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <random>
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
using ::testing::IsEmpty;
using testing::MakeJoin;
using testing::Numbers;
using testing::Sum;
using testing::SumLayer;

// Contents of a store, to which changes are applied as the store applies them.
class Stored {
 public:
  void Save(const std::vector<StateChanges>& all) {
    for (const StateChanges& changes : all) {
      for (const GroupId& id : changes.ended) groups_.erase(id);
      for (const GroupState& group : changes.groups) Put(group);
    }
  }
  std::vector<GroupState> Load() const {
    std::vector<GroupState> loaded;
    for (const auto& [id, group] : groups_) {
      loaded.push_back(group.state);
      for (const auto& [name, layer] : group.layers) loaded.back().layers.push_back(layer);
    }
    return loaded;
  }

 private:
  struct Group {
    GroupState state;
    std::map<std::string, LayerState> layers;
  };

  void Put(const GroupState& group) {
    Group& mine = groups_[group.id];
    mine.state = group;
    mine.state.layers.clear();
    for (const LayerState& layer : group.layers) mine.layers[layer.spec.name] = layer;
  }

  std::map<GroupId, Group> groups_;
};

LayerSpec Cumulative(const std::string& name, uint32_t channels) { return BatchNormLayer(name, channels); }

LayerSpec Exponential(const std::string& name, uint32_t channels, double momentum) {
  LayerSpec spec = BatchNormLayer(name, channels);
  spec.momentum = momentum;
  return spec;
}

// A worker that has joined an earlier master of this run.
Join Returning(Rank rank, uint32_t world_size, uint64_t run_id) {
  Join join = MakeJoin(rank, world_size);
  join.incarnation = 1;
  join.run_id = run_id;
  return join;
}

// One worker, one layer of one channel: each round's mean is its sequence.
Numbers At(uint64_t sequence) { return {2, {static_cast<double>(sequence)}, {1.0}}; }

uint64_t RunOf(const Engine& engine) { return engine.View().summary.run_id; }

// A master on which rounds 0 to `last` of the layer "a" have completed, and what is stored of it.
struct Past {
  explicit Past(int last, LayerSpec spec = Cumulative("a", 1)) {
    engine.Restore({});
    worker = engine.Join(0, 1, {spec});
    for (int sequence = 0; sequence <= last; ++sequence) Round(sequence);
    run_id = RunOf(engine);
  }
  void Round(uint64_t sequence) {
    engine.Contribute(worker, Forward("a", sequence), At(sequence));
    stored.Save(engine.TakeChanges());
  }

  Engine engine;
  StreamId worker = 0;
  uint64_t run_id = 0;
  Stored stored;
};

// The next master, to which the worker has come back.
struct Present {
  explicit Present(const Past& past, LayerSpec spec = Cumulative("a", 1)) : Present(past.stored, past.run_id, spec) {}
  Present(const Stored& stored, uint64_t run_id, LayerSpec spec) {
    engine.Restore(stored.Load());
    worker = engine.Join(Returning(0, 1, run_id));
    engine.Declare(worker, {spec});
  }
  RunningStatisticsView After(std::initializer_list<uint64_t> sequences) {
    for (const uint64_t sequence : sequences) engine.Contribute(worker, Forward("a", sequence), At(sequence));
    return engine.Layer("a").running;
  }

  Engine engine;
  StreamId worker = 0;
};

// ---- Exactly once ---------------------------------------------------------------------------------------------------

TEST(StateTest, TheCumulativeAverageGoesOn) {
  const RunningStatisticsView running = Present(Past(3)).After({4, 5});
  EXPECT_EQ(running.updates, 6u);
  EXPECT_DOUBLE_EQ(running.mean[0], 2.5);
  EXPECT_FALSE(running.missing.has_value());
}

TEST(StateTest, RoundsThatWereCountedAreNotCountedAgain) {
  const RunningStatisticsView running = Present(Past(3)).After({1, 2, 3, 4, 5});
  EXPECT_EQ(running.updates, 6u);
  EXPECT_DOUBLE_EQ(running.mean[0], 2.5);
}

TEST(StateTest, ARoundBehindTheNewestThatWasNotCountedCounts) {
  Past past(3);
  past.Round(6);
  const RunningStatisticsView running = Present(past).After({3, 4, 5, 6, 7});
  EXPECT_EQ(running.updates, 8u);
  EXPECT_DOUBLE_EQ(running.mean[0], 3.5);
}

TEST(StateTest, TheNewestSequenceAndTheBatchAreThereAgain) {
  Present present(Past(3));
  EXPECT_EQ(present.engine.Layer("a").summary.newest_sequence, 3u);
  EXPECT_EQ(present.engine.Layer("a").batch, nullptr);
  present.After({2, 3});
  ASSERT_NE(present.engine.Layer("a").batch, nullptr);
  EXPECT_EQ(present.engine.Layer("a").batch->first[0], 3.0);
}

TEST(StateTest, WhatTheNextMasterStoresServesTheOneAfterIt) {
  Past past(70);  // More rounds than are remembered by their sequences.
  for (uint64_t life = 0; life < 5; ++life) {
    Present present(past);
    present.After({69 + life, 70 + life, 71 + life});
    past.stored.Save(present.engine.TakeChanges());
  }
  const RunningStatisticsView running = Present(past).After({});
  EXPECT_EQ(running.updates, 76u);
  EXPECT_NEAR(running.mean[0], 37.5, 1e-12);
  EXPECT_EQ(past.stored.Load()[0].layers[0].recent.size(), kRecentRounds);
}

// Two workers and two layers train while masters die at any moment and lose what they have not stored. The workers give
// the newest rounds of each layer again, as they must.
class Training {
 public:
  static constexpr uint64_t kKept = 8;         // Rounds that workers give again.
  static constexpr uint64_t kMostUnsaved = 4;  // Rounds after which the master stores.

  explicit Training(uint32_t seed) : random_(seed), chaos_(seed + 1) {
    engine_ = std::make_unique<Engine>();
    engine_->Restore({});
    Join(/*returning=*/false);
  }

  // Begins the next step: each layer's rounds, in an order of its own.
  void Step() {
    if (!rounds_.empty()) sequence_ += 1 + random_() % 3;  // Gaps are allowed.
    rounds_.push_back(sequence_);
    const bool turned = random_() % 2 == 0;
    for (size_t layer = 0; layer < specs_.size(); ++layer) Round(specs_[turned ? 1 - layer : layer], sequence_);
    if (rounds_.size() % kMostUnsaved == 0 || random_() % 3 == 0) stored_.Save(engine_->TakeChanges(64));
  }

  void Crash() {
    if (chaos_() % 2 == 0) stored_.Save({engine_->TakeChanges(1).front()});  // A part may still be stored.
    engine_ = std::make_unique<Engine>();
    engine_->Restore(stored_.Load());
    Join(/*returning=*/true);
    const size_t first = rounds_.size() - std::min<size_t>(rounds_.size(), kKept);
    for (size_t i = first; i < rounds_.size(); ++i) {
      for (const LayerSpec& spec : specs_) Round(spec, rounds_[i]);
    }
  }

  bool MayCrash() const { return engine_->coordinator().journal().has_changes(); }
  LayerView View(size_t layer) const { return engine_->Layer(specs_[layer].name); }
  const std::vector<uint64_t>& rounds() const { return rounds_; }
  // The numbers of a rank's contribution, the same whenever they are asked for.
  static Numbers NumbersOf(const LayerSpec& spec, uint64_t sequence, Rank rank) {
    std::mt19937 random(static_cast<uint32_t>(sequence * 131 + rank * 17 + spec.channels));
    std::normal_distribution<double> normal;
    Numbers numbers;
    numbers.count = random() % 5;
    if (numbers.count == 0) return numbers;
    for (uint32_t c = 0; c < spec.channels; ++c) numbers.first.push_back(normal(random));
    for (uint32_t c = 0; c < spec.channels; ++c) {
      numbers.second.push_back(numbers.count == 1 ? 0.0 : std::abs(normal(random)));
    }
    return numbers;
  }

 private:
  void Join(bool returning) {
    workers_.clear();
    for (const Rank rank : {0u, 1u}) {
      workers_.push_back(engine_->Join(returning ? Returning(rank, 2, run_id_) : MakeJoin(rank, 2)));
      engine_->Declare(workers_.back(), specs_);
    }
    run_id_ = RunOf(*engine_);
  }
  void Round(const LayerSpec& spec, uint64_t sequence) {
    for (const Rank rank : {0u, 1u}) {
      engine_->Contribute(workers_[rank], Forward(spec.name, sequence), NumbersOf(spec, sequence, rank));
    }
  }

  const std::vector<LayerSpec> specs_ = {Exponential("a", 3, 0.1), Cumulative("b", 2)};
  std::mt19937 random_;  // For the training.
  std::mt19937 chaos_;   // For its troubles.
  std::unique_ptr<Engine> engine_;
  std::vector<StreamId> workers_;
  uint64_t run_id_ = 0;
  uint64_t sequence_ = 0;
  std::vector<uint64_t> rounds_;
  Stored stored_;
};

bool SameBits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

TEST(StateTest, ATrainingWhoseMastersDieEndsWithTheBitsOfAnUndisturbedOne) {
  int crashes = 0;
  for (uint32_t seed = 1; seed <= 100; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    Training undisturbed(seed), disturbed(seed);
    for (int step = 0; step < 60; ++step) {
      undisturbed.Step();
      disturbed.Step();
      if (random() % 6 != 0 || !disturbed.MayCrash()) continue;
      disturbed.Crash();
      ++crashes;
    }
    for (const size_t layer : {0u, 1u}) {
      const LayerView expected = undisturbed.View(layer), view = disturbed.View(layer);
      EXPECT_EQ(view.running.updates, expected.running.updates);
      EXPECT_TRUE(SameBits(view.running.mean, expected.running.mean));
      EXPECT_TRUE(SameBits(view.running.var, expected.running.var));
      EXPECT_FALSE(view.running.missing.has_value());
      EXPECT_EQ(view.summary.newest_sequence, expected.summary.newest_sequence);
      EXPECT_TRUE(SameBits(view.batch->first, expected.batch->first));
    }
  }
  EXPECT_GT(crashes, 300);
}

// ---- Rounds that nobody can give again ------------------------------------------------------------------------------

TEST(StateTest, AGapIsTold) {
  Present present(Past(3));
  EXPECT_FALSE(present.After({}).missing.has_value());
  EXPECT_EQ(present.After({9}).missing, (MissingRounds{3, 9}));
  EXPECT_EQ(present.After({20}).missing, (MissingRounds{3, 9})) << "later gaps are gaps in the numbering";
}

TEST(StateTest, WhereACountedRoundIsGivenAgainNothingIsMissing) {
  EXPECT_FALSE(Present(Past(3)).After({3, 9}).missing.has_value());
}

TEST(StateTest, WhereTheNextSequenceFollowsNothingIsMissing) {
  EXPECT_FALSE(Present(Past(3)).After({4, 9}).missing.has_value());
}

TEST(StateTest, ARunOfWhichNothingWasStoredLacksWhatCameBefore) {
  const Past past(3);
  Present present(Stored(), past.run_id, Cumulative("a", 1));
  EXPECT_EQ(present.After({2, 3, 9}).missing, (MissingRounds{std::nullopt, 2}));
  EXPECT_FALSE(Present(Stored(), past.run_id, Cumulative("a", 1)).After({0, 1, 2, 3, 9}).missing.has_value());
  // Likewise without a store.
  Engine engine;
  const StreamId worker = engine.Join(Returning(0, 1, past.run_id));
  engine.Declare(worker, {Cumulative("a", 1)});
  engine.Contribute(worker, Forward("a", 2), At(2));
  EXPECT_EQ(engine.Layer("a").running.missing, (MissingRounds{std::nullopt, 2}));
}

TEST(StateTest, AGapIsStoredAndGrows) {
  Past past(3);
  Present first(past);
  first.After({9});
  past.stored.Save(first.engine.TakeChanges());
  Present second(past);
  EXPECT_EQ(second.After({}).missing, (MissingRounds{3, 9}));
  EXPECT_EQ(second.After({20}).missing, (MissingRounds{3, 20}));
}

// ---- Layers that have changed ---------------------------------------------------------------------------------------

TEST(StateTest, AnotherNumberOfChannelsBeginsAnew) {
  Present present(Past(3), BatchNormLayer("a", 2));
  present.engine.Contribute(present.worker, Forward("a", 4), {2, {7.0, 8.0}, {1.0, 1.0}});
  const RunningStatisticsView running = present.engine.Layer("a").running;
  EXPECT_EQ(running.updates, 1u);
  EXPECT_THAT(running.mean, ElementsAre(7.0, 8.0));
  EXPECT_FALSE(running.missing.has_value());
}

TEST(StateTest, RoundsOfTheFormerSizeThatComeLateAreIgnored) {
  Past past(3);
  past.engine.Declare(past.worker, {BatchNormLayer("a", 2)});
  past.engine.Contribute(past.worker, Forward("a", 4), {2, {7.0, 8.0}, {1.0, 1.0}});
  past.stored.Save(past.engine.TakeChanges());
  Present present(past);
  present.After({2, 3});
  present.engine.Declare(present.worker, {BatchNormLayer("a", 2)});
  present.engine.Contribute(present.worker, Forward("a", 4), {2, {7.0, 8.0}, {1.0, 1.0}});
  const RunningStatisticsView running = present.engine.Layer("a").running;
  EXPECT_EQ(running.updates, 1u);
  EXPECT_THAT(running.mean, ElementsAre(7.0, 8.0));
}

// ---- Groups that wait for their workers -----------------------------------------------------------------------------

TEST(StateTest, AGroupIsSeenBeforeItsWorkersComeBack) {
  const Past past(3);
  Engine engine;
  engine.Restore(past.stored.Load());
  EXPECT_EQ(engine.coordinator().ListGroups().size(), 1u);
  EXPECT_EQ(engine.View().summary.run_id, past.run_id);
  EXPECT_EQ(engine.View().summary.world_size, 1u);
  EXPECT_EQ(engine.View().summary.present, 0u);
  EXPECT_EQ(engine.View().config.round_timeout, absl::Minutes(10));
  const LayerView layer = engine.Layer("a"), before = past.engine.Layer("a");
  EXPECT_EQ(layer.running.mean, before.running.mean);
  EXPECT_EQ(layer.running.var, before.running.var);
  EXPECT_EQ(layer.running.updates, before.running.updates);
  EXPECT_EQ(layer.summary.spec, before.summary.spec);
  EXPECT_FALSE(engine.coordinator().GetLayer({"j", "x"}, "a").ok());
}

TEST(StateTest, AGroupThatNobodyComesBackToIsForgotten) {
  Past past(3);
  Engine engine;
  engine.Restore(past.stored.Load());
  engine.Advance(absl::Seconds(59));
  EXPECT_FALSE(engine.coordinator().ListGroups().empty());
  EXPECT_FALSE(engine.coordinator().journal().has_changes());
  engine.Advance(absl::Seconds(1));
  EXPECT_THAT(engine.coordinator().ListGroups(), IsEmpty());
  past.stored.Save(engine.TakeChanges());
  EXPECT_THAT(past.stored.Load(), IsEmpty());
}

TEST(StateTest, AWorkerThatBeginsFirstDoesNotTakeTheGroupFromThoseThatComeBack) {
  Past past(3);
  Engine engine;
  engine.Restore(past.stored.Load());
  const StreamId stranger = engine.Join(0, 1, {Cumulative("a", 1)});
  engine.Close(stranger);
  past.stored.Save(engine.TakeChanges());
  const RunningStatisticsView running = Present(past).After({4});
  EXPECT_EQ(running.updates, 5u);
}

TEST(StateTest, AnotherRunThatCompletesARoundReplacesTheStoredOne) {
  Past past(3);
  Engine engine;
  engine.Restore(past.stored.Load());
  const StreamId worker = engine.Join(0, 1, {Cumulative("a", 1), SumLayer("s", 1)});
  EXPECT_EQ(engine.Layer("a").running.updates, 0u);
  engine.Contribute(worker, Sum("s", 0), {0, {1.0}, {}});
  past.stored.Save(engine.TakeChanges());
  EXPECT_THAT(past.stored.Load(), IsEmpty());
  engine.Contribute(worker, Forward("a", 0), At(5));
  past.stored.Save(engine.TakeChanges());
  ASSERT_EQ(past.stored.Load().size(), 1u);
  EXPECT_EQ(past.stored.Load()[0].run_id, RunOf(engine));
  EXPECT_THAT(past.stored.Load()[0].layers[0].mean, ElementsAre(5.0));
}

TEST(StateTest, AWorkerOfAnotherRunThatComesBackBeginsAnewWithItsRun) {
  Past past(3);
  const RunningStatisticsView running = Present(past.stored, past.run_id + 1, Cumulative("a", 1)).After({7});
  EXPECT_EQ(running.updates, 1u);
  EXPECT_EQ(running.missing, (MissingRounds{std::nullopt, 7}));
}

TEST(StateTest, AnOlderGenerationIsRefusedAndANewerOneBeginsAnew) {
  Past past(-1);
  Engine first;
  first.Restore({});
  Join join = MakeJoin(0, 1);
  join.generation = 2;
  const StreamId worker = first.Join(join);
  first.Declare(worker, {Cumulative("a", 1)});
  first.Contribute(worker, Forward("a", 0), At(0));
  past.stored.Save(first.TakeChanges());

  Engine engine;
  engine.Restore(past.stored.Load());
  join.generation = 1;
  EXPECT_EQ(engine.log(engine.Join(join)).close_reason(), "GENERATION_SUPERSEDED");
  EXPECT_EQ(engine.View().summary.generation, 2u);
  join.generation = 3;
  EXPECT_FALSE(engine.log(engine.Join(join)).closed);
  past.stored.Save(engine.TakeChanges());
  EXPECT_THAT(past.stored.Load(), IsEmpty());
}

// ---- Changes --------------------------------------------------------------------------------------------------------

TEST(StateTest, WithoutRestoreNothingIsNoted) {
  Engine engine;
  const StreamId worker = engine.Join(0, 1, {Cumulative("a", 1)});
  engine.Contribute(worker, Forward("a", 0), At(0));
  EXPECT_FALSE(engine.coordinator().journal().has_changes());
}

TEST(StateTest, RoundsOfALayerAreCountedUntilTheyAreTaken) {
  Engine engine;
  engine.Restore({});
  const StreamId worker = engine.Join(0, 1, {Cumulative("a", 1), Cumulative("b", 1), SumLayer("s", 1)});
  engine.Contribute(worker, Sum("s", 0), {0, {1.0}, {}});
  EXPECT_FALSE(engine.coordinator().journal().has_changes()) << "sums are not stored";
  for (const uint64_t sequence : {0u, 1u, 2u}) engine.Contribute(worker, Forward("b", sequence), At(sequence));
  engine.Contribute(worker, Forward("a", 0), At(0));
  EXPECT_EQ(engine.coordinator().journal().most_rounds(), 3u);
  // The layer that changed first comes first, and a limit of bytes lets at least one through.
  const std::vector<StateChanges> taken = engine.TakeChanges(1);
  ASSERT_EQ(taken.size(), 2u);
  EXPECT_EQ(taken[0].groups[0].layers[0].spec.name, "b");
  EXPECT_EQ(taken[1].groups[0].layers[0].spec.name, "a");
  EXPECT_EQ(engine.coordinator().journal().most_rounds(), 0u);
}

TEST(StateTest, AGroupThatEndsIsRemovedAndOneThatAShutdownEndsStays) {
  Past past(3);
  past.engine.Close(past.worker);
  past.engine.Advance(absl::Minutes(1));
  EXPECT_TRUE(past.engine.coordinator().journal().has_ended());
  past.stored.Save(past.engine.TakeChanges());
  EXPECT_THAT(past.stored.Load(), IsEmpty());

  Past other(3);
  other.engine.Shutdown();
  EXPECT_FALSE(other.engine.coordinator().journal().has_changes());
}

TEST(StateTest, AGroupThatBeginsAgainReplacesTheFormer) {
  Past past(3);
  past.engine.Contribute(past.worker, Forward("a", 4), At(4));
  past.engine.Close(past.worker);
  const StreamId successor = past.engine.Join(0, 1, {Cumulative("b", 1)});  // Nobody else is there: a new run.
  past.engine.Contribute(successor, Forward("b", 0), At(0));
  past.stored.Save(past.engine.TakeChanges());
  ASSERT_EQ(past.stored.Load().size(), 1u);
  EXPECT_EQ(past.stored.Load()[0].run_id, RunOf(past.engine));
  ASSERT_EQ(past.stored.Load()[0].layers.size(), 1u);
  EXPECT_EQ(past.stored.Load()[0].layers[0].spec.name, "b");
}

}  // namespace
}  // namespace syncbn::core
