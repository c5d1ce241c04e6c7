// A Synchronize call (or any other) as bytes: what a worker that is no client of ours would put on the wire.

#ifndef SYNCBN_TESTS_SERVER_RPC_RAW_STREAM_H_
#define SYNCBN_TESTS_SERVER_RPC_RAW_STREAM_H_

#include <memory>
#include <optional>
#include <string>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/security/credentials.h"
#include "syncbn/v1/statistics.pb.h"

namespace syncbn::testing {

inline constexpr char kSynchronize[] = "/syncbn.v1.StatisticsService/Synchronize";

// A connection of its own.
std::shared_ptr<grpc::Channel> Connect(const std::string& target,
                                       std::shared_ptr<grpc::ChannelCredentials> credentials = nullptr);

// One operation at a time, each of which ends within 30 seconds: a call that takes longer fails the test and is
// cancelled.
class RawStream {
 public:
  explicit RawStream(std::shared_ptr<grpc::Channel> channel, const std::string& method = kSynchronize);
  ~RawStream();
  RawStream(const RawStream&) = delete;
  RawStream& operator=(const RawStream&) = delete;

  // False: the call is over.
  bool WriteBytes(const std::string& bytes);
  bool Write(const google::protobuf::Message& frame) { return WriteBytes(frame.SerializeAsString()); }
  bool WritesDone();
  // The next frame as received; nothing at the end of the call.
  std::optional<std::string> ReadBytes();
  std::optional<v1::MasterFrame> Read();
  // Skips frames until one has results. `bytes`, if not null, receives it as it came.
  std::optional<v1::MasterFrame> ReadResults(std::string* bytes = nullptr);
  // Skips frames, then gives the call's status.
  grpc::Status Finish();
  void Cancel() { context_.TryCancel(); }

 private:
  bool Await();

  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  grpc::GenericStub stub_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
  bool finished_ = false;
};

// The google.rpc.ErrorInfo among the details; empty if there is none.
google::rpc::ErrorInfo InfoOf(const google::rpc::Status& status);
google::rpc::ErrorInfo InfoOf(const grpc::Status& status);

// Frames, as workers write them.
v1::WorkerFrame JoinFrame(const std::string& group, uint32_t rank, uint32_t world_size);
v1::LayerSpec BatchNormLayer(const std::string& name, uint32_t channels);
v1::LayerSpec SumLayer(const std::string& name, uint32_t elements);
v1::RoundKey Key(const std::string& layer, uint64_t sequence, v1::Phase phase);

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_SERVER_RPC_RAW_STREAM_H_
