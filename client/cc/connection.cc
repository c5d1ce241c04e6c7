#include "client/cc/connection.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <system_error>

#include "absl/base/call_once.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "client/cc/credentials.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "plumbing/channel_sockets.h"
#include "plumbing/log.h"

namespace syncbn {
namespace {

// Twice what a master keeps for a worker to read by default.
constexpr int kMostFrameBytes = 128 << 20;

bool HasOneThread() {
  std::error_code error;
  std::filesystem::directory_iterator tasks("/proc/self/task", error);
  return !error && std::distance(begin(tasks), end(tasks)) == 1;
}

// gRPC ends the process if it cannot open what it needs for a first connection.
absl::Status CheckDescriptors() {
  constexpr int kNeeded = 16;
  int opened[kNeeded];
  int count = 0;
  while (count < kNeeded && (opened[count] = open("/dev/null", O_RDONLY | O_CLOEXEC)) >= 0) ++count;
  const bool exhausted = count < kNeeded && (errno == EMFILE || errno == ENFILE);
  for (int i = 0; i < count; ++i) close(opened[i]);
  if (!exhausted) return absl::OkStatus();
  rlimit limit = {};
  getrlimit(RLIMIT_NOFILE, &limit);
  return absl::ResourceExhaustedError(absl::StrCat("a worker needs ", kNeeded,
                                                   " free file descriptors, and this process ", "has ", count,
                                                   " (limit ", limit.rlim_cur, ", see ulimit -n)"));
}

// What cannot be said by a channel's arguments.
void TuneProcess() {
  RouteGrpcLog();
  // Debian's Abseil looks for locks taken in an order that could block, in each of the many that gRPC takes: a sixth of
  // a worker's instructions. Elsewhere it does so in debugging builds alone.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  // Reads into buffers that hold many frames: one that arrives in two buffers sends a window update of its own. gRPC
  // looks for this in the environment, once; only a process of one thread may change that.
  if (HasOneThread()) setenv("GRPC_EXPERIMENTS", "-tcp_read_chunks", /*overwrite=*/0);
}

}  // namespace

absl::StatusOr<ChannelMaker> ChannelMaker::Make(const Worker::TlsOptions& tls) {
  static absl::once_flag once;
  absl::call_once(once, TuneProcess);
  if (absl::Status status = CheckDescriptors(); !status.ok()) return status;
  auto credentials = MakeCredentials(tls);
  if (!credentials.ok()) return credentials.status();
  return ChannelMaker(*std::move(credentials));
}

std::shared_ptr<grpc::Channel> ChannelMaker::Open(const std::string& target, absl::Duration connect_timeout) const {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMostFrameBytes);
  // A worker speaks to its master and to nobody between: http_proxy and its like are for web traffic.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_DNS_MIN_TIME_BETWEEN_RESOLUTIONS_MS, 500);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 20);
  // Named for the backoff, it is the time that a connection may take.
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, static_cast<int>(absl::ToInt64Milliseconds(connect_timeout)));
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 30000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20000);
  arguments.SetInt("grpc.experimental.tcp_read_chunk_size", 131072);
  arguments.SetInt("grpc.experimental.tcp_min_read_chunk_size", 131072);
  GiveUpSocketsInForkedChildren(&arguments);
  return grpc::CreateCustomChannel(target, credentials_, arguments);
}

Connection::Connection(const std::shared_ptr<grpc::Channel>& channel, grpc::CompletionQueue* queue) : stub_(channel) {
  call_ = stub_.PrepareCall(&context_, "/syncbn.v1.StatisticsService/Synchronize", queue);
}

void Connection::Start() {
  ++outstanding_;
  call_->StartCall(&start_);
}

void Connection::Read() {
  reading_ = true;
  ++outstanding_;
  call_->Read(&incoming_, &read_);
}

void Connection::Write(const grpc::ByteBuffer& frame) {
  writing_ = true;
  ++outstanding_;
  call_->Write(frame, &write_);
}

void Connection::Finish() {
  finishing_ = true;
  ++outstanding_;
  call_->Finish(&status_, &finish_);
}

void Connection::Ended(Kind kind) {
  --outstanding_;
  if (kind == Kind::kRead) reading_ = false;
  if (kind == Kind::kWrite) writing_ = false;
}

}  // namespace syncbn
