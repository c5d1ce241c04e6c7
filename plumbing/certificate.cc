#include "plumbing/certificate.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <openssl/bio.h>
#include <openssl/ec.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "plumbing/pem.h"

namespace syncbn {
namespace {

using CertificatePointer = std::unique_ptr<X509, decltype(&X509_free)>;
using KeyPointer = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;
using BioPointer = std::unique_ptr<BIO, decltype(&BIO_free)>;

constexpr int kSecondsOfDay = 24 * 60 * 60;
constexpr int kValidDays = 3650;
constexpr int kVersion3 = 2;

absl::Status OpenSslFailed(absl::string_view what) {
  char reason[256];
  ERR_error_string_n(ERR_get_error(), reason, sizeof(reason));
  ERR_clear_error();
  return absl::InternalError(absl::StrCat("OpenSSL cannot make a certificate: ", what, " failed: ", reason));
}

bool IsAddress(const std::string& host) {
  unsigned char bytes[sizeof(in6_addr)];
  return inet_pton(AF_INET, host.c_str(), bytes) == 1 || inet_pton(AF_INET6, host.c_str(), bytes) == 1;
}

// A comma would begin another name, and a control character hide one.
absl::Status CheckHost(const std::string& host) {
  bool plain = !host.empty();
  for (const char c : host)
    plain = plain && (absl::ascii_isalnum(c) || absl::string_view("-._:").find(c) != std::string::npos);
  if (plain && (host.find(':') == std::string::npos || IsAddress(host))) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("a certificate's host is \"", host, "\"; it is an address or a DNS name"));
}

bool AddExtension(X509* certificate, int kind, const std::string& value) {
  X509V3_CTX context;
  X509V3_set_ctx_nodb(&context);
  X509V3_set_ctx(&context, certificate, certificate, nullptr, nullptr, 0);
  X509_EXTENSION* const extension = X509V3_EXT_conf_nid(nullptr, &context, kind, value.c_str());
  if (extension == nullptr) return false;
  const bool added = X509_add_ext(certificate, extension, -1) == 1;
  X509_EXTENSION_free(extension);
  return added;
}

// Gives the certificate a random serial number, its time and its names.
bool Describe(X509* certificate, const std::string& host) {
  unsigned char serial[8];
  if (RAND_bytes(serial, sizeof(serial)) != 1) return false;
  serial[0] &= 0x7f;  // Serial numbers are positive.
  BIGNUM* const number = BN_bin2bn(serial, sizeof(serial), nullptr);
  const bool numbered = number != nullptr && BN_to_ASN1_INTEGER(number, X509_get_serialNumber(certificate)) != nullptr;
  BN_free(number);
  X509_NAME* const name = X509_get_subject_name(certificate);
  const auto* const words = reinterpret_cast<const unsigned char*>("syncbn master");
  return numbered && X509_set_version(certificate, kVersion3) == 1 &&
         X509_gmtime_adj(X509_getm_notBefore(certificate), -kSecondsOfDay) != nullptr &&
         X509_gmtime_adj(X509_getm_notAfter(certificate), kValidDays * kSecondsOfDay) != nullptr &&
         X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, words, -1, -1, 0) == 1 &&
         X509_set_issuer_name(certificate, name) == 1 &&
         AddExtension(certificate, NID_basic_constraints, "critical,CA:TRUE") &&
         AddExtension(certificate, NID_subject_alt_name, absl::StrCat(IsAddress(host) ? "IP:" : "DNS:", host));
}

// Creates the file, readable by its owner alone, with the text of `bio`.
absl::Status Write(const std::string& path, BIO* bio) {
  char* text = nullptr;
  const auto size = BIO_get_mem_data(bio, &text);
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, S_IRUSR | S_IWUSR);
  bool written = file >= 0 && write(file, text, static_cast<size_t>(size)) == size;
  const int error = errno;
  if (file >= 0) written = close(file) == 0 && written;
  if (written) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("cannot write \"", path, "\": ", absl::AsciiStrToLower(std::strerror(error))));
}

}  // namespace

absl::Status MakeSelfSignedCertificate(const std::string& host, const std::string& cert_file,
                                       const std::string& key_file) {
  if (absl::Status status = CheckHost(host); !status.ok()) return status;
  const KeyPointer key(EVP_EC_gen("P-256"), EVP_PKEY_free);
  if (key == nullptr) return OpenSslFailed("the key pair");
  const CertificatePointer certificate(X509_new(), X509_free);
  if (certificate == nullptr || !Describe(certificate.get(), host)) return OpenSslFailed("the certificate's content");
  if (X509_set_pubkey(certificate.get(), key.get()) != 1 ||
      X509_sign(certificate.get(), key.get(), EVP_sha256()) == 0) {
    return OpenSslFailed("the signature");
  }
  const BioPointer cert_text(BIO_new(BIO_s_mem()), BIO_free), key_text(BIO_new(BIO_s_mem()), BIO_free);
  if (cert_text == nullptr || key_text == nullptr || PEM_write_bio_X509(cert_text.get(), certificate.get()) != 1 ||
      PEM_write_bio_PrivateKey(key_text.get(), key.get(), nullptr, nullptr, 0, nullptr, nullptr) != 1) {
    return OpenSslFailed("the PEM text");
  }
  if (absl::Status status = Write(key_file, key_text.get()); !status.ok()) return status;
  return Write(cert_file, cert_text.get());
}

absl::StatusOr<std::string> CertificateFingerprint(const std::string& cert_file) {
  const auto read = ReadCertificates("certificate", cert_file);
  if (!read.ok()) return read.status();
  const BioPointer text(BIO_new_mem_buf(read->pem.data(), static_cast<int>(read->pem.size())), BIO_free);
  const CertificatePointer certificate(PEM_read_bio_X509(text.get(), nullptr, nullptr, nullptr), X509_free);
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  if (certificate == nullptr || X509_digest(certificate.get(), EVP_sha256(), digest, &size) != 1) {
    return OpenSslFailed("the digest");
  }
  const absl::string_view bytes(reinterpret_cast<const char*>(digest), size);
  return absl::StrJoin(bytes, ":", [](std::string* out, unsigned char byte) {
    absl::StrAppend(out, absl::AsciiStrToUpper(absl::StrCat(absl::Hex(byte, absl::kZeroPad2))));
  });
}

}  // namespace syncbn
