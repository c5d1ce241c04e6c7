// One Synchronize call: bytes in, bytes out, on a completion queue that others drive.

#ifndef SYNCBN_CLIENT_CC_CONNECTION_H_
#define SYNCBN_CLIENT_CC_CONNECTION_H_

#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/cc/worker.h"
#include "grpcpp/client_context.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/support/byte_buffer.h"

namespace syncbn {

// The longest frame of a master's that is read: twice what a master keeps for a worker to read by default.
inline constexpr int kMostFrameBytes = 128 << 20;

// Opens channels to the master, tuned for short frames and quick reconnection. Copies share their credentials.
//
// *Thread safety*: any thread may call any method.
class ChannelMaker {
 public:
  // Reads the files, and prepares the process for gRPC (see Worker::Join). *Errors*: INVALID_ARGUMENT for files that
  // cannot be used; RESOURCE_EXHAUSTED without free file descriptors.
  static absl::StatusOr<ChannelMaker> Make(const Worker::TlsOptions& tls);

  // Returns a new channel, which looks the target's name up again: a channel that has failed would do so only after
  // half a minute. `connect_timeout` is for one address.
  std::shared_ptr<grpc::Channel> Open(const std::string& target, absl::Duration connect_timeout) const;

 private:
  explicit ChannelMaker(std::shared_ptr<grpc::ChannelCredentials> credentials) : credentials_(std::move(credentials)) {}

  std::shared_ptr<grpc::ChannelCredentials> credentials_;
};

// Each operation ends as an event of the queue, whose tag is an Operation of this connection. At most one operation of
// each kind may be outstanding, and the connection must live until outstanding() is 0.
//
// *Thread safety*: none.
class Connection {
 public:
  enum class Kind { kStart, kRead, kWrite, kFinish };

  struct Operation {
    Connection* connection;
    Kind kind;
  };

  Connection(const std::shared_ptr<grpc::Channel>& channel, grpc::CompletionQueue* queue);

  // Before Start.
  void AddMetadata(const std::string& key, const std::string& value) { context_.AddMetadata(key, value); }
  void Start();
  void Read();
  void Write(const grpc::ByteBuffer& frame);
  void Finish();
  void Cancel() { context_.TryCancel(); }

  // Takes note of an event of the queue. To be called before anything else is done about it.
  void Ended(Kind kind);

  bool reading() const { return reading_; }
  bool writing() const { return writing_; }
  bool finishing() const { return finishing_; }
  int outstanding() const { return outstanding_; }

  // Returns the first value that the master has sent with its headers; empty if there is none. After a Read that
  // succeeded.
  std::string MasterMetadata(const std::string& key) const;
  // Returns the frame, after a Read that succeeded.
  grpc::ByteBuffer* incoming() { return &incoming_; }
  // Returns why the call ended, after Finish. Its error details are a serialized google.rpc.Status, if the master gave
  // one.
  const grpc::Status& status() const { return status_; }

 private:
  grpc::ClientContext context_;
  grpc::GenericStub stub_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
  Operation start_{this, Kind::kStart}, read_{this, Kind::kRead}, write_{this, Kind::kWrite},
      finish_{this, Kind::kFinish};
  grpc::ByteBuffer incoming_;
  grpc::Status status_;
  int outstanding_ = 0;
  bool reading_ = false;
  bool writing_ = false;
  bool finishing_ = false;
};

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_CONNECTION_H_
