#include "client/c/kept_log.h"

#include <pthread.h>

#include <atomic>
#include <deque>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"

namespace syncbn {
namespace {

constexpr size_t kMostLines = 256;

struct Kept {
  std::mutex mutex;
  std::deque<LogLine> lines;
  size_t lost = 0;
  std::atomic<bool> any{false};
};

Kept& TheKept();

void LockForFork() { TheKept().mutex.lock(); }
void UnlockInParent() { TheKept().mutex.unlock(); }

// The lines are the parent's to tell.
void UnlockInChild() {
  Kept& kept = TheKept();
  kept.lines.clear();
  kept.lost = 0;
  kept.any = false;
  kept.mutex.unlock();
}

// Never destroyed: threads log until the process has ended.
Kept& TheKept() {
  static Kept* const kept = new Kept();
  static const int registered = pthread_atfork(LockForFork, UnlockInParent, UnlockInChild);
  (void)registered;
  return *kept;
}

}  // namespace

void KeepLogLine(LogLevel level, absl::string_view text) {
  Kept& kept = TheKept();
  const std::lock_guard<std::mutex> lock(kept.mutex);
  kept.any = true;
  if (kept.lines.size() >= kMostLines) {
    ++kept.lost;
    if (level == LogLevel::kDebug) return;
    kept.lines.pop_front();
  }
  kept.lines.push_back({level, std::string(text)});
}

std::optional<LogLine> TakeLogLine() {
  Kept& kept = TheKept();
  const std::lock_guard<std::mutex> lock(kept.mutex);
  if (const size_t lost = std::exchange(kept.lost, 0); lost > 0) {
    return LogLine{LogLevel::kWarning, absl::StrCat(lost, " lines of this log were lost, since nobody took them")};
  }
  std::optional<LogLine> line;
  if (!kept.lines.empty()) {
    line = std::move(kept.lines.front());
    kept.lines.pop_front();
  }
  kept.any = !kept.lines.empty();
  return line;
}

bool HasLogLine() { return TheKept().any; }

}  // namespace syncbn
