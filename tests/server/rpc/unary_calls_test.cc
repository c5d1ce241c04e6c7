// The answers that callers have not read: how much they may be, and how long they may take. And calls in a row.

#include "server/rpc/unary_calls.h"

#include <string>

#include "absl/time/time.h"
#include "gtest/gtest.h"

namespace syncbn::rpc {
namespace {

constexpr size_t kTurnBytes = size_t{512} << 10;

class UnaryCallsTest : public ::testing::Test {
 protected:
  struct FakeCall final : UnaryCalls::Call {
    void Cancel() override { ++cancelled; }
    int cancelled = 0;
  };

  // Calls come until there is a pause, up to `most`. Returns how many have come.
  int TakeCalls(int most) {
    int taken = 0;
    while (taken < most && !calls_.pausing()) {
      ++taken;
      calls_.Take([this] { ++awaited_; });
    }
    return taken;
  }

  int awaited_ = 0;
  absl::Time now_ = absl::FromUnixSeconds(1'700'000'000);
  UnaryCalls calls_{&now_, /*connections=*/nullptr, kTurnBytes};
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

TEST_F(UnaryCallsTest, AnAnswerForWhichThereIsHardlyRoomNeedNotBeMade) {
  EXPECT_TRUE(calls_.CheckRoom("a").ok());
  EXPECT_TRUE(calls_.Admit(&first_, "a", size_t{13} << 20).ok());
  EXPECT_EQ(calls_.CheckRoom("a").error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(calls_.CheckRoom("b").ok());
  calls_.Forget(&first_);
  EXPECT_TRUE(calls_.CheckRoom("a").ok());
}

TEST_F(UnaryCallsTest, UnreadAnswersToManyLeaveHardlyRoomForAnyone) {
  FakeCall calls[4];
  for (FakeCall& call : calls) {
    EXPECT_TRUE(calls_.CheckRoom("new").ok());
    EXPECT_TRUE(calls_.Admit(&call, std::string(1, static_cast<char>('a' + (&call - calls))), size_t{13} << 20).ok());
  }
  EXPECT_EQ(calls_.CheckRoom("new").error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  for (FakeCall& call : calls) calls_.Forget(&call);
  EXPECT_TRUE(calls_.CheckRoom("new").ok());
}

// ---- Calls in a row -------------------------------------------------------------------------------------------------

TEST_F(UnaryCallsTest, FewCallsAreTakenInARow) {
  EXPECT_EQ(TakeCalls(1000), 32);
  EXPECT_EQ(awaited_, 31);
  EXPECT_FALSE(calls_.idle());
  calls_.EndTurn(/*quiet=*/false, /*idle=*/false);
  EXPECT_TRUE(calls_.pausing());
  calls_.EndTurn(/*quiet=*/true, /*idle=*/false);
  EXPECT_FALSE(calls_.pausing());
  EXPECT_EQ(awaited_, 32);
  EXPECT_TRUE(calls_.idle());
}

TEST_F(UnaryCallsTest, AfterALongAnswerTheNextCallWaitsForTheSockets) {
  EXPECT_EQ(TakeCalls(1), 1);
  EXPECT_TRUE(calls_.Admit(&first_, "a", size_t{2} << 20).ok());
  EXPECT_EQ(TakeCalls(1000), 1);
  calls_.EndTurn(/*quiet=*/true, /*idle=*/false);
  EXPECT_TRUE(calls_.pausing());
  calls_.EndTurn(/*quiet=*/true, /*idle=*/true);
  EXPECT_FALSE(calls_.pausing());
  calls_.Forget(&first_);
}

TEST_F(UnaryCallsTest, AnAnswerThatIsRefusedOnceItIsMadeTakesItsTimeToo) {
  EXPECT_TRUE(calls_.Admit(&first_, "a", size_t{11} << 20).ok());
  calls_.EndTurn(/*quiet=*/true, /*idle=*/true);
  EXPECT_FALSE(calls_.Admit(&second_, "a", size_t{11} << 20).ok());
  EXPECT_EQ(TakeCalls(1000), 1);
  calls_.EndTurn(/*quiet=*/true, /*idle=*/true);
  calls_.Forget(&first_);
}

TEST_F(UnaryCallsTest, AQueueThatIsNeverQuietDelaysCallsForAWhile) {
  EXPECT_EQ(TakeCalls(1000), 32);
  now_ += absl::Milliseconds(9);
  calls_.EndTurn(/*quiet=*/false, /*idle=*/false);
  EXPECT_TRUE(calls_.pausing());
  now_ += absl::Milliseconds(1);
  calls_.EndTurn(/*quiet=*/false, /*idle=*/false);
  EXPECT_FALSE(calls_.pausing());
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
