// Each limit of limits.h: input up to the limit is accepted; beyond it the answer is LIMIT_EXCEEDED and names the
// limit.

#include <malloc.h>

#include <cstddef>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/coordinator.h"
#include "server/core/error.h"
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
using testing::ReasonOf;
using testing::Sum;
using testing::SumLayer;

const Numbers kNumbers{4, {1.0}, {0.5}};

void ExpectLimit(const std::optional<Error>& error, const std::string& limit) {
  ASSERT_TRUE(error.has_value());
  EXPECT_STREQ(error->reason, kLimitExceeded);
  EXPECT_EQ(error->code, absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(error->message, HasSubstr(limit));
}

TEST(LimitsTest, MaxWorkers) {
  Limits limits;
  limits.max_workers = 4;
  Engine engine(limits);
  EXPECT_FALSE(engine.log(engine.Join(MakeJoin(0, 4))).closed);
  ExpectLimit(engine.log(engine.Join(MakeJoin(0, 5))).closed_with, "max_workers = 4");
}

TEST(LimitsTest, MaxGroups) {
  Limits limits;
  limits.max_groups = 2;
  Engine engine(limits);
  Join join = MakeJoin(0, 1);
  join.id.group = "first";
  const StreamId first = engine.Join(join);
  join.id.group = "second";
  engine.Join(join);
  join.id.group = "third";
  ExpectLimit(engine.log(engine.Join(join)).closed_with, "max_groups = 2");
  // An empty group makes room.
  engine.Close(first);
  EXPECT_FALSE(engine.log(engine.Join(join)).closed);
  EXPECT_EQ(engine.groups_ended(), 1u);
  EXPECT_EQ(engine.coordinator().ListGroups().size(), 2u);
}

// Strangers cannot take all groups of a master: a connection may begin a quarter of them, and an address half.
class GroupsTest : public ::testing::Test {
 protected:
  static Limits EightGroups() {
    Limits limits;
    limits.max_groups = 8;
    return limits;
  }
  // A worker of a group of its own.
  StreamId Begin(const std::string& connection, const std::string& address) {
    Join join = MakeJoin(0, 1);
    join.id.group = std::to_string(++groups_);
    join.connection = connection;
    join.address = address;
    return engine_.Join(join);
  }
  std::optional<Error> Refusal(StreamId stream) const { return engine_.log(stream).closed_with; }

  Engine engine_{EightGroups()};

 private:
  int groups_ = 0;
};

TEST_F(GroupsTest, AConnectionBeginsAQuarter) {
  const StreamId first = Begin("a:1", "");
  EXPECT_EQ(Refusal(Begin("a:1", "")), std::nullopt);
  ExpectLimit(Refusal(Begin("a:1", "")), "max_groups_per_connection = 2");
  EXPECT_EQ(Refusal(Begin("a:2", "")), std::nullopt);
  // Its own empty group makes room, before those of others.
  engine_.Close(first);
  EXPECT_EQ(Refusal(Begin("a:1", "")), std::nullopt);
  EXPECT_EQ(engine_.groups_ended(), 1u);
  ExpectLimit(Refusal(Begin("a:1", "")), "max_groups_per_connection = 2");
}

TEST_F(GroupsTest, AnAddressBeginsHalf) {
  const StreamId first = Begin("a:0", "a");
  for (int i = 1; i < 4; ++i) EXPECT_EQ(Refusal(Begin("a:" + std::to_string(i), "a")), std::nullopt);
  ExpectLimit(Refusal(Begin("a:4", "a")), "max_groups_per_address = 4");
  EXPECT_EQ(Refusal(Begin("b:0", "b")), std::nullopt);
  engine_.Close(first);
  EXPECT_EQ(Refusal(Begin("a:4", "a")), std::nullopt);
}

TEST_F(GroupsTest, WorkersOfGroupsThatOthersHaveBegunDoNotCount) {
  for (int i = 0; i < 3; ++i) {
    Join join = MakeJoin(0, 2);
    join.id.group = "of " + std::to_string(i);
    join.connection = "a:" + std::to_string(i);
    engine_.Join(join);
    join.rank = 1;
    join.connection = "b:1";
    EXPECT_EQ(Refusal(engine_.Join(join)), std::nullopt);
  }
  EXPECT_EQ(Refusal(Begin("b:1", "")), std::nullopt);
}

TEST_F(GroupsTest, PeersWithoutNamesAreNotCounted) {
  for (int i = 0; i < 8; ++i) EXPECT_EQ(Refusal(Begin("", "")), std::nullopt);
  ExpectLimit(Refusal(Begin("", "")), "max_groups = 8");
}

// Allocated bytes; 0 where a sanitizer has an allocator of its own.
size_t AllocatedBytes() { return mallinfo2().uordblks; }

TEST(LimitsTest, AbsentWorkersTakeNoMemory) {
  constexpr size_t kGroups = 64;
  Engine engine;
  const auto allocated_by = [&](uint32_t world_size) {
    const size_t before = AllocatedBytes();
    for (size_t i = 0; i < kGroups; ++i) {
      Join join = MakeJoin(world_size - 1, world_size);
      join.id.group = std::to_string(world_size) + " " + std::to_string(i);
      engine.Join(join);
    }
    return AllocatedBytes() - before;
  };
  const size_t small = allocated_by(2);
  EXPECT_LT(allocated_by(4096), small + kGroups * (size_t{4} << 10));
}

class RetainedTest : public ::testing::Test {
 protected:
  // A group's sums of 100 elements take 800 bytes each, and some more for the record; four outcomes are always kept.
  static constexpr size_t kMost = 40'000;
  static Limits FewBytes() {
    Limits limits;
    limits.max_retained_bytes_of_all = kMost;
    return limits;
  }
  StreamId JoinAlone(const std::string& group) {
    Join join = MakeJoin(0, 1);
    join.id.group = group;
    const StreamId worker = engine_.Join(join);
    engine_.Declare(worker, {SumLayer("v", 100)});
    return worker;
  }
  void Complete(StreamId worker, uint64_t first, uint64_t last) {
    for (uint64_t sequence = first; sequence < last; ++sequence) {
      engine_.Contribute(worker, Sum("v", sequence), {0, std::vector<double>(100, 1.0), {}});
    }
  }
  size_t Retained() const {
    size_t bytes = 0;
    for (const GroupSummary& group : engine_.coordinator().ListGroups()) {
      bytes += engine_.coordinator().GetGroup(group.id, engine_.now())->retained_bytes;
    }
    return bytes;
  }
  std::vector<std::string> Groups() const {
    std::vector<std::string> names;
    for (const GroupSummary& group : engine_.coordinator().ListGroups()) names.push_back(group.id.group);
    return names;
  }

  Engine engine_{FewBytes()};
};

TEST_F(RetainedTest, GroupsThatNobodyIsConnectedToEndTheOldestFirst) {
  for (const char* group : {"a", "b", "c"}) {
    const StreamId worker = JoinAlone(group);
    Complete(worker, 0, 12);
    engine_.Close(worker);
    engine_.Advance(absl::Milliseconds(1));
  }
  EXPECT_THAT(Groups(), ElementsAre("a", "b", "c"));
  const StreamId worker = JoinAlone("d");
  Complete(worker, 0, 12);
  EXPECT_LE(Retained(), kMost);
  EXPECT_THAT(Groups(), ElementsAre("b", "c", "d"));
}

TEST_F(RetainedTest, TheGroupThatKeepsMostForgetsItsOldestOutcomes) {
  const StreamId much = JoinAlone("a"), little = JoinAlone("b");
  Complete(little, 0, 6);
  Complete(much, 0, 60);
  EXPECT_LE(Retained(), kMost);
  Complete(little, 0, 1);
  EXPECT_EQ(engine_.log(little).outcomes.size(), 7u) << "a replay";
  EXPECT_EQ(ReasonOf(*engine_.log(little).outcomes.back()), "");
  Complete(much, 0, 1);
  EXPECT_EQ(ReasonOf(*engine_.log(much).outcomes.back()), kRoundExpired);
  EXPECT_THAT(engine_.log(much).outcomes.back()->error->message, HasSubstr("max_retained_bytes_of_all = 40000"));
  Complete(much, 59, 60);
  EXPECT_EQ(ReasonOf(*engine_.log(much).outcomes.back()), "") << "the newest are kept";
}

TEST(LimitsTest, MaxLayersAsTheyCome) {
  Limits limits;
  limits.max_layers = 2;
  Engine engine(limits);
  const StreamId worker = engine.Join(0, 1, {BatchNormLayer("a", 1), SumLayer("b", 1)});
  engine.Declare(worker, {BatchNormLayer("a", 1)});
  EXPECT_FALSE(engine.log(worker).closed);
  engine.Declare(worker, {BatchNormLayer("c", 1)});
  ExpectLimit(engine.log(worker).closed_with, "max_layers = 2");
}

TEST(LimitsTest, MaxLayersInAFrameThoughTheyRepeat) {
  Limits limits;
  limits.max_layers = 2;
  Engine engine(limits);
  const StreamId stream = engine.Join(MakeJoin(0, 1));
  engine.Declare(stream, {BatchNormLayer("a", 1), BatchNormLayer("a", 1)});
  EXPECT_FALSE(engine.log(stream).closed);
  engine.Declare(stream, {BatchNormLayer("a", 1), BatchNormLayer("a", 1), BatchNormLayer("a", 1)});
  ExpectLimit(engine.log(stream).closed_with, "max_layers = 2");
}

TEST(LimitsTest, MaxRoundsInAFrame) {
  Limits limits;
  limits.max_rounds_in_frame = 2;
  Engine engine(limits);
  StreamId stream = engine.Join(0, 1, {SumLayer("v", 1)});
  const double value = 1.0;
  const auto send = [&](size_t contributions, size_t keys) {
    FrameReceived frame;
    frame.stream = stream;
    for (size_t i = 0; i < contributions; ++i) {
      Contribution& contribution = frame.contributions.emplace_back();
      contribution.key = Sum("v", i);
      contribution.first = {&value, 1};
    }
    frame.blocked_on.assign(keys, Sum("v", 0));
    engine.On(frame);
  };
  send(2, 2);
  EXPECT_FALSE(engine.log(stream).closed);
  send(3, 0);
  ExpectLimit(engine.log(stream).closed_with, "max_rounds_in_frame = 2");
  stream = engine.Join(MakeJoin(0, 1));
  send(0, 3);
  ExpectLimit(engine.log(stream).closed_with, "max_rounds_in_frame = 2");
}

TEST(LimitsTest, MaxLayersAtJoin) {
  Limits limits;
  limits.max_layers = 2;
  Engine engine(limits);
  const StreamId seated = engine.Join(0, 2, {BatchNormLayer("a", 1)});
  Join join = MakeJoin(1, 2);
  join.layers = {BatchNormLayer("b", 1), BatchNormLayer("c", 1)};
  const StreamId refused = engine.Join(join);
  ExpectLimit(engine.log(refused).closed_with, "max_layers = 2");
  EXPECT_FALSE(engine.log(refused).joined.has_value());
  EXPECT_FALSE(engine.log(seated).closed);
  EXPECT_EQ(engine.View().summary.layers, 1u);
}

TEST(LimitsTest, MaxChannelsAndVectorElements) {
  Limits limits;
  limits.max_channels = 8;
  limits.max_vector_elements = 16;
  Engine engine(limits);
  EXPECT_FALSE(engine.log(engine.Join(0, 3, {BatchNormLayer("a", 8), SumLayer("b", 16)})).closed);
  ExpectLimit(engine.log(engine.Join(1, 3, {BatchNormLayer("c", 9)})).closed_with, "max_channels = 8");
  ExpectLimit(engine.log(engine.Join(2, 3, {SumLayer("d", 17)})).closed_with, "max_vector_elements = 16");
}

TEST(LimitsTest, MaxRoundsInFlight) {
  Limits limits;
  limits.max_rounds_in_flight = 2;
  Engine engine(limits);
  const StreamId a = engine.Join(0, 2, {BatchNormLayer("a", 1)});
  const StreamId b = engine.Join(1, 2);
  engine.Contribute(a, Forward("a", 0), kNumbers);
  engine.Contribute(a, Forward("a", 1), kNumbers);
  engine.Contribute(a, Forward("a", 2), kNumbers);
  ExpectLimit(engine.Outcome(a, Forward("a", 2))->error, "max_rounds_in_flight = 2");
  engine.Contribute(b, Forward("a", 0), kNumbers);
  EXPECT_EQ(ReasonOf(*engine.Outcome(b, Forward("a", 0))), "") << "those in flight go on";
  engine.Contribute(b, Forward("a", 2), kNumbers);
  EXPECT_EQ(engine.View().summary.rounds_in_flight, 2u) << "there is room again";
}

TEST(LimitsTest, MaxPendingBytes) {
  Limits limits;
  limits.max_pending_bytes = 64;
  Engine engine(limits);
  const StreamId a = engine.Join(0, 2, {SumLayer("s", 8)});
  const StreamId b = engine.Join(1, 2);
  const Numbers full{0, std::vector<double>(8, 1.0), {}};
  engine.Contribute(a, Sum("s", 0), full);
  EXPECT_THAT(engine.log(a).outcomes, IsEmpty());
  engine.Contribute(a, Sum("s", 1), full);
  ExpectLimit(engine.Outcome(a, Sum("s", 1))->error, "max_pending_bytes = 64");
  engine.Advance(absl::Minutes(10));
  engine.Contribute(b, Sum("s", 2), full);
  EXPECT_EQ(engine.View().summary.rounds_in_flight, 1u) << "the bytes of ended rounds are free again";
}

// A contribution that is held already takes no more room when it is sent again.
TEST(LimitsTest, MaxPendingBytesDoesNotRefuseReplays) {
  Limits limits;
  limits.max_pending_bytes = 64;
  Engine engine(limits);
  const StreamId a = engine.Join(0, 2, {SumLayer("s", 8)});
  const Numbers full{0, std::vector<double>(8, 1.0), {}};
  engine.Contribute(a, Sum("s", 0), full);
  const StreamId again = engine.Reconnect(a);
  engine.Contribute(again, Sum("s", 0), full);
  EXPECT_THAT(engine.log(again).outcomes, IsEmpty());
  // Neither does a successor's contribution, which replaces its predecessor's.
  const StreamId reborn = engine.Join(0, 2);
  engine.Contribute(reborn, Sum("s", 0), {0, std::vector<double>(8, 2.0), {}});
  EXPECT_THAT(engine.log(reborn).outcomes, IsEmpty());
}

TEST(LimitsTest, NamesAndDescriptions) {
  const std::string longest(255, 'x');
  const std::string longer(256, 'x');
  Engine engine;
  Join join = MakeJoin(0, 1);
  join.id = {longest, longest};
  join.description = std::string(1024, 'd');
  EXPECT_FALSE(engine.log(engine.Join(join)).closed);
  join.id = {longer, "g"};
  ExpectLimit(engine.log(engine.Join(join)).closed_with, "max_name_bytes = 255");
  join.id = {"j", longer};
  ExpectLimit(engine.log(engine.Join(join)).closed_with, "max_name_bytes = 255");
  join.id = {"j", "g"};
  join.description += "d";
  ExpectLimit(engine.log(engine.Join(join)).closed_with, "max_description_bytes = 1024");
  EXPECT_FALSE(engine.log(engine.Join(0, 2, {BatchNormLayer(longest, 1)})).closed);
  ExpectLimit(engine.log(engine.Join(1, 2, {BatchNormLayer(longer, 1)})).closed_with, "max_name_bytes = 255");
}

TEST(LimitsTest, KeysNameLayersByOneTo255Bytes) {
  for (const size_t length : {0, 1, 255, 256}) {
    const bool good = length != 0 && length != 256;
    for (const bool blocked : {false, true}) {
      Engine engine;
      const StreamId worker = engine.Join(0, 2);
      FrameReceived frame;
      frame.stream = worker;
      const RoundKey key = Forward(std::string(length, 'x'), 0);
      if (blocked) {
        frame.blocked_on = {key};
      } else {
        frame.contributions.push_back({key, 0, BackwardRole::kRequired, {}, {}});
      }
      engine.On(frame);
      EXPECT_EQ(engine.log(worker).close_reason(), good ? "" : kMalformedFrame) << length;
    }
  }
}

// ---- The work of one event ------------------------------------------------------------------------------------------

// Rounds that end together, and are more than a turn has room for, end in several turns: each once, and none is lost.
TEST(TurnTest, RoundsThatALeaveCompletesComeInTurns) {
  Limits limits;
  limits.max_turn_bytes = 20'000;
  Engine engine(limits);
  const StreamId a = engine.Join(0, 2, {BatchNormLayer("wide", 500)});
  const StreamId b = engine.Join(1, 2);
  for (uint64_t sequence = 0; sequence < 50; ++sequence) {
    engine.Contribute(a, Forward("wide", sequence), {0, {}, {}, BackwardRole::kNone});
  }
  engine.Leave(b);
  const size_t first = engine.ended().size();
  EXPECT_GT(first, 0u);
  EXPECT_LT(first, 5u) << "8000 bytes each";
  EXPECT_LE(engine.coordinator().NextDeadline(), engine.now());
  engine.On(TimePassed());
  EXPECT_GT(engine.ended().size(), first);
  EXPECT_LT(engine.ended().size(), 10u);
  engine.Advance(absl::ZeroDuration());
  EXPECT_EQ(engine.ended().size(), 50u);
  for (uint64_t sequence = 0; sequence < 50; ++sequence) {
    EXPECT_EQ(ReasonOf(*engine.Outcome(a, Forward("wide", sequence))), "");
  }
}

// Errors are short, and each takes time nevertheless.
TEST(TurnTest, RoundsThatALossFailsComeInTurns) {
  Limits limits;
  limits.max_turn_bytes = 20'000;
  limits.default_rejoin_grace = absl::ZeroDuration();
  Engine engine(limits);
  const StreamId a = engine.Join(0, 2, {BatchNormLayer("narrow", 1)});
  const StreamId b = engine.Join(1, 2);
  for (uint64_t sequence = 0; sequence < 50; ++sequence) {
    engine.Contribute(a, Forward("narrow", sequence), {0, {}, {}, BackwardRole::kNone});
  }
  engine.Close(b);
  const size_t first = engine.ended().size();
  EXPECT_GT(first, 0u);
  EXPECT_LE(first, 10u);
  engine.Advance(absl::ZeroDuration());
  EXPECT_EQ(engine.ended().size(), 50u);
  for (uint64_t sequence = 0; sequence < 50; ++sequence) {
    EXPECT_EQ(ReasonOf(*engine.Outcome(a, Forward("narrow", sequence))), kWorkerLost);
  }
}

TEST(TurnTest, ResultsWaitForAReaderThatLagsAndErrorsDoNot) {
  Limits limits;
  limits.max_turn_bytes = 20'000;
  Engine engine(limits);
  const StreamId a = engine.Join(0, 3, {BatchNormLayer("wide", 500)});
  const StreamId b = engine.Join(1, 3);
  const StreamId c = engine.Join(2, 3);
  for (uint64_t sequence = 0; sequence < 50; ++sequence) {
    for (const StreamId worker : {a, b}) engine.Contribute(worker, Forward("wide", sequence), {0, {}, {}});
  }
  engine.On(ReaderLags{b, true});
  engine.Leave(c);
  EXPECT_TRUE(engine.ended().empty());
  EXPECT_GT(engine.coordinator().NextDeadline(), engine.now());
  engine.On(ReaderLags{b, false});
  engine.Advance(absl::ZeroDuration());
  EXPECT_EQ(engine.ended().size(), 50u);
  engine.Contribute(a, Forward("wide", 50), {0, {}, {}});
  engine.On(ReaderLags{a, true});
  engine.Close(b);
  engine.Advance(absl::Milliseconds(50));
  EXPECT_EQ(ReasonOf(*engine.Outcome(a, Forward("wide", 50))), kWorkerLost);
}

TEST(TurnTest, ManyExpireInTurnsAndNameSixtyFourRanks) {
  Engine engine;
  Join join = MakeJoin(0, 4096);
  join.config.round_timeout = absl::Milliseconds(10);
  const StreamId worker = engine.Join(join);
  engine.Declare(worker, {BatchNormLayer("bn", 1)});
  FrameReceived frame;
  frame.stream = worker;
  for (uint64_t sequence = 0; sequence < 8192; ++sequence) {
    frame.contributions.push_back({Forward("bn", sequence), 0, BackwardRole::kRequired, {}, {}});
  }
  engine.On(frame);
  engine.Advance(absl::Milliseconds(10));
  EXPECT_EQ(engine.log(worker).outcomes.size(), 8192u);
  EXPECT_GT(engine.log(worker).result_frames, 4u) << "in turns";
  const Error& error = *engine.Outcome(worker, Forward("bn", 0))->error;
  EXPECT_STREQ(error.reason, kRoundTimeout);
  EXPECT_EQ(error.ranks.size(), 64u);
  EXPECT_EQ(error.ranks.front(), 1u);
  EXPECT_EQ(error.rank_count, 4095u);
  EXPECT_THAT(error.message, HasSubstr("and 4087 more"));
}

TEST(LimitsTest, WhatAGroupMayDeclareIsBounded) {
  Engine engine;
  Join join = MakeJoin(0, 1);
  for (const absl::Duration timeout : {absl::Milliseconds(9), absl::Hours(25), -absl::Seconds(1)}) {
    join.config.round_timeout = timeout;
    EXPECT_EQ(engine.log(engine.Join(join)).close_reason(), kMalformedFrame);
  }
  join.config.round_timeout = absl::Milliseconds(10);
  for (const absl::Duration grace : {absl::Minutes(11), -absl::Nanoseconds(1)}) {
    join.config.rejoin_grace = grace;
    EXPECT_EQ(engine.log(engine.Join(join)).close_reason(), kMalformedFrame);
  }
  join.config.rejoin_grace = absl::Minutes(10);
  EXPECT_FALSE(engine.log(engine.Join(join)).closed);
}

}  // namespace
}  // namespace syncbn::core
