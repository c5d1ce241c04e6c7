// The answers that callers have not read: how much they may be, and how long they may take.

#include "server/rpc/unary_calls.h"

#include "absl/time/time.h"
#include "gtest/gtest.h"

namespace syncbn::rpc {
namespace {

class UnaryCallsTest : public ::testing::Test {
 protected:
  struct FakeCall final : UnaryCalls::Call {
    void Cancel() override { ++cancelled; }
    int cancelled = 0;
  };

  absl::Time now_ = absl::FromUnixSeconds(1'700'000'000);
  UnaryCalls calls_{&now_, /*connections=*/nullptr};
  FakeCall first_, second_;
};

TEST_F(UnaryCallsTest, EmptyAnswersToOneAddressAreForgottenOneByOne) {
  EXPECT_TRUE(calls_.Admit(&first_, "a", 0).ok());
  EXPECT_TRUE(calls_.Admit(&second_, "a", 0).ok());
  calls_.Forget(&first_);
  EXPECT_NE(calls_.NextTimer(), absl::InfiniteFuture());
  calls_.Forget(&second_);
  EXPECT_EQ(calls_.NextTimer(), absl::InfiniteFuture());
}

TEST_F(UnaryCallsTest, UnreadAnswersLeaveNoRoomUntilTheyAreForgotten) {
  constexpr size_t kMuch = size_t{10} << 20;
  EXPECT_TRUE(calls_.Admit(&first_, "a", kMuch).ok());
  EXPECT_FALSE(calls_.Admit(&second_, "a", kMuch).ok());
  EXPECT_TRUE(calls_.Admit(&second_, "b", kMuch).ok());
  calls_.Forget(&second_);
  calls_.Forget(&first_);
  EXPECT_TRUE(calls_.Admit(&second_, "a", kMuch).ok());
}

TEST_F(UnaryCallsTest, WhatIsUnreadForTooLongIsCancelledOnce) {
  EXPECT_TRUE(calls_.Admit(&first_, "a", 1).ok());
  now_ = calls_.NextTimer();
  calls_.RunTimers();
  calls_.RunTimers();
  EXPECT_EQ(first_.cancelled, 1);
  calls_.Forget(&first_);
}

}  // namespace
}  // namespace syncbn::rpc
