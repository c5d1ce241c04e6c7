// Lines of the log that wait for someone to take them.

#ifndef SYNCBN_CLIENT_C_KEPT_LOG_H_
#define SYNCBN_CLIENT_C_KEPT_LOG_H_

#include <optional>
#include <string>

#include "absl/strings/string_view.h"
#include "plumbing/log.h"

namespace syncbn {

struct LogLine {
  LogLevel level;
  std::string text;
};

// Keeps a line. When the place for 256 is full, lines of kDebug are dropped, and others replace the oldest; the next
// line that is taken says how many were lost. Thread safety: any thread may call this and the functions below.
void KeepLogLine(LogLevel level, absl::string_view text);

// The oldest line, which is then no longer kept. A forked child begins with none.
std::optional<LogLine> TakeLogLine();

// Returns whether TakeLogLine would give one; takes no lock.
bool HasLogLine();

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_C_KEPT_LOG_H_
