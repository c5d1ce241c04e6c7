// Coordinator::CheckInvariants notices each kind of damage to what the engine keeps: a total that no longer equals its
// parts, an index that misses an entry, a round that should have ended. Every other test of the engine, and the
// simulation, calls it after each event.

#include <functional>
#include <string>

#include "gtest/gtest.h"
#include "server/core/coordinator.h"
#include "server/core/group.h"
#include "tests/testing/engine.h"

namespace syncbn::core {

// Reaches the private parts that the tests damage. The first layer's name is "a".
struct InvariantsPeer {
  explicit InvariantsPeer(Coordinator& coordinator)
      : master(coordinator), group(*coordinator.groups_.begin()->second.group) {}

  auto& streams() { return master.streams_; }
  auto& group_alarms() { return master.alarms_; }
  absl::Time& group_alarm() { return master.groups_.begin()->second.alarm; }
  absl::Time& linger_until() { return group.linger_until_; }

  Member& member(Rank rank) { return group.members_.members_.At(rank); }
  uint32_t& present() { return group.members_.present_; }
  uint32_t& left() { return group.members_.left_; }
  uint32_t& given_up() { return group.members_.given_up_; }
  uint32_t& blocked() { return group.members_.blocked_; }
  uint32_t& lagging() { return group.members_.lagging_; }
  auto& ranks() { return group.members_.ranks_; }
  auto& graces() { return group.members_.graces_; }
  auto& layer_set_errors() { return group.members_.layer_set_errors_; }

  PendingRound& round() { return group.rounds_.pending_.begin()->second; }
  size_t& pending_bytes() { return group.rounds_.pending_bytes_; }
  auto& round_alarms() { return group.rounds_.alarms_; }

  OutcomeBudget& budget() { return group.layers_.budget_; }
  size_t& outcome_bytes() { return budget().bytes_; }
  size_t& record_bytes() { return budget().record_bytes_; }
  size_t& longest_result() { return group.layers_.longest_result_; }
  Layer& layer() { return group.layers_.Get("a"); }
  auto& history() { return layer().history(Phase::kForward); }
  auto& side() { return layer().declarations_.sides_.front(); }

  Coordinator& master;
  Group& group;
};

namespace {

using testing::BatchNormLayer;
using testing::Engine;
using testing::Forward;
using testing::Numbers;

const Numbers kNumbers{4, {1.0}, {0.5}};

struct Damage {
  const char* name;
  std::function<void(InvariantsPeer&)> inflict;
};

class InvariantsDeathTest : public ::testing::TestWithParam<Damage> {};

// Rank 0 is blocked on a round in flight, rank 1 is present, rank 2 is lost, rank 3 has left, and a forward round has
// completed, whose backward round is awaited.
struct Scene {
  Scene() {
    std::vector<StreamId> streams;
    for (Rank rank = 0; rank < 4; ++rank) streams.push_back(engine.Join(rank, 4, {BatchNormLayer("a", 1)}));
    for (const StreamId stream : streams) engine.Contribute(stream, Forward("a", 0), kNumbers);
    engine.Leave(streams[3]);
    engine.Close(streams[2]);
    engine.ContributeAndBlock(streams[0], Forward("a", 1), kNumbers);
  }

  InvariantsPeer parts() { return InvariantsPeer(const_cast<Coordinator&>(engine.coordinator())); }

  Engine engine;
};

TEST(InvariantsTest, HoldInTheScene) {
  Scene scene;
  scene.engine.coordinator().CheckInvariants();
  EXPECT_EQ(scene.engine.View().summary.present, 2u);
  EXPECT_EQ(scene.engine.View().summary.rounds_in_flight, 1u);
  EXPECT_EQ(scene.engine.View().summary.rounds_completed, 1u);
}

TEST_P(InvariantsDeathTest, IsNoticed) {
  Scene scene;
  InvariantsPeer parts = scene.parts();
  GetParam().inflict(parts);
  EXPECT_DEATH(scene.engine.coordinator().CheckInvariants(), "check failed");
}

INSTANTIATE_TEST_SUITE_P(
    Damage, InvariantsDeathTest,
    ::
        testing::
            Values(
                Damage{"AStreamTooMany", [](auto& parts) { parts.streams()[99] = Engine::group(); }},
                Damage{"AStreamTooFew", [](auto& parts) { parts.streams().erase(1); }},
                Damage{"NoAlarmOfTheGroup", [](auto& parts) { parts.group_alarms().clear(); }},
                Damage{"AnOldAlarmOfTheGroup", [](auto& parts) { parts.group_alarm() += absl::Seconds(1); }},
                Damage{"LingeringWithMembers", [](auto& parts) { parts.linger_until() = absl::UnixEpoch(); }},
                Damage{"Present", [](auto& parts) { ++parts.present(); }},
                Damage{"Left", [](auto& parts) { --parts.left(); }},
                Damage{"GivenUp", [](auto& parts) { ++parts.given_up(); }},
                Damage{"Blocked", [](auto& parts) { --parts.blocked(); }},
                Damage{"Lagging", [](auto& parts) { ++parts.lagging(); }},
                Damage{"NoRankOfAStream", [](auto& parts) { parts.ranks().erase(parts.member(1).stream); }},
                Damage{"NoGrace", [](auto& parts) { parts.graces().clear(); }},
                Damage{"AGraceOfAPresentMember",
                       [](auto& parts) {
                         parts.graces().insert({absl::InfiniteFuture(), Rank{0}});
                       }},
                Damage{"APresentMemberGivenUp",
                       [](auto& parts) {
                         parts.member(1).given_up = true;
                         ++parts.given_up();
                       }},
                Damage{"ALostMemberThatHadLeft", [](auto& parts) { parts.member(2).had_left = true; }},
                Damage{"APresentMemberThatIsUnheard", [](auto& parts) { parts.member(1).unheard = true; }},
                Damage{"ALostMemberLags", [](auto& parts) { parts.member(2).lags = true; }},
                Damage{"AnErrorOfAPresentMember", [](auto& parts) { parts.layer_set_errors()[1] = Error(); }},
                Damage{"AwaitedRounds", [](auto& parts) { ++parts.member(0).awaited; }},
                Damage{"BlockedOnNoRound", [](auto& parts) { parts.member(0).blocked_on = {Forward("a", 7)}; }},
                Damage{"PendingBytes", [](auto& parts) { parts.pending_bytes() += 8; }},
                Damage{"BytesOfARound", [](auto& parts) { parts.round().bytes -= 8; }},
                Damage{"NoAlarmOfARound", [](auto& parts) { parts.round_alarms().clear(); }},
                Damage{"AnAlarmAfterTheDeadline",
                       [](auto& parts) { parts.round().alarm = parts.round().deadline + absl::Seconds(1); }},
                Damage{"ARoundThatNeedsTooMany", [](auto& parts) { parts.round().needed = 5; }},
                Damage{"ARoundWithoutContributions", [](auto& parts) { parts.round().payloads.clear(); }},
                Damage{"ARoundWithoutItsLastRank", [](auto& parts) { parts.round().last_rank = 1; }},
                Damage{
                    "ARoundThatShouldHaveFailed",
                    [](auto& parts) {
                      parts.graces().clear();
                      parts.member(2).given_up = true;
                      ++parts.given_up();
                    }},
                Damage{"OutcomeBytes", [](auto& parts) { ++parts.outcome_bytes(); }},
                Damage{"RecordBytes", [](auto& parts) { --parts.record_bytes(); }},
                Damage{"AForgottenOutcome",
                       [](auto& parts) { parts.layer().Find(Phase::kForward, 0)->outcome.reset(); }},
                Damage{"ALostRecord", [](auto& parts) { parts.history().rounds.clear(); }},
                Damage{"ARecordOfAnotherLayer",
                       [](auto& parts) { parts.history().rounds.begin()->second.handle->layer = nullptr; }},
                Damage{"ARecordOfAnotherPhase",
                       [](auto& parts) { parts.history().rounds.begin()->second.handle->phase = Phase::kSum; }},
                Damage{"AGreatestSequenceTooSmall", [](auto& parts) { parts.history().newest = 9; }},
                Damage{"LongestResult", [](auto& parts) { parts.longest_result() = 0; }},
                Damage{"ASideTooSmall", [](auto& parts) { --parts.side().size; }},
                Damage{"ASideWithARankThatIsNotCounted",
                       [](auto& parts) {
                         parts.side().ranks.erase(0);
                         parts.side().ranks.insert(7);
                       }}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace syncbn::core
