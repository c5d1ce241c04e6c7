// Where lines for people go: what a program that embeds the library reads, filters and stores.

#ifndef SYNCBN_PLUMBING_LOG_H_
#define SYNCBN_PLUMBING_LOG_H_

#include <functional>

#include "absl/strings/string_view.h"

namespace syncbn {

// The numbers are those of Python's logging.
enum class LogLevel { kDebug = 10, kInfo = 20, kWarning = 30, kError = 40 };

// Receives one line, without a line end. Called on whatever thread has something to say, gRPC's own threads among them,
// several at a time, and with no lock of this library held. It may call the library.
using LogSink = std::function<void(LogLevel, absl::string_view line)>;

// Replaces the sink; null brings back the default, which writes warnings and errors to stderr, one line each. Returns
// when no other thread is within the sink before it; called from within a sink, it returns at once.
//
// gRPC's own log arrives at kDebug, whatever its severity: what of it concerns a caller comes as an error of a call.
// The route is laid by the first worker, the first master or the first SetLogSink of a process, and replaces a function
// that the program has given to gpr_set_log_function before.
//
// Thread safety: any thread may call it at any time, in a forked child too.
void SetLogSink(LogSink sink);

// Gives a line to the sink. Control characters (a line end in a peer's message, say) arrive as '?', so that a line
// stays a line.
void Log(LogLevel level, absl::string_view line);

// Sends gRPC's log to the sink. Idempotent.
void RouteGrpcLog();

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_LOG_H_
