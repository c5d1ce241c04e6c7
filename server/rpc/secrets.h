// Secrets of calls, as the engine and the services compare them.

#ifndef SYNCBN_SERVER_RPC_SECRETS_H_
#define SYNCBN_SERVER_RPC_SECRETS_H_

#include <memory>
#include <string>

#include "absl/strings/string_view.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/client_interceptor.h"
#include "server/core/secret.h"

namespace syncbn::rpc {

// Returns an absent secret for an empty text.
core::Secret SecretOf(absl::string_view text);

// Returns the token that the call bears in its metadata, as "authorization: Bearer TOKEN"; absent if there is none.
core::Secret BearerOf(const grpc::ServerContext& context);

// Returns what makes each call of a channel bear the token.
std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface> MakeBearer(std::string token);

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_SECRETS_H_
