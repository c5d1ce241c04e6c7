// A wall clock that is set back while something waits: it still ends by its deadline.

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <string>

#include "gtest/gtest.h"
#include "plumbing/bounded_file.h"
#include "server/master_server.h"
#include "tests/server/rpc/raw_stream.h"

namespace {

std::atomic<time_t> set_back_by_s{0};
std::atomic<time_t> further_each_time_s{0};

}  // namespace

// In place of the C library's: the wall clock is as late as the test says, the others are as they are.
extern "C" int clock_gettime(clockid_t id, timespec* time) noexcept {
  const int result = static_cast<int>(syscall(SYS_clock_gettime, id, time));
  if (result == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) {
    time->tv_sec -= set_back_by_s.fetch_add(further_each_time_s);
  }
  return result;
}

namespace syncbn::testing {
namespace {

TEST(ClockTest, ADeadlineComesThoughTheWallClockIsSetBack) {
  MasterServer::Options options;
  options.addresses = {"127.0.0.1:0"};
  auto server = MasterServer::Start(std::move(options));
  ASSERT_TRUE(server.ok()) << server.status();
  RawStream stream(Connect((*server)->target()));
  v1::WorkerFrame frame = JoinFrame("g", 0, 2);
  frame.mutable_join()->mutable_config()->mutable_round_timeout()->set_nanos(100'000'000);
  *frame.add_layers() = SumLayer("v", 1);
  *frame.add_contributions()->mutable_key() = Key("v", 0, v1::PHASE_SUM);
  frame.mutable_contributions(0)->mutable_vector()->add_value(1.0);
  ASSERT_TRUE(stream.Write(frame));
  ASSERT_TRUE(stream.Read().has_value());  // Its round has begun.
  const time_t before = time(nullptr);
  set_back_by_s = 3600;
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  ASSERT_LT(now.tv_sec, before);
  const auto answer = stream.ReadResults();  // For at most 30 seconds.
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(InfoOf(answer->results(0).error()).reason(), "ROUND_TIMEOUT");
}

TEST(ClockTest, APipeHasToEndInTimeThoughTheWallClockRunsBackwards) {
  const std::string path = std::string(std::getenv("TEST_TMPDIR")) + "/pipe";
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  const int writer = open(path.c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_GE(writer, 0);
  further_each_time_s = 3600;
  const auto read = ReadBoundedFile("key", path, 3, absl::Milliseconds(100));
  further_each_time_s = 0;
  EXPECT_EQ(read.status().code(), absl::StatusCode::kInvalidArgument);
  close(writer);
}

}  // namespace
}  // namespace syncbn::testing
