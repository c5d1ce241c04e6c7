// The certificates that a master shows and trusts, which may change while it serves.

#ifndef SYNCBN_SERVER_RPC_SERVER_TLS_H_
#define SYNCBN_SERVER_RPC_SERVER_TLS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpc/grpc_security.h"
#include "grpcpp/security/server_credentials.h"

namespace syncbn::rpc {

struct TlsFiles {
  // PEM.
  std::string cert_file;
  std::string key_file;
  std::string trusted_ca_file;  // Not empty: clients must have a certificate that one of these signed.
};

// Thread safety: all methods may be called from any thread.
class ServerTls : public std::enable_shared_from_this<ServerTls> {
 public:
  // Reads the files. INVALID_ARGUMENT, naming the file, where one cannot be read, is not what it should be, has
  // expired, or where key and certificate do not belong together.
  static absl::StatusOr<std::shared_ptr<ServerTls>> Load(TlsFiles files);

  // For one listening port; keeps this object alive.
  std::shared_ptr<grpc::ServerCredentials> MakeCredentials();

  // Reads the files anew, for connections to come; those that are open keep what they have. After an error everything
  // is as it was.
  absl::Status Reload();

  // When the certificate expires.
  absl::Time expiry() const;

 private:
  struct Pem {
    std::string certificate, key, trusted_ca;
    absl::Time expiry;
  };
  class Credentials;

  explicit ServerTls(TlsFiles files) : files_(std::move(files)) {}
  static absl::StatusOr<Pem> Read(const TlsFiles& files);

  const TlsFiles files_;
  mutable absl::Mutex mutex_;
  Pem pem_ ABSL_GUARDED_BY(mutex_);
  uint64_t version_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_SERVER_TLS_H_
