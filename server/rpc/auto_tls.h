// A certificate that a master makes for itself.

#ifndef SYNCBN_SERVER_RPC_AUTO_TLS_H_
#define SYNCBN_SERVER_RPC_AUTO_TLS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "plumbing/tls.h"
#include "server/rpc/listen_address.h"

namespace syncbn::rpc {

// The files of a key pair. Those that it has made in a folder of its own go with it.
//
// Thread safety: none.
class AutoTls {
 public:
  // Makes a certificate for the host of the first TCP address; for a wildcard, for this machine's name. Writes it and
  // its key to `files`, or, where these are empty, to a new folder that this user alone can read. Files that exist are
  // used as they are. Logs the certificate's path and fingerprint.
  //
  // Errors: INVALID_ARGUMENT if only one of the files is named or exists, or it cannot be written; those of
  // MakeSelfSignedCertificate.
  static absl::StatusOr<AutoTls> Make(const std::vector<ListenAddress>& addresses, TlsFiles files);

  AutoTls(AutoTls&& other) noexcept;
  AutoTls& operator=(AutoTls&& other) noexcept;
  ~AutoTls();

  const TlsFiles& files() const { return files_; }

 private:
  AutoTls() = default;

  TlsFiles files_;
  std::string folder_;  // Its own; empty if there is none.
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_AUTO_TLS_H_
