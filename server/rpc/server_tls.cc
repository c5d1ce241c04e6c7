#include "server/rpc/server_tls.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "grpc/grpc.h"
#include "plumbing/pem.h"

namespace syncbn::rpc {
namespace {

std::string Day(absl::Time time) { return absl::FormatTime("%Y-%m-%d %H:%M:%S UTC", time, absl::UTCTimeZone()); }

}  // namespace

// Credentials that gRPC's own classes do not offer: ones that ask at every handshake.
class ServerTls::Credentials final : public grpc::ServerCredentials {
 public:
  explicit Credentials(std::shared_ptr<ServerTls> tls) : tls_(std::move(tls)) {
    const auto request = tls_->files_.trusted_ca_file.empty()
                             ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                             : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY;
    credentials_ = grpc_ssl_server_credentials_create_with_options(
        grpc_ssl_server_credentials_create_options_using_config_fetcher(request, &Credentials::Fetch, this));
  }
  ~Credentials() override { grpc_server_credentials_release(credentials_); }

  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {}

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), credentials_);
  }

  static grpc_ssl_certificate_config_reload_status Fetch(void* self, grpc_ssl_server_certificate_config** config) {
    return static_cast<Credentials*>(self)->Fetch(config);
  }

  grpc_ssl_certificate_config_reload_status Fetch(grpc_ssl_server_certificate_config** config) {
    const absl::MutexLock lock(&tls_->mutex_);
    if (fetched_ == tls_->version_) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    const Pem& pem = tls_->pem_;
    const grpc_ssl_pem_key_cert_pair pair = {pem.key.c_str(), pem.certificate.c_str()};
    // gRPC 1.51 insists on roots, though it looks at them only where clients are asked for a certificate.
    const std::string& roots = pem.trusted_ca.empty() ? pem.certificate : pem.trusted_ca;
    *config = grpc_ssl_server_certificate_config_create(roots.c_str(), &pair, 1);
    fetched_ = tls_->version_;
    return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
  }

  const std::shared_ptr<ServerTls> tls_;
  grpc_server_credentials* credentials_;
  uint64_t fetched_ = 0;  // Guarded by tls_->mutex_.
};

absl::StatusOr<std::shared_ptr<ServerTls>> ServerTls::Load(TlsFiles files) {
  std::shared_ptr<ServerTls> tls(new ServerTls(std::move(files)));
  if (absl::Status status = tls->Reload(); !status.ok()) return status;
  return tls;
}

std::shared_ptr<grpc::ServerCredentials> ServerTls::MakeCredentials() {
  return std::make_shared<Credentials>(shared_from_this());
}

absl::Status ServerTls::Reload() {
  auto pem = Read(files_);
  if (!pem.ok()) return pem.status();
  const absl::MutexLock lock(&mutex_);
  pem_ = *std::move(pem);
  ++version_;
  return absl::OkStatus();
}

absl::Time ServerTls::expiry() const {
  const absl::MutexLock lock(&mutex_);
  return pem_.expiry;
}

absl::StatusOr<ServerTls::Pem> ServerTls::Read(const TlsFiles& files) {
  auto identity = ReadIdentity(files.cert_file, files.key_file);
  if (!identity.ok()) return identity.status();
  const absl::Time now = absl::Now();
  const Certificates& certificate = identity->certificate;
  const bool expired = certificate.not_after <= now;
  if (expired || certificate.not_before > now) {
    return absl::InvalidArgumentError(absl::StrCat("the certificate \"", files.cert_file, "\" ",
                                                   expired ? "expired on " : "is not valid before ",
                                                   Day(expired ? certificate.not_after : certificate.not_before)));
  }
  Pem pem = {certificate.pem, std::move(identity->key), "", certificate.not_after};
  if (files.trusted_ca_file.empty()) return pem;
  auto trusted = ReadCertificates("trusted CA", files.trusted_ca_file);
  if (!trusted.ok()) return trusted.status();
  pem.trusted_ca = std::move(trusted->pem);
  return pem;
}

}  // namespace syncbn::rpc
