// Strangers: who is refused by a job's token, by a life's key, and by the bound of generations.

#include <cstdint>
#include <string>

#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/error.h"
#include "tests/testing/engine.h"

namespace syncbn::core {
namespace {

using ::testing::ElementsAre;
using testing::Engine;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::MakeJoin;

Secret SecretOf(uint8_t first) {
  Secret::Digest digest = {};
  digest[0] = first;
  return Secret(digest);
}

Join JoinWith(Rank rank, uint32_t world_size, const Secret& token, const Secret& life_key = Secret()) {
  Join join = MakeJoin(rank, world_size);
  join.token = token;
  join.life_key = life_key;
  return join;
}

TEST(SecretTest, IsEqualOnlyInEveryByte) {
  EXPECT_EQ(Secret(), Secret());
  for (size_t i = 0; i < Secret::Digest().size(); ++i) {
    for (const uint8_t bit : {0x01, 0x80}) {
      Secret::Digest digest = {};
      digest[i] = bit;
      EXPECT_EQ(Secret(digest), Secret(digest));
      EXPECT_NE(Secret(digest), Secret(Secret::Digest()));
      EXPECT_NE(Secret(digest), Secret());
    }
  }
  EXPECT_NE(Secret(Secret::Digest()), Secret()) << "a digest of zeros is not an absent secret";
}

// ---- Tokens ---------------------------------------------------------------------------------------------------------

TEST(TokenTest, TheFirstJoinDecidesForItsJob) {
  Engine engine;
  const StreamId first = engine.Join(JoinWith(0, 3, SecretOf(1)));
  EXPECT_TRUE(engine.log(engine.Join(JoinWith(1, 3, SecretOf(1)))).joined.has_value());
  const StreamId wrong = engine.Join(JoinWith(2, 3, SecretOf(2)));
  const StreamId absent = engine.Join(JoinWith(2, 3, Secret()));
  for (const StreamId refused : {wrong, absent}) {
    EXPECT_EQ(engine.log(refused).close_reason(), kTokenMismatch);
    EXPECT_EQ(engine.log(refused).closed_with->code, absl::StatusCode::kUnauthenticated);
  }
  EXPECT_EQ(engine.log(wrong).closed_with->message, engine.log(absent).closed_with->message);
  EXPECT_THAT(engine.log(wrong).closed_with->message, HasSubstr("rank 2 joins group \"g\" of job \"j\""));
  EXPECT_FALSE(engine.log(first).closed);
}

TEST(TokenTest, AJobWithoutATokenTakesNone) {
  Engine engine;
  engine.Join(JoinWith(0, 2, Secret()));
  EXPECT_EQ(engine.log(engine.Join(JoinWith(1, 2, SecretOf(1)))).close_reason(), kTokenMismatch);
  EXPECT_TRUE(engine.log(engine.Join(JoinWith(1, 2, Secret()))).joined.has_value());
}

TEST(TokenTest, HoldsForEveryGroupOfTheJobAndForNoOtherJob) {
  Engine engine;
  engine.Join(JoinWith(0, 1, SecretOf(1)));
  for (const char* group : {"a", "z"}) {
    Join other = JoinWith(0, 1, SecretOf(2));
    other.id.group = group;
    EXPECT_EQ(engine.log(engine.Join(other)).close_reason(), kTokenMismatch);
    other.token = SecretOf(1);
    EXPECT_TRUE(engine.log(engine.Join(other)).joined.has_value());
  }
  for (const char* job : {"i", "jj", "k"}) {
    Join other = JoinWith(0, 1, SecretOf(2));
    other.id.job = job;
    EXPECT_TRUE(engine.log(engine.Join(other)).joined.has_value()) << job;
  }
}

TEST(TokenTest, AStrangerEndsNeitherGenerationNorRun) {
  Engine engine;
  const StreamId member = engine.Join(JoinWith(0, 1, SecretOf(1), SecretOf(9)));
  Join stranger = JoinWith(0, 1, SecretOf(2));
  stranger.generation = 1;
  EXPECT_EQ(engine.log(engine.Join(stranger)).close_reason(), kTokenMismatch);
  EXPECT_FALSE(engine.log(member).closed);
  engine.Close(member);  // The group has nobody for the moment, and still belongs to its job.
  EXPECT_EQ(engine.log(engine.Join(JoinWith(0, 1, Secret()))).close_reason(), kTokenMismatch);
  const StreamId back = engine.Reconnect(member);
  EXPECT_EQ(engine.log(back).joined->run_id, engine.log(member).joined->run_id);
}

TEST(TokenTest, IsForgottenWithTheJobsLastGroup) {
  Engine engine;
  engine.Close(engine.Join(JoinWith(0, 1, SecretOf(1))));
  engine.Advance(Limits().group_linger);
  EXPECT_THAT(engine.coordinator().ListGroups(), IsEmpty());
  EXPECT_TRUE(engine.log(engine.Join(JoinWith(0, 1, SecretOf(2)))).joined.has_value());
}

// ---- Life keys ------------------------------------------------------------------------------------------------------

TEST(LifeKeyTest, AReconnectRepeatsIt) {
  Engine engine;
  const StreamId worker = engine.Join(JoinWith(0, 2, Secret(), SecretOf(1)));
  const SendJoined& joined = *engine.log(worker).joined;
  for (const Secret& key : {Secret(), SecretOf(2)}) {
    Join thief = JoinWith(0, 2, Secret(), key);
    thief.incarnation = joined.incarnation;
    thief.run_id = joined.run_id;
    const StreamId refused = engine.Join(thief);
    EXPECT_EQ(engine.log(refused).close_reason(), kLifeKeyMismatch);
    EXPECT_EQ(engine.log(refused).closed_with->code, absl::StatusCode::kUnauthenticated);
    EXPECT_THAT(engine.log(refused).closed_with->ranks, ElementsAre(0));
  }
  EXPECT_FALSE(engine.log(worker).closed) << "a stranger has fenced it";
  const StreamId back = engine.Reconnect(worker);
  EXPECT_EQ(engine.log(back).joined->incarnation, joined.incarnation);
  EXPECT_EQ(engine.log(worker).close_reason(), kFenced);
}

TEST(LifeKeyTest, ALostRankIsGuardedToo) {
  Engine engine;
  const StreamId worker = engine.Join(JoinWith(0, 2, Secret(), SecretOf(1)));
  engine.Join(JoinWith(1, 2, Secret(), SecretOf(2)));
  engine.Close(worker);
  Join thief = JoinWith(0, 2, Secret(), SecretOf(3));
  thief.incarnation = engine.log(worker).joined->incarnation;
  thief.run_id = engine.log(worker).joined->run_id;
  EXPECT_EQ(engine.log(engine.Join(thief)).close_reason(), kLifeKeyMismatch);
  EXPECT_TRUE(engine.log(engine.Reconnect(worker)).joined.has_value());
}

TEST(LifeKeyTest, ASuccessorHasAKeyOfItsOwn) {
  Engine engine;
  const StreamId first = engine.Join(JoinWith(0, 1, Secret(), SecretOf(1)));
  engine.Close(first);
  const StreamId second = engine.Join(JoinWith(0, 1, Secret(), SecretOf(2)));
  engine.Close(second);
  Join thief = JoinWith(0, 1, Secret(), SecretOf(1));
  thief.incarnation = engine.log(second).joined->incarnation;
  thief.run_id = engine.log(second).joined->run_id;
  EXPECT_EQ(engine.log(engine.Join(thief)).close_reason(), kLifeKeyMismatch);
  EXPECT_TRUE(engine.log(engine.Reconnect(second)).joined.has_value());
}

TEST(LifeKeyTest, ARestartedMasterTakesTheKeyThatComesBackFirst) {
  Engine before, after;
  const StreamId worker = before.Join(JoinWith(0, 1, Secret(), SecretOf(1)));
  Join join = JoinWith(0, 1, Secret(), SecretOf(1));
  join.incarnation = before.log(worker).joined->incarnation;
  join.run_id = before.log(worker).joined->run_id;
  const StreamId back = after.Join(join);
  EXPECT_EQ(after.log(back).joined->incarnation, join.incarnation);
  join.life_key = SecretOf(2);
  EXPECT_EQ(after.log(after.Join(join)).close_reason(), kLifeKeyMismatch);
  EXPECT_TRUE(after.log(after.Reconnect(back)).joined.has_value());
}

TEST(LifeKeyTest, AWorkerWithoutOneReconnectsWithoutOne) {
  Engine engine;
  const StreamId worker = engine.Join(JoinWith(0, 1, Secret()));
  const StreamId back = engine.Reconnect(worker);
  EXPECT_TRUE(engine.log(back).joined.has_value());
}

// ---- Generations ----------------------------------------------------------------------------------------------------

TEST(GenerationTest, AJumpIsBounded) {
  Limits limits;
  limits.max_generation_jump = 10;
  Engine engine(limits);
  Join join = MakeJoin(0, 1);
  join.generation = 5;
  const StreamId member = engine.Join(join);
  join.generation = 16;
  const StreamId far = engine.Join(join);
  EXPECT_EQ(engine.log(far).close_reason(), kLimitExceeded);
  EXPECT_STREQ(engine.log(far).closed_with->limit, "max_generation_jump");
  EXPECT_THAT(engine.log(far).closed_with->message, HasSubstr("from 5 to 16"));
  join.generation = UINT64_MAX;
  EXPECT_EQ(engine.log(engine.Join(join)).close_reason(), kLimitExceeded);
  EXPECT_FALSE(engine.log(member).closed);
  join.generation = 15;
  EXPECT_TRUE(engine.log(engine.Join(join)).joined.has_value());
  EXPECT_EQ(engine.log(member).close_reason(), kGenerationSuperseded);
}

TEST(GenerationTest, ByDefaultARequeuedJobMayRaiseIt) {
  Engine engine;
  engine.Join(MakeJoin(0, 1));
  Join join = MakeJoin(0, 1);
  join.generation = uint64_t{3} << 32;
  EXPECT_TRUE(engine.log(engine.Join(join)).joined.has_value());
}

}  // namespace
}  // namespace syncbn::core
