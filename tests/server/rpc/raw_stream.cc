#include "tests/server/rpc/raw_stream.h"

#include <chrono>
#include <utility>
#include <vector>

#include "grpcpp/create_channel.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/channel_arguments.h"
#include "gtest/gtest.h"

namespace syncbn::testing {
namespace {

std::string ToString(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  std::string bytes;
  for (const grpc::Slice& slice : slices) bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  return bytes;
}

}  // namespace

std::shared_ptr<grpc::Channel> Connect(const std::string& target,
                                       std::shared_ptr<grpc::ChannelCredentials> credentials) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  // A window that does not grow: what the transport holds for a test that does not read is bounded.
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  arguments.SetMaxReceiveMessageSize(-1);
  if (credentials == nullptr) credentials = grpc::InsecureChannelCredentials();
  return grpc::CreateCustomChannel(target, credentials, arguments);
}

RawStream::RawStream(std::shared_ptr<grpc::Channel> channel, const std::string& method) : stub_(std::move(channel)) {
  call_ = stub_.PrepareCall(&context_, method, &queue_);
  call_->StartCall(this);
  Await();
}

RawStream::~RawStream() {
  Cancel();
  if (!finished_) Finish();
  queue_.Shutdown();
  void* tag = nullptr;
  bool ok = false;
  while (queue_.Next(&tag, &ok)) {
  }
}

bool RawStream::Await() {
  void* tag = nullptr;
  bool ok = false;
  const auto bound = std::chrono::system_clock::now() + std::chrono::seconds(30);
  if (queue_.AsyncNext(&tag, &ok, bound) == grpc::CompletionQueue::TIMEOUT) {
    ADD_FAILURE() << "an operation has not ended within 30 seconds";
    Cancel();
    queue_.Next(&tag, &ok);
  }
  return ok;
}

bool RawStream::WriteBytes(const std::string& bytes) {
  const grpc::Slice slice(bytes);
  call_->Write(grpc::ByteBuffer(&slice, 1), this);
  return Await();
}

bool RawStream::WritesDone() {
  call_->WritesDone(this);
  return Await();
}

std::optional<std::string> RawStream::ReadBytes() {
  grpc::ByteBuffer buffer;
  call_->Read(&buffer, this);
  if (!Await()) return std::nullopt;
  return ToString(buffer);
}

std::optional<v1::MasterFrame> RawStream::Read() {
  const std::optional<std::string> bytes = ReadBytes();
  if (!bytes.has_value()) return std::nullopt;
  v1::MasterFrame frame;
  EXPECT_TRUE(frame.ParseFromString(*bytes));
  return frame;
}

std::optional<v1::MasterFrame> RawStream::ReadResults(std::string* bytes) {
  while (const std::optional<std::string> next = ReadBytes()) {
    v1::MasterFrame frame;
    EXPECT_TRUE(frame.ParseFromString(*next));
    if (frame.results().empty()) continue;
    if (bytes != nullptr) *bytes = *next;
    return frame;
  }
  return std::nullopt;
}

grpc::Status RawStream::Finish() {
  while (ReadBytes().has_value()) {
  }
  grpc::Status status;
  call_->Finish(&status, this);
  Await();
  finished_ = true;
  return status;
}

google::rpc::ErrorInfo InfoOf(const google::rpc::Status& status) {
  google::rpc::ErrorInfo info;
  for (const google::protobuf::Any& detail : status.details()) {
    if (detail.UnpackTo(&info)) break;
  }
  return info;
}

google::rpc::ErrorInfo InfoOf(const grpc::Status& status) {
  google::rpc::Status details;
  EXPECT_TRUE(details.ParseFromString(status.error_details()));
  return InfoOf(details);
}

v1::WorkerFrame JoinFrame(const std::string& group, uint32_t rank, uint32_t world_size) {
  v1::WorkerFrame frame;
  v1::Join* const join = frame.mutable_join();
  join->set_min_protocol_version(1);
  join->set_max_protocol_version(1);
  join->set_group(group);
  join->set_rank(rank);
  join->set_world_size(world_size);
  return frame;
}

v1::LayerSpec BatchNormLayer(const std::string& name, uint32_t channels) {
  v1::LayerSpec layer;
  layer.set_name(name);
  layer.set_channels(channels);
  layer.set_kind(v1::LAYER_KIND_BATCH_NORM);
  layer.set_eps(1e-5);
  return layer;
}

v1::LayerSpec SumLayer(const std::string& name, uint32_t elements) {
  v1::LayerSpec layer;
  layer.set_name(name);
  layer.set_channels(elements);
  layer.set_kind(v1::LAYER_KIND_SUM);
  return layer;
}

v1::RoundKey Key(const std::string& layer, uint64_t sequence, v1::Phase phase) {
  v1::RoundKey key;
  key.set_layer(layer);
  key.set_sequence(sequence);
  key.set_phase(phase);
  return key;
}

}  // namespace syncbn::testing
