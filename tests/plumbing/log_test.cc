// The places that lines go to; nothing waits for a reader that never reads.

#include "plumbing/log.h"

#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "grpc/support/log.h"
#include "gtest/gtest.h"

namespace syncbn {
namespace {

using ::testing::ElementsAre;
using ::testing::Pair;

class LogTest : public ::testing::Test {
 protected:
  ~LogTest() override { SetLogSink(nullptr); }

  // Collects what comes from here on.
  void Collect() {
    SetLogSink([this](LogLevel level, absl::string_view line) {
      const absl::MutexLock lock(&mutex_);
      lines_.emplace_back(level, line);
    });
  }

  std::vector<std::pair<LogLevel, std::string>> lines() {
    const absl::MutexLock lock(&mutex_);
    return lines_;
  }

 private:
  absl::Mutex mutex_;
  std::vector<std::pair<LogLevel, std::string>> lines_;
};

TEST_F(LogTest, TheSinkGetsEveryLevel) {
  Collect();
  Log(LogLevel::kDebug, "a");
  Log(LogLevel::kInfo, "b");
  Log(LogLevel::kWarning, "c");
  Log(LogLevel::kError, "d");
  EXPECT_THAT(lines(), ElementsAre(Pair(LogLevel::kDebug, "a"), Pair(LogLevel::kInfo, "b"),
                                   Pair(LogLevel::kWarning, "c"), Pair(LogLevel::kError, "d")));
}

TEST_F(LogTest, ALineStaysALine) {
  Collect();
  Log(LogLevel::kWarning, "a\nsyncbn: error: forged\x1b[31m");
  EXPECT_THAT(lines(), ElementsAre(Pair(LogLevel::kWarning, "a?syncbn: error: forged?[31m")));
}

TEST_F(LogTest, GrpcSpeaksAtDebugLevel) {
  Collect();
  gpr_set_log_verbosity(GPR_LOG_SEVERITY_ERROR);
  gpr_log(GPR_ERROR, "something of gRPC's");
  EXPECT_THAT(lines(), ElementsAre(Pair(LogLevel::kDebug, "gRPC: something of gRPC's")));
}

TEST_F(LogTest, GrpcTellsOnStderrWhyItEndsTheProcess) {
  Collect();
  ::testing::internal::CaptureStderr();
  gpr_log(GPR_ERROR, "assertion failed: worker->created()");
  EXPECT_EQ(::testing::internal::GetCapturedStderr(),
            "syncbn: error: gRPC ends this process: assertion failed: worker->created()\n");
}

TEST_F(LogTest, WithoutASinkWarningsAndErrorsGoToStderr) {
  SetLogSink(nullptr);
  ::testing::internal::CaptureStderr();
  gpr_log(GPR_ERROR, "something of gRPC's");
  Log(LogLevel::kInfo, "a");
  Log(LogLevel::kWarning, "b");
  Log(LogLevel::kError, "c");
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "syncbn: warning: b\nsyncbn: error: c\n");
}

TEST_F(LogTest, ASinkMayLogAndReplaceItself) {
  Collect();
  int calls = 0;
  SetLogSink([&](LogLevel level, absl::string_view line) {
    ++calls;
    Collect();
    Log(level, line);
  });
  Log(LogLevel::kWarning, "a");
  Log(LogLevel::kWarning, "b");
  EXPECT_EQ(calls, 1);
  EXPECT_THAT(lines(), ElementsAre(Pair(LogLevel::kWarning, "a"), Pair(LogLevel::kWarning, "b")));
}

TEST_F(LogTest, WhoReplacesASinkWaitsForThoseWithinIt) {
  absl::Notification entered, go_on;
  bool returned = false;
  SetLogSink([&](LogLevel, absl::string_view) {
    entered.Notify();
    go_on.WaitForNotification();
    returned = true;  // Not atomic: the wait orders it.
  });
  std::thread logging([] { Log(LogLevel::kWarning, "a"); });
  entered.WaitForNotification();
  std::thread releasing([&] { go_on.Notify(); });
  SetLogSink(nullptr);
  EXPECT_TRUE(returned);
  logging.join();
  releasing.join();
}

TEST_F(LogTest, AChildForkedWhileOthersAreWithinTheSinkGoesOn) {
  absl::Notification entered, go_on;
  SetLogSink([&](LogLevel, absl::string_view) {
    if (!entered.HasBeenNotified()) {
      entered.Notify();
      go_on.WaitForNotification();
    }
  });
  std::thread logging([] { Log(LogLevel::kWarning, "a"); });
  entered.WaitForNotification();
  const pid_t child = fork();
  ASSERT_NE(child, -1);
  if (child == 0) {
    alarm(60);
    Log(LogLevel::kWarning, "b");
    SetLogSink(nullptr);  // The thread that is within the sink is not in this process.
    _exit(0);
  }
  int status = -1;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  go_on.Notify();
  logging.join();
}

}  // namespace
}  // namespace syncbn
