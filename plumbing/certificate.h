// Throw-away certificates, for a master that a launch starts for itself.

#ifndef SYNCBN_PLUMBING_CERTIFICATE_H_
#define SYNCBN_PLUMBING_CERTIFICATE_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace syncbn {

// Makes a key pair (NIST P-256) and a certificate signed with its own key, for a server that clients reach as `host`:
// an IPv4 or IPv6 address without brackets, or a DNS name. Writes both as PEM. Clients trust the server by trusting the
// certificate. It is valid for ten years, and from one day ago, since hosts' clocks differ.
//
// Both files must be new. The key's file can be read by its owner alone.
//
// Errors: INVALID_ARGUMENT for an empty host, for one that no certificate can carry, and for files that exist or cannot
// be written, naming them; INTERNAL where OpenSSL fails. Thread safety: any thread may call it.
absl::Status MakeSelfSignedCertificate(const std::string& host, const std::string& cert_file,
                                       const std::string& key_file);

// Returns the SHA-256 digest of a PEM file's first certificate, as `openssl x509 -fingerprint -sha256` writes it.
//
// Errors: those of ReadCertificates; INTERNAL where OpenSSL fails.
absl::StatusOr<std::string> CertificateFingerprint(const std::string& cert_file);

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_CERTIFICATE_H_
