// The order in which two threads take turns.

#include "server/rpc/turn_lock.h"

#include <unistd.h>

#include <atomic>
#include <fstream>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace syncbn::rpc {
namespace {

// Returns whether the system says that the thread sleeps.
bool Sleeps(pid_t thread) {
  std::string stat;
  std::getline(std::ifstream(absl::StrCat("/proc/self/task/", thread, "/stat")), stat);
  const size_t end_of_name = stat.rfind(") ");
  return end_of_name != std::string::npos && stat[end_of_name + 2] == 'S';
}

TEST(TurnLockTest, AThreadThatTakesTurnAfterTurnLeavesTheNextToOneThatWaits) {
  TurnLock lock;
  for (int i = 0; i < 100; ++i) {
    std::atomic<pid_t> waiter{0};
    std::atomic<bool> had_its_turn{false};
    lock.Lock();
    std::thread other([&] {
      waiter = gettid();
      const Turn turn(&lock);
      had_its_turn = true;
    });
    while (waiter == 0 || !Sleeps(waiter)) std::this_thread::yield();
    lock.Unlock();
    lock.Lock();
    EXPECT_TRUE(had_its_turn) << i;
    lock.Unlock();
    other.join();
  }
}

TEST(TurnLockTest, OneThreadHasItAtATime) {
  constexpr int kTurns = 20000;
  TurnLock lock;
  int turns = 0;
  const auto take = [&] {
    for (int i = 0; i < kTurns; ++i) {
      const Turn turn(&lock);
      ++turns;
    }
  };
  std::thread other(take);
  take();
  other.join();
  EXPECT_EQ(turns, 2 * kTurns);
}

}  // namespace
}  // namespace syncbn::rpc
