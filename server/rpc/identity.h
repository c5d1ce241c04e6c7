// The jobs and ranks that a worker's certificate stands for.

#ifndef SYNCBN_SERVER_RPC_IDENTITY_H_
#define SYNCBN_SERVER_RPC_IDENTITY_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/core/types.h"

namespace syncbn::rpc {

// The subject alternative names of a certificate.
struct PeerNames {
  std::vector<std::string> dns;
  std::vector<std::string> uris;
};

// A name that a certificate must have, with {job}, {group} and {rank} in place of what the worker joins as.
//
// Thread safety: none; a plain value.
class IdentityTemplate {
 public:
  // `text` is "URI:" or "DNS:" and a name. In a URI, the characters of a job's or group's name other than letters,
  // digits, '-', '.', '_' and '~' are percent-encoded. In a DNS name, a job's or group's name is one label.
  //
  // Errors: INVALID_ARGUMENT for another kind of name, an unknown placeholder, and for two placeholders between which
  // no character tells where the first one ends.
  static absl::StatusOr<IdentityTemplate> Parse(absl::string_view text);

  // Returns whether a certificate with these names may join.
  bool Admits(const PeerNames& names, const core::Join& join) const;
  // Returns the name that a certificate needs, for an error: "URI:spiffe://example.org/job/a/rank/0".
  std::string Describe(const core::Join& join) const;

 private:
  enum class Kind { kUri, kDns };
  enum class Value { kNone, kJob, kGroup, kRank };
  struct Piece {
    std::string literal;
    Value value = Value::kNone;  // After the literal.
  };

  // Returns nothing if a name of the join cannot be part of such a name.
  std::optional<std::string> Fill(const core::Join& join) const;

  Kind kind_ = Kind::kUri;
  std::string text_;
  std::vector<Piece> pieces_;
};

// Returns why the certificate does not stand for the join: none of the templates admits it. Without templates, every
// certificate may join as anyone.
std::optional<core::Error> CheckIdentity(const std::vector<IdentityTemplate>& templates, const PeerNames& names,
                                         const core::Join& join);

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_IDENTITY_H_
