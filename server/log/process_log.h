// The log of a program of its own: lines on stderr.

#ifndef SYNCBN_SERVER_LOG_PROCESS_LOG_H_
#define SYNCBN_SERVER_LOG_PROCESS_LOG_H_

#include "plumbing/log.h"

namespace syncbn {

enum class LogFormat { kText, kJson };

// Writes the lines that Log() is given from now on, from this level up, to stderr: each with its time (UTC) and level,
// in one write of at most 4096 bytes. In JSON, each line is an object with the members time, level, message and those
// of the line's fields, all of them strings. Never blocks: if nobody reads the other end of a pipe, lines are dropped,
// and their number is logged once writing is possible again. Escapes unprintable bytes. Messages that protobuf would
// write to stderr become lines of level kDebug, as gRPC's do.
//
// To be called once, from main, with SIGPIPE ignored.
void LogToStderr(LogLevel level, LogFormat format = LogFormat::kText);

}  // namespace syncbn

#endif  // SYNCBN_SERVER_LOG_PROCESS_LOG_H_
