// Threads that drive a completion queue, and those that are added while one is kept.

#include "server/rpc/queue_threads.h"

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "grpcpp/alarm.h"
#include "gtest/gtest.h"

namespace syncbn::rpc {
namespace {

class QueueThreadsTest : public ::testing::Test {
 protected:
  // An event that is handled by `handle`.
  class Event final : public Tag {
   public:
    Event(grpc::CompletionQueue* queue, std::function<void()> handle) : handle_(std::move(handle)) {
      alarm_.Set(queue, gpr_inf_past(GPR_CLOCK_MONOTONIC), static_cast<Tag*>(this));
    }
    void Proceed(bool) override { handle_(); }

   private:
    const std::function<void()> handle_;
    grpc::Alarm alarm_;
  };

  void TearDown() override {
    queue_.Shutdown();
    threads_->Join();
  }

  void Start(absl::Duration linger = absl::Minutes(5)) {
    threads_ = std::make_unique<QueueThreads>(
        &clock_,
        [](Tag* tag, bool ok) {
          if (tag != nullptr) tag->Proceed(ok);
          return absl::InfiniteFuture();
        },
        [this] {
          if (!left_.exchange(true)) gone_.Notify();
        },
        linger);
    ASSERT_TRUE(threads_->Start(&queue_).ok());
  }
  void Add(std::function<void()> handle) { events_.push_back(std::make_unique<Event>(&queue_, std::move(handle))); }
  // Returns whether an event is handled. It may take as long as it likes if one is.
  bool HandlesAnEvent() {
    const auto handled = std::make_shared<absl::Notification>();
    Add([handled] { handled->Notify(); });
    return handled->WaitForNotificationWithTimeout(absl::Minutes(1));
  }
  int CountThere() const {
    int count = 0;
    for (const LoopTurn& turn : threads_->turns()) count += turn.there ? 1 : 0;
    return count;
  }

  const Clock clock_;
  grpc::CompletionQueue queue_;
  std::vector<std::unique_ptr<Event>> events_;
  std::atomic<bool> left_{false};
  absl::Notification gone_;
  std::unique_ptr<QueueThreads> threads_;
};

TEST_F(QueueThreadsTest, AnotherThreadGoesOnWhileOneIsKept) {
  Start();
  const auto kept = std::make_shared<absl::Notification>(), released = std::make_shared<absl::Notification>();
  Add([=] {
    kept->Notify();
    released->WaitForNotification();
  });
  kept->WaitForNotification();
  threads_->Relieve(/*add=*/true);
  EXPECT_TRUE(HandlesAnEvent());
  const auto turns = threads_->turns();
  EXPECT_TRUE(turns[0].there && !turns[0].in_grpc);
  EXPECT_EQ(turns[0].number % 2, 1u);
  EXPECT_EQ(CountThere(), 2);
  released->Notify();
}

TEST_F(QueueThreadsTest, NoMoreThanItsPlaces) {
  Start();
  for (size_t i = 0; i < 3 * LoopProgress::kMostThreads; ++i) threads_->Relieve(/*add=*/true);
  while (CountThere() < static_cast<int>(LoopProgress::kMostThreads)) std::this_thread::yield();
  EXPECT_TRUE(HandlesAnEvent());
}

TEST_F(QueueThreadsTest, NoneIsAddedUnlessAsked) {
  Start();
  ASSERT_TRUE(HandlesAnEvent());
  threads_->Relieve(/*add=*/false);
  EXPECT_EQ(CountThere(), 1);
}

TEST_F(QueueThreadsTest, AThreadThatWasAddedLeaves) {
  Start(/*linger=*/absl::Milliseconds(1));
  threads_->Relieve(/*add=*/true);
  ASSERT_TRUE(gone_.WaitForNotificationWithTimeout(absl::Minutes(1)));
  while (CountThere() > 1) std::this_thread::yield();
  EXPECT_TRUE(HandlesAnEvent());
}

TEST_F(QueueThreadsTest, PlacesAreTakenAgain) {
  Start(/*linger=*/absl::ZeroDuration());
  for (int i = 0; i < 20; ++i) threads_->Relieve(/*add=*/i % 2 == 0);
  threads_->Relieve(/*add=*/true);
  EXPECT_TRUE(HandlesAnEvent());
}

}  // namespace
}  // namespace syncbn::rpc
