#include "client/cc/credentials.h"

#include <utility>

#include "absl/strings/match.h"
#include "plumbing/tls.h"

namespace syncbn {

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(const Worker::TlsOptions& tls) {
  if (!tls.enabled()) return grpc::InsecureChannelCredentials();
  auto material = ReadTls({tls.cert_file, tls.key_file, tls.trusted_ca_file});
  if (!material.ok()) return material.status();
  grpc::SslCredentialsOptions options;
  options.pem_cert_chain = std::move(material->certificate);
  options.pem_private_key = std::move(material->key);
  options.pem_root_certs = std::move(material->trusted_ca);
  return grpc::SslCredentials(options);
}

bool IsTlsRefusal(absl::string_view message) {
  return absl::StrContains(message, "SSL_ERROR_SSL") || absl::StrContains(message, "andshake failed") ||
         absl::StrContains(message, "Hostname Verification") || absl::StrContains(message, "not in peer certificate");
}

}  // namespace syncbn
