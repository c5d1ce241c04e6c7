#include "plumbing/tls.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "plumbing/pem.h"

namespace syncbn {
namespace {

absl::Status CheckValidity(const Certificates& certificate, const std::string& file) {
  const absl::Time now = absl::Now();
  const bool expired = certificate.not_after <= now;
  if (!expired && certificate.not_before <= now) return absl::OkStatus();
  const absl::Time limit = expired ? certificate.not_after : certificate.not_before;
  return absl::InvalidArgumentError(
      absl::StrCat("the certificate \"", file, "\" ", expired ? "expired on " : "is not valid before ",
                   absl::FormatTime("%Y-%m-%d %H:%M:%S UTC", limit, absl::UTCTimeZone())));
}

}  // namespace

absl::StatusOr<TlsMaterial> ReadTls(const TlsFiles& files) {
  TlsMaterial material;
  if (files.cert_file.empty() != files.key_file.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("a certificate and its key come together; the ",
                                                   files.key_file.empty() ? "key" : "certificate", " is missing"));
  }
  if (!files.cert_file.empty()) {
    auto identity = ReadIdentity(files.cert_file, files.key_file);
    if (!identity.ok()) return identity.status();
    if (absl::Status valid = CheckValidity(identity->certificate, files.cert_file); !valid.ok()) return valid;
    material.certificate = std::move(identity->certificate.pem);
    material.key = std::move(identity->key);
    material.expiry = identity->certificate.not_after;
  }
  if (!files.trusted_ca_file.empty()) {
    auto trusted = ReadCertificates("trusted CA", files.trusted_ca_file);
    if (!trusted.ok()) return trusted.status();
    material.trusted_ca = std::move(trusted->pem);
  }
  return material;
}

}  // namespace syncbn
