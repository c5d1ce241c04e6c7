// The threads of gRPC's executor, as the system shows them.

#include "server/rpc/executor_threads.h"

#include <pthread.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <thread>

#include "gtest/gtest.h"

namespace syncbn::rpc {
namespace {

// A thread of the executor's name.
class Executor {
 public:
  Executor()
      : thread_([this] {
          pthread_setname_np(pthread_self(), "default-executo");
          while (!ended_) {
            named_ = true;
            if (busy_) continue;
            timespec moment = {0, 1000};
            nanosleep(&moment, nullptr);
          }
        }) {
    while (!named_) std::this_thread::yield();
  }
  ~Executor() {
    ended_ = true;
    thread_.join();
  }

  void SetBusy(bool busy) { busy_ = busy; }

 private:
  std::atomic<bool> named_{false}, busy_{false}, ended_{false};
  std::thread thread_;
};

TEST(ExecutorThreadsTest, AreInTheSameCallAsLongAsTheyDoNotSleep) {
  Executor executor;
  ExecutorThreads threads;
  LoopTurn turn = threads.turns()[0];
  ASSERT_TRUE(turn.there && turn.in_grpc);
  const uint64_t asleep = turn.number;
  while (turn.number == asleep) turn = threads.turns()[0];
  executor.SetBusy(true);
  // It may sleep once more, after which only its time grows.
  LoopTurn busy = threads.turns()[0];
  while (busy.cpu - turn.cpu < absl::Milliseconds(20) || busy.number != turn.number) {
    if (busy.number != turn.number) turn = busy;
    busy = threads.turns()[0];
  }
  EXPECT_EQ(busy.number, turn.number);
  executor.SetBusy(false);
  while (busy.number == turn.number) busy = threads.turns()[0];
}

TEST(ExecutorThreadsTest, AreForgottenWhenTheyEnd) {
  ExecutorThreads threads;
  {
    Executor executor;
    while (!threads.turns()[0].there) std::this_thread::yield();
  }
  while (threads.turns()[0].there) std::this_thread::yield();
}

TEST(ExecutorThreadsTest, OthersAreNone) {
  std::atomic<bool> ended{false};
  std::thread other([&] {
    while (!ended) std::this_thread::yield();
  });
  EXPECT_FALSE(ExecutorThreads().turns()[0].there);
  ended = true;
  other.join();
}

}  // namespace
}  // namespace syncbn::rpc
