#include "plumbing/grpc_process.h"

#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <system_error>

#include "absl/base/call_once.h"
#include "absl/synchronization/mutex.h"
#include "plumbing/log.h"

namespace syncbn {
namespace {

bool HasOneThread() {
  std::error_code error;
  std::filesystem::directory_iterator tasks("/proc/self/task", error);
  return !error && std::distance(begin(tasks), end(tasks)) == 1;
}

void Prepare() {
  RouteGrpcLog();
  // Debian's Abseil searches for deadlocks in release builds too, at each of the many locks that gRPC takes. The search
  // would cost a worker a sixth of its instructions.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  // Read into buffers that hold many frames. With those of 8 KiB, which gRPC would choose, every other frame of 256
  // channels arrives in two buffers, and the first of them sends a window update. gRPC reads the variable once; setting
  // it while other threads may read the environment is not safe.
  if (HasOneThread()) setenv("GRPC_EXPERIMENTS", "-tcp_read_chunks", /*overwrite=*/0);
}

}  // namespace

void PrepareGrpc() {
  static absl::once_flag once;
  absl::call_once(once, Prepare);
}

}  // namespace syncbn
