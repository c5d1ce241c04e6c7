// Credentials: what a worker shows its master, and what it recognizes the master by.

#ifndef SYNCBN_CLIENT_CC_CREDENTIALS_H_
#define SYNCBN_CLIENT_CC_CREDENTIALS_H_

#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/cc/worker.h"
#include "grpcpp/security/credentials.h"

namespace syncbn {

// INVALID_ARGUMENT, naming the file, for one that cannot be read or does not hold what it should, for a certificate
// without its key, and for a key that belongs to another certificate: gRPC would find that out at each connection, and
// tell of an "empty address list".
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(const Worker::TlsOptions& tls);

// Returns whether a connection failed because TLS found no agreement, from gRPC's text. Trying again meets the same.
bool IsTlsRefusal(absl::string_view message);

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_CREDENTIALS_H_
