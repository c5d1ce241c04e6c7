// Collects the library's log while a test runs.

#ifndef SYNCBN_TESTS_SERVER_RPC_LOG_COLLECTOR_H_
#define SYNCBN_TESTS_SERVER_RPC_LOG_COLLECTOR_H_

#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "plumbing/log.h"

namespace syncbn::testing {

// Collects the lines of level kInfo and above. One at a time.
class LogCollector {
 public:
  LogCollector() {
    SetLogSink([this](LogLevel level, absl::string_view line) {
      if (level < LogLevel::kInfo) return;
      const absl::MutexLock lock(&mutex_);
      lines_.emplace_back(line);
    });
  }
  ~LogCollector() { SetLogSink(nullptr); }

  // Waits for a line with this text.
  bool Sees(const std::string& text) {
    const absl::MutexLock lock(&mutex_);
    const auto seen = [&] {
      mutex_.AssertHeld();
      for (const std::string& line : lines_) {
        if (absl::StrContains(line, text)) return true;
      }
      return false;
    };
    return mutex_.AwaitWithTimeout(absl::Condition(&seen), absl::Minutes(1));
  }

  size_t Count(const std::string& text) {
    const absl::MutexLock lock(&mutex_);
    size_t count = 0;
    for (const std::string& line : lines_) count += absl::StrContains(line, text) ? 1 : 0;
    return count;
  }

  // All of it, for the message of a test that fails.
  std::string Text() {
    const absl::MutexLock lock(&mutex_);
    return absl::StrCat("\nlogged:\n", absl::StrJoin(lines_, "\n"));
  }

 private:
  absl::Mutex mutex_;
  std::vector<std::string> lines_;
};

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_SERVER_RPC_LOG_COLLECTOR_H_
