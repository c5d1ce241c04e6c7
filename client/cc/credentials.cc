#include "client/cc/credentials.h"

#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "plumbing/pem.h"

namespace syncbn {
namespace {

absl::Status AddIdentity(const Worker::TlsOptions& tls, grpc::SslCredentialsOptions* options) {
  if (tls.cert_file.empty() != tls.key_file.empty()) {
    return absl::InvalidArgumentError("a worker's certificate and its key come together, and one of them is missing");
  }
  if (tls.cert_file.empty()) return absl::OkStatus();
  auto identity = ReadIdentity(tls.cert_file, tls.key_file);
  if (!identity.ok()) return identity.status();
  options->pem_cert_chain = std::move(identity->certificate.pem);
  options->pem_private_key = std::move(identity->key);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(const Worker::TlsOptions& tls) {
  if (!tls.enabled()) return grpc::InsecureChannelCredentials();
  grpc::SslCredentialsOptions options;
  if (absl::Status status = AddIdentity(tls, &options); !status.ok()) return status;
  if (!tls.trusted_ca_file.empty()) {
    auto trusted = ReadCertificates("trusted CA", tls.trusted_ca_file);
    if (!trusted.ok()) return trusted.status();
    options.pem_root_certs = std::move(trusted->pem);
  }
  return grpc::SslCredentials(options);
}

bool IsTlsRefusal(absl::string_view message) {
  return absl::StrContains(message, "SSL_ERROR_SSL") || absl::StrContains(message, "andshake failed") ||
         absl::StrContains(message, "Hostname Verification") || absl::StrContains(message, "not in peer certificate");
}

}  // namespace syncbn
