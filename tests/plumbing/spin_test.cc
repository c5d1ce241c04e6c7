#include "plumbing/spin.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <optional>

#include "gtest/gtest.h"

namespace syncbn {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;

// Virtual time, which only looks and yields spend.
struct Machine {
  std::chrono::steady_clock::time_point now{};
  size_t processors = 2;
  nanoseconds yield = microseconds(2);
  int yields = 0;
};

class FakeSystem {
 public:
  using Clock = std::chrono::steady_clock;

  explicit FakeSystem(Machine* machine) : machine_(machine) {}

  Clock::time_point Now() const { return machine_->now; }
  size_t processors() const { return machine_->processors; }
  void Relax() const { machine_->now += nanoseconds(50); }
  void Yield() const {
    ++machine_->yields;
    machine_->now += machine_->yield;
  }

 private:
  Machine* const machine_;
};

class SpinTest : public ::testing::Test {
 protected:
  struct Wait {
    bool found = false;
    int looks = 0;
    int yields = 0;
  };

  // Waits for what is ready after `time`, and sleeps until then if spinning does not find it.
  Wait For(nanoseconds time, size_t waiting_for = 2) {
    const auto begun = machine_.now;
    const int yields = machine_.yields;
    Wait wait;
    wait.found = spin_->Until(
        [&] {
          ++wait.looks;
          return machine_.now - begun >= time;
        },
        waiting_for);
    if (!wait.found) {
      machine_.now = std::max(machine_.now, begun + time);
      spin_->Slept();
    }
    wait.yields = machine_.yields - yields;
    return wait;
  }

  // Returns how many waits follow that do not yield, before the first that does.
  int WaitsWithoutYield() {
    int waits = 0;
    while (For(microseconds(20)).yields == 0) ++waits;
    return waits;
  }

  Machine machine_;
  std::optional<BasicSpin<FakeSystem>> spin_{FakeSystem(&machine_)};
};

TEST_F(SpinTest, WhatIsReadyIsFoundAtFirstSight) {
  const Wait wait = For(nanoseconds(0), 100);
  EXPECT_TRUE(wait.found);
  EXPECT_EQ(wait.looks, 1);
  EXPECT_EQ(wait.yields, 0);
}

TEST_F(SpinTest, AWaitYieldsBetweenLooksWhereOthersNeedEveryProcessor) {
  const Wait wait = For(microseconds(50));
  EXPECT_TRUE(wait.found);
  EXPECT_GT(wait.yields, 10);
  EXPECT_GT(wait.looks, wait.yields);
}

TEST_F(SpinTest, AWaitKeepsItsProcessorWhereAnotherIsFree) {
  const Wait wait = For(microseconds(50), /*waiting_for=*/1);
  EXPECT_TRUE(wait.found);
  EXPECT_EQ(wait.yields, 0);
  EXPECT_GT(wait.looks, 10);
}

TEST_F(SpinTest, AWaitEndsInVainAndTheNextSleepsAtOnce) {
  for (const size_t waiting_for : {1, 2}) {
    spin_.emplace(FakeSystem(&machine_));
    const auto begun = machine_.now;
    EXPECT_FALSE(For(microseconds(500), waiting_for).found);
    EXPECT_LE(machine_.now - begun, microseconds(500)) << "a spin is longer than what it may replace";
    EXPECT_EQ(For(microseconds(50), waiting_for).looks, 1);
  }
}

TEST_F(SpinTest, NoWaitSpinsWhileWaitsAreLong) {
  For(milliseconds(10));
  For(milliseconds(10));
  EXPECT_EQ(For(microseconds(10)).looks, 1);
  for (int i = 0; i < 10; ++i) For(microseconds(10));
  EXPECT_TRUE(For(microseconds(10)).found) << "the waits of late were short";
}

TEST_F(SpinTest, ManyWaitsSleepAtOnceAfterALongYield) {
  machine_.yield = microseconds(200);
  const Wait wait = For(microseconds(20));
  EXPECT_EQ(wait.yields, 1) << "one such yield is enough for a wait";
  EXPECT_TRUE(wait.found) << "what the wait was for came meanwhile";
  EXPECT_EQ(For(microseconds(20)).looks, 1);
  EXPECT_EQ(WaitsWithoutYield(), 31 - 1);
}

TEST_F(SpinTest, ALongerYieldIsMadeUpForByMoreWaits) {
  machine_.yield = milliseconds(4);
  EXPECT_EQ(WaitsWithoutYield(), 0);
  EXPECT_EQ(WaitsWithoutYield(), 80);
  EXPECT_GE(WaitsWithoutYield(), 3 * 80) << "once more in vain";
}

TEST_F(SpinTest, LongYieldsInARowMakeThemRare) {
  machine_.yield = milliseconds(1);
  int last = WaitsWithoutYield();
  EXPECT_EQ(last, 0);
  for (int i = 0; i < 12; ++i) {
    const int waits = WaitsWithoutYield();
    EXPECT_TRUE(waits > last || last == 16383) << waits << " after " << last;
    last = waits;
  }
  EXPECT_EQ(last, 16383);
}

TEST_F(SpinTest, ShortYieldsMakeUpForALongOne) {
  machine_.yield = milliseconds(1);
  EXPECT_EQ(WaitsWithoutYield(), 0);
  EXPECT_EQ(WaitsWithoutYield(), 31);
  machine_.yield = microseconds(2);
  EXPECT_EQ(WaitsWithoutYield(), 3 * 31);
  for (int i = 0; i < 50; ++i) EXPECT_TRUE(For(microseconds(20)).found);
  machine_.yield = milliseconds(1);
  EXPECT_EQ(WaitsWithoutYield(), 0);
  EXPECT_EQ(WaitsWithoutYield(), 31) << "as after the first one";
}

// Eight processes on two processors have their turns half as often as four.
TEST_F(SpinTest, AWaitForMoreProcessesMayTakeLongerAndYieldForLonger) {
  machine_.yield = microseconds(250);
  const Wait wait = For(microseconds(700), /*waiting_for=*/8);
  EXPECT_TRUE(wait.found);
  EXPECT_EQ(wait.yields, 3);
  spin_.emplace(FakeSystem(&machine_));
  EXPECT_EQ(For(microseconds(700), /*waiting_for=*/4).yields, 1) << "something else has the processor";
}

TEST_F(SpinTest, SixteenProcessesAreTheMostThatAWaitYieldsFor) {
  EXPECT_TRUE(For(microseconds(1500), /*waiting_for=*/16).found);
  EXPECT_FALSE(For(microseconds(1700), /*waiting_for=*/16).found);
  spin_.emplace(FakeSystem(&machine_));
  const Wait wait = For(microseconds(50), /*waiting_for=*/100);
  EXPECT_FALSE(wait.found);
  EXPECT_EQ(wait.looks, 1);
  EXPECT_EQ(wait.yields, 0);
}

}  // namespace
}  // namespace syncbn
