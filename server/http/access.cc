#include "server/http/access.h"

#include <algorithm>
#include <array>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "server/rpc/secrets.h"

namespace syncbn::http {
namespace {

constexpr std::array<absl::string_view, 4> kOpenPaths = {"/livez", "/readyz", "/healthz", "/metrics"};

// Returns what follows the scheme, if the header is of this scheme.
std::optional<absl::string_view> After(absl::string_view scheme, absl::string_view header) {
  if (!absl::StartsWithIgnoreCase(header, scheme)) return std::nullopt;
  return absl::StripAsciiWhitespace(header.substr(scheme.size()));
}

// Returns the token that the header has; absent if it has none.
core::Secret TokenOf(absl::string_view authorization) {
  if (const auto token = After("Bearer ", authorization)) return rpc::SecretOf(*token);
  std::string user_and_password;
  const auto encoded = After("Basic ", authorization);
  if (!encoded || !absl::Base64Unescape(*encoded, &user_and_password)) return core::Secret();
  const size_t colon = user_and_password.find(':');
  if (colon == std::string::npos) return core::Secret();
  return rpc::SecretOf(absl::string_view(user_and_password).substr(colon + 1));
}

}  // namespace

Access::Access(absl::string_view token, bool pages_open) : token_(rpc::SecretOf(token)), pages_open_(pages_open) {}

std::optional<Answer> Access::Refuse(absl::string_view path, absl::string_view authorization) const {
  if (std::find(kOpenPaths.begin(), kOpenPaths.end(), path) != kOpenPaths.end()) return std::nullopt;
  if (!pages_open_) {
    return Answer{403, kText, "the master runs with --inspection off: it serves probes and metrics alone\n"};
  }
  if (!token_.present() || TokenOf(authorization) == token_) return std::nullopt;
  return Answer{401, kText,
                "this needs the master's token: as the password, with any user name, or as \"Authorization: Bearer "
                "TOKEN\"\n"};
}

}  // namespace syncbn::http
