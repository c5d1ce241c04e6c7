// The certificates that a worker shows its master, and by which it recognizes the master.

#ifndef SYNCBN_CLIENT_CC_CREDENTIALS_H_
#define SYNCBN_CLIENT_CC_CREDENTIALS_H_

#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/cc/worker.h"
#include "grpcpp/security/credentials.h"

namespace syncbn {

// Returns credentials without TLS if no file is given. Errors: those of ReadTls.
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(const Worker::TlsOptions& tls);

// Returns whether a connection failed because TLS found no agreement, by gRPC's text. Trying again would not help.
bool IsTlsRefusal(absl::string_view message);

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_CREDENTIALS_H_
