#include "client/cc/connection.h"

#include <fstream>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"

namespace syncbn {
namespace {

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  if (path.empty()) return std::string();
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) return absl::InvalidArgumentError(absl::StrCat("cannot read \"", path, "\""));
  return text.str();
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(const Worker::TlsOptions& tls) {
  if (!tls.enabled()) return grpc::InsecureChannelCredentials();
  grpc::SslCredentialsOptions options;
  for (const auto& [path, text] :
       {std::pair{&tls.trusted_ca_file, &options.pem_root_certs}, std::pair{&tls.cert_file, &options.pem_cert_chain},
        std::pair{&tls.key_file, &options.pem_private_key}}) {
    auto content = ReadFile(*path);
    if (!content.ok()) return content.status();
    *text = *std::move(content);
  }
  return grpc::SslCredentials(options);
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const std::string& target, const Worker::TlsOptions& tls) {
  const auto credentials = MakeCredentials(tls);
  if (!credentials.ok()) return credentials.status();
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);  // What arrives is bounded by what the worker's own layers declare.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 20);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 30000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20000);
  arguments.SetInt("grpc.experimental.tcp_read_chunk_size", 65536);
  arguments.SetInt("grpc.experimental.tcp_min_read_chunk_size", 65536);
  return grpc::CreateCustomChannel(target, *credentials, arguments);
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
