// Settings of gRPC that belong to a process, not to a channel or a server.

#ifndef SYNCBN_PLUMBING_GRPC_PROCESS_H_
#define SYNCBN_PLUMBING_GRPC_PROCESS_H_

#include "absl/status/status.h"

namespace syncbn {

// Prepares the process for gRPC. The first call sends gRPC's log to the sink of log.h, turns off Abseil's search for
// locks that are taken in different orders (absl::SetMutexDeadlockDetectionMode), and, if the process has one thread,
// asks gRPC for larger read buffers through the environment variable GRPC_EXPERIMENTS, unless that is set.
//
// To be called before the first channel or server of the process.
// Thread safety: any thread may call it.
void PrepareGrpc();

// Prepares the process, starts gRPC, and keeps it until the process ends. gRPC ends the process if the first thread of
// a server is refused, and waits for other refused threads for ever when its last channel or server goes. Therefore its
// threads are tried first, and it is never shut down. Forked children of the process may not use gRPC from then on.
//
// To be called before each server and before the channels of each worker.
// Errors: RESOURCE_EXHAUSTED if the system does not grant the threads; gRPC is as it was.
// Thread safety: any thread may call it.
absl::Status StartGrpc();

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_GRPC_PROCESS_H_
