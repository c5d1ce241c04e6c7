#include "server/rpc/server_tls.h"

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <cerrno>
#include <cstring>
#include <ctime>
#include <fstream>
#include <sstream>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "grpc/grpc.h"

namespace syncbn::rpc {
namespace {

using X509Pointer = std::unique_ptr<X509, decltype(&X509_free)>;
using KeyPointer = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;
using BioPointer = std::unique_ptr<BIO, decltype(&BIO_free)>;

absl::Status Unusable(absl::string_view what, const std::string& path, absl::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat("the ", what, " \"", path, "\" ", why));
}

absl::StatusOr<std::string> ReadFile(absl::string_view what, const std::string& path) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  file.peek();  // A folder can be opened, and not be read.
  if (file.is_open() && !file.bad() && !file.eof()) text << file.rdbuf();
  if (!file.is_open() || file.bad()) {
    const int error = errno;
    return absl::InvalidArgumentError(absl::StrCat("cannot read the ", what, " \"", path, "\"", error == 0 ? "" : ": ",
                                                   error == 0 ? "" : absl::AsciiStrToLower(std::strerror(error))));
  }
  return text.str();
}

// All certificates of the text; empty where one of them cannot be parsed.
std::vector<X509Pointer> ParseCertificates(const std::string& pem) {
  const BioPointer bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())), BIO_free);
  std::vector<X509Pointer> certificates;
  while (X509* const certificate = PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr)) {
    certificates.emplace_back(certificate, X509_free);
  }
  const unsigned long error = ERR_peek_last_error();
  ERR_clear_error();
  if (ERR_GET_REASON(error) != PEM_R_NO_START_LINE) certificates.clear();
  return certificates;
}

// Asks nobody for a passphrase, as the library would do on the terminal.
int NoPassphrase(char*, int, int, void*) { return -1; }

KeyPointer ParseKey(const std::string& pem) {
  const BioPointer bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())), BIO_free);
  KeyPointer key(PEM_read_bio_PrivateKey(bio.get(), nullptr, NoPassphrase, nullptr), EVP_PKEY_free);
  ERR_clear_error();
  return key;
}

absl::Time TimeOf(const ASN1_TIME* time) {
  std::tm parts = {};
  return ASN1_TIME_to_tm(time, &parts) == 1 ? absl::FromTM(parts, absl::UTCTimeZone()) : absl::InfinitePast();
}

std::string Day(absl::Time time) { return absl::FormatTime("%Y-%m-%d %H:%M:%S UTC", time, absl::UTCTimeZone()); }

}  // namespace

// What gRPC's own classes do not offer: credentials that ask at every handshake.
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
  Pem pem;
  auto text = ReadFile("certificate", files.cert_file);
  if (!text.ok()) return text.status();
  pem.certificate = *std::move(text);
  const std::vector<X509Pointer> chain = ParseCertificates(pem.certificate);
  if (chain.empty()) return Unusable("certificate", files.cert_file, "has no PEM block of a CERTIFICATE, or a bad one");
  pem.expiry = TimeOf(X509_get0_notAfter(chain.front().get()));
  if (pem.expiry <= absl::Now()) {
    return Unusable("certificate", files.cert_file, absl::StrCat("expired on ", Day(pem.expiry)));
  }
  if (const absl::Time begin = TimeOf(X509_get0_notBefore(chain.front().get())); begin > absl::Now()) {
    return Unusable("certificate", files.cert_file, absl::StrCat("is not valid before ", Day(begin)));
  }
  text = ReadFile("key", files.key_file);
  if (!text.ok()) return text.status();
  pem.key = *std::move(text);
  const KeyPointer key = ParseKey(pem.key);
  if (key == nullptr) {
    return Unusable("key", files.key_file, "has no PEM block of a PRIVATE KEY that can be read without a passphrase");
  }
  const bool match = X509_check_private_key(chain.front().get(), key.get()) == 1;
  ERR_clear_error();
  if (!match) {
    return Unusable("key", files.key_file,
                    absl::StrCat("does not belong to the certificate \"", files.cert_file, "\""));
  }
  if (files.trusted_ca_file.empty()) return pem;
  text = ReadFile("trusted CA", files.trusted_ca_file);
  if (!text.ok()) return text.status();
  pem.trusted_ca = *std::move(text);
  if (ParseCertificates(pem.trusted_ca).empty()) {
    return Unusable("trusted CA", files.trusted_ca_file, "has no PEM block of a CERTIFICATE, or a bad one");
  }
  return pem;
}

}  // namespace syncbn::rpc
