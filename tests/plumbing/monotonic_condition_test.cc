// Waits for a condition: that signals end them, and time without one.

#include "plumbing/monotonic_condition.h"

#include <thread>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"

namespace syncbn {
namespace {

TEST(MonotonicConditionTest, AWaitWithoutASignalEnds) {
  absl::Mutex mutex;
  MonotonicCondition condition;
  const absl::MutexLock lock(&mutex);
  condition.WaitFor(&mutex, absl::Milliseconds(1));
  condition.WaitFor(&mutex, absl::ZeroDuration());
  condition.WaitFor(&mutex, -absl::InfiniteDuration());
}

TEST(MonotonicConditionTest, NoSignalIsLost) {
  absl::Mutex mutex;
  MonotonicCondition condition;
  int turn = 0;
  constexpr int kThreads = 3;
  constexpr int kTurns = 3000;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = 0; i < kTurns; ++i) {
        const absl::MutexLock lock(&mutex);
        while (turn % kThreads != thread) condition.Wait(&mutex);
        ++turn;
        condition.SignalAll();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(turn, kThreads * kTurns);
}

TEST(MonotonicConditionTest, ASleepEndsByTimeOrByWhatEndsIt) {
  absl::Mutex mutex;
  MonotonicCondition condition;
  bool ended = false;
  {
    const absl::MutexLock lock(&mutex);
    EXPECT_FALSE(condition.SleepUnless(&mutex, ended, absl::Milliseconds(1)));
  }
  std::thread sleeper([&] {
    const absl::MutexLock lock(&mutex);
    EXPECT_TRUE(condition.SleepUnless(&mutex, ended, absl::Hours(1)));
  });
  condition.SignalAll();  // Ends no sleep by itself.
  {
    const absl::MutexLock lock(&mutex);
    ended = true;
    condition.SignalAll();
  }
  sleeper.join();
}

TEST(MonotonicConditionTest, ItMayBeDestroyedAsSoonAsTheWaiterHasTheMutex) {
  for (int i = 0; i < 200; ++i) {
    absl::Mutex mutex;
    MonotonicCondition condition;
    bool done = false;
    std::thread waiter([&] {
      const absl::MutexLock lock(&mutex);
      while (!done) condition.WaitFor(&mutex, absl::Hours(1));
    });
    {
      const absl::MutexLock lock(&mutex);
      done = true;
      condition.SignalAll();
    }
    waiter.join();
  }
}

}  // namespace
}  // namespace syncbn
