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

// Opens channels to the master, tuned for short frames and quick reconnection. Copies share their credentials.
class ChannelMaker {
 public:
  // INVALID_ARGUMENT for files that cannot be used; RESOURCE_EXHAUSTED without free file descriptors. The first call
  // tunes the process too: see Worker::Join.
  static absl::StatusOr<ChannelMaker> Make(const Worker::TlsOptions& tls);

  // A new channel asks anew for the addresses of a name: one that has failed would ask again after half a minute only.
  // `connect_timeout`: for one address.
  std::shared_ptr<grpc::Channel> Open(const std::string& target, absl::Duration connect_timeout) const;

 private:
  explicit ChannelMaker(std::shared_ptr<grpc::ChannelCredentials> credentials) : credentials_(std::move(credentials)) {}

  std::shared_ptr<grpc::ChannelCredentials> credentials_;
};

// Must stay until outstanding() is 0: each of the operations below ends as an event of the queue, whose tag is an
// Operation of this connection. One operation of each kind at a time. Not thread-safe.
class Connection {
 public:
  enum class Kind { kStart, kRead, kWrite, kFinish };

  struct Operation {
    Connection* connection;
    Kind kind;
  };

  Connection(const std::shared_ptr<grpc::Channel>& channel, grpc::CompletionQueue* queue);

  void Start();
  void Read();
  void Write(const grpc::ByteBuffer& frame);
  void Finish();
  void Cancel() { context_.TryCancel(); }

  // To be called with each event before anything else.
  void Ended(Kind kind);

  bool reading() const { return reading_; }
  bool writing() const { return writing_; }
  bool finishing() const { return finishing_; }
  int outstanding() const { return outstanding_; }

  // After a Read that succeeded.
  grpc::ByteBuffer* incoming() { return &incoming_; }
  // After Finish: its error details are a serialized google.rpc.Status, if the master gave one.
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
