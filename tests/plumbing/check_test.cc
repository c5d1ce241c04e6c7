#include "plumbing/check.h"

#include <string>

#include "gtest/gtest.h"

namespace syncbn {
namespace {

TEST(CheckTest, EvaluatesNoMessageWhileTheConditionHolds) {
  int messages = 0;
  const auto message = [&messages] { return std::to_string(++messages); };
  SYNCBN_CHECK(messages == 0);
  SYNCBN_CHECK(messages == 0, "message ", message());
  EXPECT_EQ(messages, 0);
}

TEST(CheckTest, EvaluatesTheConditionOnce) {
  int evaluated = 0;
  SYNCBN_CHECK(++evaluated != 0);
  EXPECT_EQ(evaluated, 1);
}

TEST(CheckTest, IsOneStatement) {
  bool otherwise = false;
  if (otherwise)
    SYNCBN_CHECK(false);
  else
    otherwise = true;
  EXPECT_TRUE(otherwise);
}

TEST(CheckDeathTest, NamesPlaceConditionAndMessage) {
  const int rank = 7;
  EXPECT_DEATH(SYNCBN_CHECK(rank < 4, "rank ", rank, " of ", 4),
               "syncbn: .*check_test\\.cc:[0-9]+: check failed: rank < 4: rank 7 of 4\n");
  EXPECT_DEATH(SYNCBN_CHECK(rank < 4), "check_test\\.cc:[0-9]+: check failed: rank < 4\n");
}

}  // namespace
}  // namespace syncbn
