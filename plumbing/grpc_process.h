// Settings of gRPC that belong to a process, not to a channel or a server.

#ifndef SYNCBN_PLUMBING_GRPC_PROCESS_H_
#define SYNCBN_PLUMBING_GRPC_PROCESS_H_

namespace syncbn {

// Prepares the process for gRPC. The first call sends gRPC's log to the sink of log.h, turns off Abseil's search for
// locks that are taken in different orders (absl::SetMutexDeadlockDetectionMode), and, if the process has one thread,
// asks gRPC for larger read buffers through the environment variable GRPC_EXPERIMENTS, unless that is set.
//
// To be called before the first channel or server of the process.
// Thread safety: any thread may call it.
void PrepareGrpc();

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_GRPC_PROCESS_H_
