#include "server/http/http_server.h"

#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "plumbing/forked.h"
#include "plumbing/secret.h"
#include "server/http/access.h"
#include "server/http/answerers.h"
#include "server/http/connection.h"
#include "server/http/inspection_client.h"
#include "server/http/request.h"
#include "server/http/request_loop.h"
#include "server/http/routes.h"
#include "server/rpc/listen_address.h"
#include "server/rpc/listener.h"

namespace syncbn::http {
namespace {

// Returns whether the Host of a request names this machine. A page of another site can direct a browser to a server on
// loopback under a name of its own, but not under these.
bool IsLocalName(absl::string_view host) {
  if (host == "[::1]" || absl::StartsWith(host, "[::1]:")) return true;
  host = host.substr(0, host.find(':'));
  // A name may begin as an address does, 127.example.org, but none has digits alone.
  const bool is_address = host.find_first_not_of("0123456789.") == absl::string_view::npos;
  return host == "localhost" || (is_address && absl::StartsWith(host, "127."));
}

}  // namespace

class HttpServer::Impl {
 public:
  Impl(std::shared_ptr<grpc::Channel> channel, const HttpOptions& options, bool local)
      : client_(std::move(channel)),
        access_(options.token, options.pages_open),
        metrics_{options.metrics_max_ranks},
        local_(local),
        answerers_([this](const Request& request) { return Route(request, client_, metrics_); },
                   [this](uint64_t id, const Answer& answer) { loop_->Respond(id, answer); }) {}
  ~Impl() {
    if (loop_ != nullptr) loop_->Stop();
    answerers_.Stop();
  }

  absl::Status Start(rpc::Listener listener) {
    auto loop = RequestLoop::Open(std::move(listener),
                                  {[this](uint64_t id, Request request) { return Serve(id, std::move(request)); },
                                   [this](uint64_t id) { answerers_.Forget(id); }});
    if (!loop.ok()) return loop.status();
    loop_ = *std::move(loop);
    if (absl::Status status = answerers_.Start(); !status.ok()) return status;
    return loop_->Start();
  }

  std::string address() const { return loop_->target(); }
  // Returns whether this is a forked child, which has none of the threads that this object waits for.
  bool IsForked() const { return open_.forked(); }

 private:
  // Returns a refusal, or nothing if the request is given to a thread.
  Connection::Served Serve(uint64_t id, Request request) {
    if (auto refusal = Refuse(request)) return {std::move(refusal)};
    const bool precious = IsProbe(request.path);
    answerers_.Add(id, std::move(request));
    return {std::nullopt, precious};
  }

  std::optional<Answer> Refuse(const Request& request) const {
    if (request.method != "GET" && request.method != "HEAD") {
      return Answer{405, kText, "only GET and HEAD are served here\n"};
    }
    if (local_ && request.host.has_value() && !IsLocalName(*request.host)) {
      return Answer{421, kText, "this server is called localhost or 127.0.0.1\n"};
    }
    return access_.Refuse(request.path, request.authorization);
  }

  const OpenHere open_;
  const InspectionClient client_;
  const Access access_;
  const MetricsOptions metrics_;
  const bool local_;
  std::unique_ptr<RequestLoop> loop_;  // Is there before the threads that use it.
  Answerers answerers_;
};

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const HttpOptions& options,
                                                              std::shared_ptr<grpc::Channel> channel) {
  if (absl::Status status = CheckNotForked(); !status.ok()) return status;
  if (!options.token.empty()) {
    if (absl::Status status = CheckToken(options.token); !status.ok()) return status;
  }
  auto address = rpc::ParseListenAddress(options.address);
  if (!address.ok()) return address.status();
  if (!address->is_tcp()) {
    return absl::InvalidArgumentError(absl::StrCat("\"", options.address, "\" is not HOST:PORT, which HTTP needs"));
  }
  auto listener = rpc::Listener::Open(*address);
  if (!listener.ok()) {
    return absl::UnavailableError(absl::StrCat("cannot serve HTTP: ", listener.status().message()));
  }
  auto impl = std::make_unique<Impl>(std::move(channel), options, address->is_local());
  if (absl::Status status = impl->Start(*std::move(listener)); !status.ok()) return status;
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() {
  if (impl_->IsForked()) static_cast<void>(impl_.release());  // Its threads are the parent's.
}
std::string HttpServer::address() const { return impl_->address(); }

}  // namespace syncbn::http
