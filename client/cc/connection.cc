#include "client/cc/connection.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>

#include "absl/strings/str_cat.h"
#include "client/cc/credentials.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "plumbing/channel_arguments.h"
#include "plumbing/channel_sockets.h"
#include "plumbing/grpc_process.h"

namespace syncbn {
namespace {

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

}  // namespace

absl::StatusOr<ChannelMaker> ChannelMaker::Make(const Worker::TlsOptions& tls) {
  if (absl::Status status = CheckDescriptors(); !status.ok()) return status;
  if (absl::Status status = StartGrpc(); !status.ok()) return status;
  auto credentials = MakeCredentials(tls);
  if (!credentials.ok()) return credentials.status();
  return ChannelMaker(*std::move(credentials));
}

std::shared_ptr<grpc::Channel> ChannelMaker::Open(const std::string& target, absl::Duration connect_timeout) const {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMostFrameBytes);
  // A worker speaks to its master and to nobody between: http_proxy and its like are for web traffic.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  // The session begins again by itself. When a master has just been replaced, gRPC 1.51 repeats the call behind our
  // back, goes on with it, and yet lets the write fail.
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  arguments.SetInt(GRPC_ARG_DNS_MIN_TIME_BETWEEN_RESOLUTIONS_MS, 500);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 20);
  // Named for the backoff, it is the time that a connection may take.
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, static_cast<int>(absl::ToInt64Milliseconds(connect_timeout)));
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  SetTransportArguments(&arguments);
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

std::string Connection::MasterMetadata(const std::string& key) const {
  const auto& headers = context_.GetServerInitialMetadata();
  const auto found = headers.find(key);
  return found == headers.end() ? "" : std::string(found->second.data(), found->second.size());
}

void Connection::Ended(Kind kind) {
  --outstanding_;
  if (kind == Kind::kRead) reading_ = false;
  if (kind == Kind::kWrite) writing_ = false;
}

}  // namespace syncbn
