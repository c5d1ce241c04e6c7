// Certificates and keys in PEM files, checked before they reach gRPC, whose errors do not name the file.

#ifndef SYNCBN_PLUMBING_PEM_H_
#define SYNCBN_PLUMBING_PEM_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace syncbn {

struct Certificates {
  std::string pem;  // The whole file: at least one certificate.
  // Validity of the first certificate. The infinite past if it has none.
  absl::Time not_before, not_after;
};

// Reads all certificates of a file. `what` names its purpose ("trusted CA") in errors.
//
// Errors: INVALID_ARGUMENT, naming the file, if it cannot be read, or has no certificate or one that cannot be parsed.
absl::StatusOr<Certificates> ReadCertificates(absl::string_view what, const std::string& path);

struct Identity {
  Certificates certificate;  // With those that vouch for it.
  std::string key;           // PEM.
};

// Reads a certificate and its key.
//
// Errors: those of ReadCertificates; INVALID_ARGUMENT, naming the file, if the key cannot be read without a passphrase
// or does not belong to the certificate.
absl::StatusOr<Identity> ReadIdentity(const std::string& cert_file, const std::string& key_file);

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_PEM_H_
