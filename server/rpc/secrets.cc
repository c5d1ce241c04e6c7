#include "server/rpc/secrets.h"

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "plumbing/secret.h"

namespace syncbn::rpc {
namespace {

using grpc::experimental::ClientInterceptorFactoryInterface;
using grpc::experimental::InterceptionHookPoints;
using grpc::experimental::InterceptorBatchMethods;

class Bearer final : public grpc::experimental::Interceptor {
 public:
  explicit Bearer(const std::string& token) : token_(token) {}

  void Intercept(InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_INITIAL_METADATA)) {
      methods->GetSendInitialMetadata()->emplace("authorization", absl::StrCat("Bearer ", token_));
    }
    methods->Proceed();
  }

 private:
  const std::string& token_;  // The factory's, which lives as long as its channel.
};

class BearerFactory final : public ClientInterceptorFactoryInterface {
 public:
  explicit BearerFactory(std::string token) : token_(std::move(token)) {}

  grpc::experimental::Interceptor* CreateClientInterceptor(grpc::experimental::ClientRpcInfo*) override {
    return new Bearer(token_);  // gRPC owns it.
  }

 private:
  const std::string token_;
};

}  // namespace

std::unique_ptr<ClientInterceptorFactoryInterface> MakeBearer(std::string token) {
  return std::make_unique<BearerFactory>(std::move(token));
}

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
