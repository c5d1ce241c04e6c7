#include "server/rpc/secrets.h"

#include "absl/strings/match.h"
#include "plumbing/secret.h"

namespace syncbn::rpc {

core::Secret SecretOf(absl::string_view text) { return text.empty() ? core::Secret() : core::Secret(Sha256(text)); }

core::Secret BearerOf(const grpc::ServerContext& context) {
  constexpr absl::string_view kScheme = "Bearer ";
  const auto& metadata = context.client_metadata();
  const auto found = metadata.find("authorization");
  if (found == metadata.end()) return core::Secret();
  absl::string_view value(found->second.data(), found->second.size());
  if (!absl::StartsWithIgnoreCase(value, kScheme)) return core::Secret();
  value.remove_prefix(kScheme.size());
  return SecretOf(value);
}

}  // namespace syncbn::rpc
