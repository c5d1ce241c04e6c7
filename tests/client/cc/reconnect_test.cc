// Streams that break and masters that come back: rounds form again, and nothing is lost or counted twice.

#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/cc/worker_group.h"

namespace syncbn::testing {
namespace {

using ::testing::ElementsAre;

sockaddr_in Loopback(int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

// Passes bytes on between a worker and its master, one connection at a time, and can break it.
class Relay {
 public:
  explicit Relay(int master_port) : master_port_(master_port) {
    listener_ = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = Loopback(0);
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    EXPECT_EQ(listen(listener_, 8), 0);
    socklen_t length = sizeof(address);
    getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &length);
    port_ = ntohs(address.sin_port);
    EXPECT_EQ(pipe(wake_), 0);
    thread_ = std::thread([this] { Run(); });
  }

  ~Relay() {
    ending_ = true;
    Break();
    thread_.join();
    for (const int descriptor : {listener_, wake_[0], wake_[1]}) close(descriptor);
  }

  int port() const { return port_; }
  // Closes the connection there is. The next one is taken at once.
  void Break() { EXPECT_EQ(write(wake_[1], "x", 1), 1); }

 private:
  void Run() {
    while (!ending_) {
      pollfd ready[2] = {{listener_, POLLIN, 0}, {wake_[0], POLLIN, 0}};
      poll(ready, 2, -1);
      if (ready[1].revents != 0) Drain();
      if (ready[0].revents == 0) continue;
      const int worker = accept(listener_, nullptr, nullptr);
      const int master = socket(AF_INET, SOCK_STREAM, 0);
      const sockaddr_in address = Loopback(master_port_);
      if (connect(master, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) Pass(worker, master);
      close(worker);
      close(master);
    }
  }

  void Drain() {
    char byte;
    EXPECT_EQ(read(wake_[0], &byte, 1), 1);
  }

  void Pass(int worker, int master) {
    while (true) {
      pollfd ready[3] = {{worker, POLLIN, 0}, {master, POLLIN, 0}, {wake_[0], POLLIN, 0}};
      poll(ready, 3, -1);
      if (ready[2].revents != 0) {
        return Drain();
      }
      if (ready[0].revents != 0 && !Copy(worker, master)) return;
      if (ready[1].revents != 0 && !Copy(master, worker)) return;
    }
  }

  static bool Copy(int from, int to) {
    char buffer[65536];
    const ssize_t size = read(from, buffer, sizeof(buffer));
    return size > 0 && send(to, buffer, static_cast<size_t>(size), MSG_NOSIGNAL) == size;
  }

  const int master_port_;
  int listener_ = -1;
  int port_ = 0;
  int wake_[2] = {-1, -1};
  std::atomic<bool> ending_{false};
  std::thread thread_;
};

void Patient(Worker::Options& options) {
  options.rejoin_grace = absl::Seconds(60);
  options.round_timeout = absl::Seconds(60);
}

TEST(ReconnectTest, ABrokenStreamComesBackWithWhatIsUnanswered) {
  const auto master = StartMaster();
  Relay relay(master->port());
  Worker::Options options = WorkerOptions(absl::StrCat("127.0.0.1:", relay.port()), 0, 2);
  Patient(options);
  const auto first = JoinOrDie(options);
  options = WorkerOptions(master->target(), 1, 2);
  Patient(options);
  const auto second = JoinOrDie(options);
  const uint64_t run_id = first->run_id();
  for (int i = 0; i < 5; ++i) {
    std::thread waiting([&] {
      const auto sum = Sum(*first, "v", {1.0 + i});
      ASSERT_TRUE(sum.ok()) << sum.status();
      EXPECT_THAT(*sum, ElementsAre(11.0 + i));
    });
    AwaitArrival(*master, "v", 0);
    relay.Break();
    EXPECT_TRUE(Sum(*second, "v", {10.0}).ok());  // Before or after the other has come back.
    waiting.join();
  }
  EXPECT_EQ(first->incarnation(), 1u);
  EXPECT_EQ(first->run_id(), run_id);
}

TEST(ReconnectTest, ALongVectorGoesOnAfterABreak) {
  constexpr size_t kElements = size_t{12} << 20;
  const auto master = StartMaster();
  Relay relay(master->port());
  Worker::Options options = WorkerOptions(absl::StrCat("127.0.0.1:", relay.port()), 0, 2);
  Patient(options);
  const auto first = JoinOrDie(options);
  options = WorkerOptions(master->target(), 1, 2);
  Patient(options);
  const auto second = JoinOrDie(options);
  std::thread waiting([&] {
    const auto sum = Sum(*first, "v", std::vector<double>(kElements, 1.0));
    ASSERT_TRUE(sum.ok()) << sum.status();
    EXPECT_EQ(sum->back(), 3.0);
  });
  AwaitArrival(*master, "v#3", 0);
  relay.Break();
  const auto sum = Sum(*second, "v", std::vector<double>(kElements, 2.0));
  EXPECT_TRUE(sum.ok()) << sum.status();
  waiting.join();
}

TEST(ReconnectTest, ABreakBetweenRoundsGoesUnnoticed) {
  const auto master = StartMaster();
  Relay relay(master->port());
  const auto worker = JoinOrDie(WorkerOptions(absl::StrCat("127.0.0.1:", relay.port()), 0, 1));
  for (int i = 0; i < 5; ++i) {
    const auto sum = Sum(*worker, "v", {1.0 + i});
    ASSERT_TRUE(sum.ok()) << sum.status();
    relay.Break();
  }
}

TEST(ReconnectTest, RoundsFormAgainAfterTheMasterRestarts) {
  auto master = StartMaster();
  const int port = master->port();
  const auto workers = JoinAll(master->target(), 3, Patient);
  const uint64_t run_id = workers[0]->run_id();
  for (int restart = 0; restart < 3; ++restart) {
    // Two of three have contributed when the master goes.
    std::vector<std::thread> waiting;
    for (uint32_t rank = 0; rank < 2; ++rank) {
      waiting.emplace_back([&, rank] {
        const auto sum = Sum(*workers[rank], "v", {1.0});
        ASSERT_TRUE(sum.ok()) << sum.status();
        EXPECT_THAT(*sum, ElementsAre(12.0));
      });
      AwaitArrival(*master, "v", rank);
    }
    master.reset();
    master = StartMaster(port);
    ASSERT_NE(master, nullptr);
    EXPECT_TRUE(Sum(*workers[2], "v", {10.0}).ok());
    for (std::thread& thread : waiting) thread.join();
  }
  for (const auto& worker : workers) {
    EXPECT_EQ(worker->run_id(), run_id);
    EXPECT_EQ(worker->incarnation(), 1u);
  }
}

TEST(ReconnectTest, AMasterThatStaysAwayIsUnreachable) {
  auto master = StartMaster();
  Worker::Options options = WorkerOptions(master->target(), 0, 1);
  options.join_timeout = absl::Seconds(2);
  const auto worker = JoinOrDie(options);
  ASSERT_TRUE(Sum(*worker, "v", {1.0}).ok());
  master.reset();
  const absl::Status status = Sum(*worker, "v", {1.0}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_EQ(DetailsOf(status).reason, "UNREACHABLE");
}

TEST(ReconnectTest, ANewWorkerMayBeTheFirstAtAMasterThatStartsAnew) {
  auto master = StartMaster();
  const int port = master->port();
  const auto old = JoinOrDie(WorkerOptions(master->target(), 0, 2));
  {
    const auto other = JoinOrDie(WorkerOptions(master->target(), 1, 2));
    std::thread thread([&other] { EXPECT_TRUE(Sum(*other, "v", {1.0}).ok()); });
    EXPECT_TRUE(Sum(*old, "v", {1.0}).ok());
    thread.join();
    master.reset();
  }
  master = StartMaster(port);
  const auto fresh = JoinOrDie(WorkerOptions(master->target(), 1, 2));
  std::thread thread([&fresh] { EXPECT_TRUE(Sum(*fresh, "w", {1.0}).ok()); });
  EXPECT_TRUE(Sum(*old, "w", {1.0}).ok());
  thread.join();
}

}  // namespace
}  // namespace syncbn::testing
