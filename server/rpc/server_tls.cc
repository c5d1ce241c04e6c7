#include "server/rpc/server_tls.h"

#include <string>
#include <utility>

#include "grpc/grpc.h"

namespace syncbn::rpc {

// Credentials that fetch the certificates at every handshake, which gRPC's own classes do not offer.
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
    const TlsMaterial material = tls_->material_;
    const grpc_ssl_pem_key_cert_pair pair = {material.key.c_str(), material.certificate.c_str()};
    // gRPC 1.51 demands roots, though it reads them only if clients are asked for a certificate.
    const std::string& roots = material.trusted_ca.empty() ? material.certificate : material.trusted_ca;
    *config = grpc_ssl_server_certificate_config_create(roots.c_str(), &pair, 1);
    fetched_ = tls_->version_;
    return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
  }

  const std::shared_ptr<ServerTls> tls_;
  grpc_server_credentials* credentials_;
  uint64_t fetched_ ABSL_GUARDED_BY(tls_->mutex_) = 0;
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
  auto material = ReadTls(files_);
  if (!material.ok()) return material.status();
  const absl::MutexLock lock(&mutex_);
  material_ = *std::move(material);
  ++version_;
  return absl::OkStatus();
}

absl::Time ServerTls::expiry() const {
  const absl::MutexLock lock(&mutex_);
  return material_.expiry;
}

}  // namespace syncbn::rpc
