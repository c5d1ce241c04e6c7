// The certificates that a master shows and trusts, which may be replaced while it serves.

#ifndef SYNCBN_SERVER_RPC_SERVER_TLS_H_
#define SYNCBN_SERVER_RPC_SERVER_TLS_H_

#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpc/grpc_security.h"
#include "grpcpp/security/server_credentials.h"
#include "plumbing/tls.h"

namespace syncbn::rpc {

// Thread safety: all methods may be called from any thread.
class ServerTls : public std::enable_shared_from_this<ServerTls> {
 public:
  // Reads the files, of which certificate and key must be given. With a trusted CA, clients must show a certificate
  // that it signed. Errors: those of ReadTls.
  static absl::StatusOr<std::shared_ptr<ServerTls>> Load(TlsFiles files);

  // For one listening port; keeps this object alive.
  std::shared_ptr<grpc::ServerCredentials> MakeCredentials();

  // Reads the files again, for connections to come; open ones keep what they have. After an error nothing has changed.
  absl::Status Reload();

  absl::Time expiry() const;

 private:
  class Credentials;

  explicit ServerTls(TlsFiles files) : files_(std::move(files)) {}

  const TlsFiles files_;
  mutable absl::Mutex mutex_;
  TlsMaterial material_ ABSL_GUARDED_BY(mutex_);
  uint64_t version_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_SERVER_TLS_H_
