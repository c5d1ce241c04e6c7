// Log lines for people, which a program that embeds the library can read, filter and store.

#ifndef SYNCBN_PLUMBING_LOG_H_
#define SYNCBN_PLUMBING_LOG_H_

#include <functional>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace syncbn {

// The numbers are those of Python's logging.
enum class LogLevel { kDebug = 10, kInfo = 20, kWarning = 30, kError = 40 };

// Receives one line, without a line end. May be called by any thread, gRPC's among them, and by several at a time, with
// no lock of this library held. It may call the library.
using LogSink = std::function<void(LogLevel, absl::string_view line)>;

// A fact of a line for programs that read logs: "rank", "3".
struct LogField {
  const char* name = "";
  std::string value;
};

// A line with its facts. The text says all that people need to know.
struct LogRecord {
  LogLevel level = LogLevel::kInfo;
  absl::string_view text;
  absl::Span<const LogField> fields;
};

// Receives lines with their facts; otherwise as LogSink.
using LogRecordSink = std::function<void(const LogRecord&)>;

// Replaces the sink; null restores the default, which writes warnings and errors to stderr, one line each. Returns once
// no other thread is within the previous sink; called from within a sink, it returns at once.
//
// gRPC's log arrives at kDebug, whatever its severity: errors that concern a caller are returned by calls. A line with
// which gRPC ends the process also goes to stderr, at once, whatever the sink. The first
// worker, master or SetLogSink of a process redirects that log, and replaces a function that the program has given to
// gpr_set_log_function before.
//
// Thread safety: any thread may call it at any time, in a forked child too.
void SetLogSink(LogSink sink);

// The same, for a sink that takes the facts of a line too. There is one sink, of either kind.
void SetLogRecordSink(LogRecordSink sink);

// Gives a line to the sink. Replaces control characters, such as a line end in a peer's message, by '?'.
void Log(LogLevel level, absl::string_view line, absl::Span<const LogField> fields = {});

// Sends gRPC's log to the sink. Idempotent.
void RouteGrpcLog();

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_LOG_H_
