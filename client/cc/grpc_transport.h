// Frames over gRPC: each stream is a Synchronize call on a channel of its own.

#ifndef SYNCBN_CLIENT_CC_GRPC_TRANSPORT_H_
#define SYNCBN_CLIENT_CC_GRPC_TRANSPORT_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "client/cc/connection.h"
#include "client/cc/transport.h"
#include "grpcpp/alarm.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/support/slice.h"

namespace syncbn {

// The waiting thread drives the completion queue itself, so that an answer wakes no thread but the one that wants it.
class GrpcTransport final : public Transport {
 public:
  using Header = std::pair<std::string, std::string>;

  explicit GrpcTransport(ChannelMaker channels) : channels_(std::move(channels)) {}
  ~GrpcTransport() override;

  void Open(const std::string& target, absl::Duration connect_timeout) override { Open(target, connect_timeout, {}); }
  // The same, with metadata for the master.
  void Open(const std::string& target, absl::Duration connect_timeout, absl::Span<const Header> metadata);
  // Returns the first value of this name in the master's metadata; empty if there is none. While a frame is handled.
  std::string MasterMetadata(const std::string& name) const { return connection_->MasterMetadata(name); }
  void Close() override;
  bool IsUp() const override;
  bool Write(absl::Span<const Buffer> parts) override;
  void Read() override;
  void Wait(absl::Time deadline) override;
  // Returns whether the last Wait has found something for Take.
  bool found() const { return tag_ != nullptr; }
  void Take(absl::FunctionRef<void(const Event&)> handle) override;
  void Wake() override;

 private:
  // Gives the current connection up. It stays until its last event.
  void Retire();
  void HandleOperation(Connection::Kind kind, bool ok, absl::FunctionRef<void(const Event&)> handle);
  void HandleFrame(absl::FunctionRef<void(const Event&)> handle);

  const ChannelMaker channels_;
  grpc::CompletionQueue queue_;
  grpc::Alarm alarm_;
  bool alarm_pending_ = false;
  std::unique_ptr<Connection> connection_;
  bool started_ = false;  // The connection has become a stream.
  std::vector<std::unique_ptr<Connection>> retired_;
  std::vector<grpc::Slice> outgoing_;  // Empty but within Write.
  // The event that the last Wait found; a null tag if it found none.
  void* tag_ = nullptr;
  bool ok_ = false;
};

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_GRPC_TRANSPORT_H_
