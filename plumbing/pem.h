// Certificates and keys in PEM files, checked before gRPC has them, which would not say what is wrong with which file.

#ifndef SYNCBN_PLUMBING_PEM_H_
#define SYNCBN_PLUMBING_PEM_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace syncbn {

struct Certificates {
  std::string pem;  // The whole file: at least one certificate.
  // Expiry of the first certificate. The infinite past where the certificate tells no time.
  absl::Time not_before, not_after;
};

// All certificates of a file. `what` it is to the caller ("trusted CA") stands in the errors. INVALID_ARGUMENT, naming
// the file, where it cannot be read, has no certificate, or one that cannot be parsed.
absl::StatusOr<Certificates> ReadCertificates(absl::string_view what, const std::string& path);

struct Identity {
  Certificates certificate;  // And those that vouch for it.
  std::string key;           // PEM.
};

// A certificate and the key that belongs to it. INVALID_ARGUMENT, naming the file, as above, and where the key cannot
// be read without a passphrase (nobody is asked for one) or is another certificate's.
absl::StatusOr<Identity> ReadIdentity(const std::string& cert_file, const std::string& key_file);

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_PEM_H_
