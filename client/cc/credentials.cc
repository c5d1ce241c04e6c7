#include "client/cc/credentials.h"

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <fstream>
#include <sstream>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace syncbn {
namespace {

using Certificate = std::unique_ptr<X509, decltype(&X509_free)>;
using Key = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;
using Bio = std::unique_ptr<BIO, decltype(&BIO_free)>;

absl::StatusOr<std::string> ReadFile(const char* what, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) return absl::InvalidArgumentError(absl::StrCat("cannot read the ", what, " \"", path, "\""));
  return text.str();
}

Bio Reader(const std::string& pem) { return Bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())), BIO_free); }

// A key with a password: none is asked for at a terminal.
int NoPassword(char*, int, int, void*) { return 0; }

// The first certificate of the text, or null.
Certificate ParseCertificate(const std::string& pem) {
  Certificate certificate(PEM_read_bio_X509(Reader(pem).get(), nullptr, NoPassword, nullptr), X509_free);
  ERR_clear_error();
  return certificate;
}

Key ParseKey(const std::string& pem) {
  Key key(PEM_read_bio_PrivateKey(Reader(pem).get(), nullptr, NoPassword, nullptr), EVP_PKEY_free);
  ERR_clear_error();
  return key;
}

absl::StatusOr<std::string> ReadCertificates(const char* what, const std::string& path) {
  auto pem = ReadFile(what, path);
  if (pem.ok() && ParseCertificate(*pem) == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("the ", what, " \"", path, "\" holds no certificate in PEM form"));
  }
  return pem;
}

absl::StatusOr<std::string> ReadKey(const std::string& path) {
  auto pem = ReadFile("key", path);
  if (pem.ok() && ParseKey(*pem) == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("the key \"", path, "\" holds no private key in PEM form without a password"));
  }
  return pem;
}

absl::Status ReadIdentity(const Worker::TlsOptions& tls, grpc::SslCredentialsOptions* options) {
  if (tls.cert_file.empty() != tls.key_file.empty()) {
    return absl::InvalidArgumentError("a worker's certificate and its key come together, and one of them is missing");
  }
  if (tls.cert_file.empty()) return absl::OkStatus();
  auto certificate = ReadCertificates("certificate", tls.cert_file);
  if (!certificate.ok()) return certificate.status();
  auto key = ReadKey(tls.key_file);
  if (!key.ok()) return key.status();
  const int match = X509_check_private_key(ParseCertificate(*certificate).get(), ParseKey(*key).get());
  ERR_clear_error();
  if (match != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("the key \"", tls.key_file, "\" is not that of the certificate \"", tls.cert_file, "\""));
  }
  options->pem_cert_chain = *std::move(certificate);
  options->pem_private_key = *std::move(key);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(const Worker::TlsOptions& tls) {
  if (!tls.enabled()) return grpc::InsecureChannelCredentials();
  grpc::SslCredentialsOptions options;
  if (absl::Status status = ReadIdentity(tls, &options); !status.ok()) return status;
  if (!tls.trusted_ca_file.empty()) {
    auto trusted = ReadCertificates("trusted CA", tls.trusted_ca_file);
    if (!trusted.ok()) return trusted.status();
    options.pem_root_certs = *std::move(trusted);
  }
  return grpc::SslCredentials(options);
}

bool IsTlsRefusal(absl::string_view message) {
  return absl::StrContains(message, "SSL_ERROR_SSL") || absl::StrContains(message, "andshake failed") ||
         absl::StrContains(message, "Hostname Verification") || absl::StrContains(message, "not in peer certificate");
}

}  // namespace syncbn
