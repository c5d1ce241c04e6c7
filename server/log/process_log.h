// The log of a process of its own: lines on stderr.

#ifndef SYNCBN_SERVER_LOG_PROCESS_LOG_H_
#define SYNCBN_SERVER_LOG_PROCESS_LOG_H_

#include "plumbing/log.h"

namespace syncbn {

// From now on, lines given to Log() from this level up are written to stderr, each with its time (UTC) and level, in
// one write of at most 4096 bytes. Never waits: where nobody reads the other end of a pipe, lines are dropped, and
// counted once they can be written again. Bytes that are not printable are escaped. What protobuf would write to stderr
// by itself becomes lines of level kDebug, as gRPC's log does.
//
// The caller has SIGPIPE ignored. Once, from main.
void LogToStderr(LogLevel level);

}  // namespace syncbn

#endif  // SYNCBN_SERVER_LOG_PROCESS_LOG_H_
