#include "plumbing/pem.h"

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <cstddef>
#include <ctime>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "plumbing/bounded_file.h"

namespace syncbn {
namespace {

using X509Pointer = std::unique_ptr<X509, decltype(&X509_free)>;
using KeyPointer = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;
using BioPointer = std::unique_ptr<BIO, decltype(&BIO_free)>;

absl::Status Unusable(absl::string_view what, const std::string& path, absl::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat("the ", what, " \"", path, "\" ", why));
}

absl::StatusOr<std::string> ReadPem(absl::string_view what, const std::string& path) {
  constexpr size_t kMostBytes = 4 << 20;  // A system's bundle of trusted CAs has a fourteenth part of it.
  return ReadBoundedFile(what, path, kMostBytes);
}

BioPointer Reader(const std::string& pem) {
  return BioPointer(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())), BIO_free);
}

// Gives no passphrase; the library would ask for one on the terminal.
int NoPassphrase(char*, int, int, void*) { return -1; }

// Returns all certificates of the text; none if one of them cannot be parsed.
std::vector<X509Pointer> ParseCertificates(const std::string& pem) {
  const BioPointer bio = Reader(pem);
  std::vector<X509Pointer> certificates;
  while (X509* const certificate = PEM_read_bio_X509(bio.get(), nullptr, NoPassphrase, nullptr)) {
    certificates.emplace_back(certificate, X509_free);
  }
  const auto error = ERR_peek_last_error();
  ERR_clear_error();
  if (ERR_GET_REASON(error) != PEM_R_NO_START_LINE) certificates.clear();
  return certificates;
}

KeyPointer ParseKey(const std::string& pem) {
  KeyPointer key(PEM_read_bio_PrivateKey(Reader(pem).get(), nullptr, NoPassphrase, nullptr), EVP_PKEY_free);
  ERR_clear_error();
  return key;
}

absl::Time TimeOf(const ASN1_TIME* time) {
  std::tm parts = {};
  return ASN1_TIME_to_tm(time, &parts) == 1 ? absl::FromTM(parts, absl::UTCTimeZone()) : absl::InfinitePast();
}

}  // namespace

absl::StatusOr<Certificates> ReadCertificates(absl::string_view what, const std::string& path) {
  auto pem = ReadPem(what, path);
  if (!pem.ok()) return pem.status();
  const std::vector<X509Pointer> chain = ParseCertificates(*pem);
  if (chain.empty()) return Unusable(what, path, "has no PEM block of a CERTIFICATE, or a bad one");
  const X509* const first = chain.front().get();
  return Certificates{*std::move(pem), TimeOf(X509_get0_notBefore(first)), TimeOf(X509_get0_notAfter(first))};
}

absl::StatusOr<Identity> ReadIdentity(const std::string& cert_file, const std::string& key_file) {
  auto certificate = ReadCertificates("certificate", cert_file);
  if (!certificate.ok()) return certificate.status();
  auto key = ReadPem("key", key_file);
  if (!key.ok()) return key.status();
  const KeyPointer parsed = ParseKey(*key);
  if (parsed == nullptr) {
    return Unusable("key", key_file, "has no PEM block of a PRIVATE KEY that can be read without a passphrase");
  }
  const bool match = X509_check_private_key(ParseCertificates(certificate->pem).front().get(), parsed.get()) == 1;
  ERR_clear_error();
  if (!match) return Unusable("key", key_file, absl::StrCat("does not belong to the certificate \"", cert_file, "\""));
  return Identity{*std::move(certificate), *std::move(key)};
}

}  // namespace syncbn
