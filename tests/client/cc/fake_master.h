// A master that does what a test tells it, for what no honest one does.

#ifndef SYNCBN_TESTS_CLIENT_CC_FAKE_MASTER_H_
#define SYNCBN_TESTS_CLIENT_CC_FAKE_MASTER_H_

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "google/protobuf/any.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "syncbn/v1/statistics.grpc.pb.h"

namespace syncbn::testing {

using FakeStream = grpc::ServerReaderWriter<v1::MasterFrame, v1::WorkerFrame>;

// Runs `script` for each stream, on a thread of gRPC's; what it returns ends the stream.
class FakeMaster final : public v1::StatisticsService::Service {
 public:
  using Script = std::function<grpc::Status(grpc::ServerContext*, FakeStream*)>;

  explicit FakeMaster(std::function<grpc::Status(FakeStream*)> script)
      : FakeMaster([script = std::move(script)](grpc::ServerContext*, FakeStream* stream) { return script(stream); }) {}
  explicit FakeMaster(Script script) : script_(std::move(script)) {
    int port = 0;
    grpc::ServerBuilder builder;
    builder.SetMaxSendMessageSize(-1);
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    EXPECT_NE(server_, nullptr);
    target_ = absl::StrCat("127.0.0.1:", port);
  }

  ~FakeMaster() override { server_->Shutdown(std::chrono::system_clock::now()); }

  const std::string& target() const { return target_; }

  grpc::Status Synchronize(grpc::ServerContext* context, FakeStream* stream) override {
    return script_(context, stream);
  }

 private:
  const Script script_;
  std::unique_ptr<grpc::Server> server_;
  std::string target_;
};

// Reads the join and answers it.
inline bool Welcome(FakeStream* stream) {
  v1::WorkerFrame join;
  if (!stream->Read(&join)) return false;
  v1::MasterFrame frame;
  v1::Joined* const joined = frame.mutable_joined();
  joined->set_protocol_version(1);
  joined->set_incarnation(1);
  joined->set_run_id(1);
  joined->mutable_config()->mutable_round_timeout()->set_seconds(60);
  joined->mutable_membership()->set_world_size(1);
  joined->mutable_membership()->add_present_ranks(0);
  return stream->Write(frame);
}

// The next frame that has a contribution; nothing at the stream's end.
inline bool AwaitContribution(FakeStream* stream, v1::WorkerFrame* frame) {
  while (stream->Read(frame)) {
    if (frame->contributions_size() > 0) return true;
  }
  return false;
}

// The status of a call as a master gives it, with an ErrorInfo.
inline grpc::Status CallError(grpc::StatusCode code, const std::string& message, const std::string& reason,
                              const std::string& ranks) {
  google::rpc::ErrorInfo info;
  info.set_domain("syncbn");
  info.set_reason(reason);
  (*info.mutable_metadata())["ranks"] = ranks;
  google::rpc::Status status;
  status.set_code(static_cast<int>(code));
  status.set_message(message);
  status.add_details()->PackFrom(info);
  return grpc::Status(code, message, status.SerializeAsString());
}

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_CLIENT_CC_FAKE_MASTER_H_
