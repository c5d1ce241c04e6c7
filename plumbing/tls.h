// The certificates and keys of a worker or a master, read from files and checked before gRPC has them.

#ifndef SYNCBN_PLUMBING_TLS_H_
#define SYNCBN_PLUMBING_TLS_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace syncbn {

// Paths of PEM files. Any may be empty; certificate and key come together.
struct TlsFiles {
  std::string cert_file;
  std::string key_file;
  std::string trusted_ca_file;
};

// The contents of TlsFiles; empty where there is no file.
struct TlsMaterial {
  std::string certificate;  // And those that vouch for it.
  std::string key;
  std::string trusted_ca;
  absl::Time expiry = absl::InfiniteFuture();  // The certificate's.
};

// Reads and checks the files. gRPC would find an unusable file at each connection, and not name it.
//
// Errors: INVALID_ARGUMENT, naming the file, if one cannot be read, does not hold what it should or needs a passphrase,
// if the certificate has expired or is not valid yet, and if key and certificate do not belong together or only one of
// them is given.
// Thread safety: any thread may call it.
absl::StatusOr<TlsMaterial> ReadTls(const TlsFiles& files);

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_TLS_H_
