#include "plumbing/grpc_process.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <memory>
#include <system_error>
#include <thread>

#include "absl/base/call_once.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "plumbing/forked.h"
#include "plumbing/log.h"
#include "plumbing/start_thread.h"

namespace syncbn {
namespace {

// gRPC 1.51 has a thread for each of 2 to 32 processors, and eight others.
int ThreadsOfGrpc() { return 8 + std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 2, 32); }
// The thread of a further server, and one for a timer.
constexpr int kFurtherThreads = 2;

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

absl::Status StartGrpc() {
  static absl::Mutex mutex(absl::kConstInit);
  static bool started = false;
  PrepareGrpc();
  const absl::MutexLock lock(&mutex);
  // Twice as many, since those that have been tried count for a moment after their end.
  const int threads = 2 * (started ? kFurtherThreads : ThreadsOfGrpc());
  if (absl::Status status = CheckThreads("gRPC", threads); !status.ok() || started) return status;
  const OpenHere forbidden_to_children;
  // A channel that never connects has gRPC keep its timers, executors and event engine.
  static const auto* const kept =
      new std::shared_ptr<grpc::Channel>(grpc::CreateChannel("unix:/dev/null", grpc::InsecureChannelCredentials()));
  started = *kept != nullptr;
  return absl::OkStatus();
}

}  // namespace syncbn
