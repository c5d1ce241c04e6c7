#include "server/http/http_server.h"

#include <array>
#include <atomic>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "civetweb.h"
#include "plumbing/forked.h"
#include "plumbing/secret.h"
#include "server/http/access.h"
#include "server/http/inspection_client.h"
#include "server/http/routes.h"
#include "server/rpc/listen_address.h"

namespace syncbn::http {
namespace {

// Returns whether the Host of a request names this machine. A page of another site can direct a browser to a server on
// loopback under a name of its own, but not under these.
bool IsLocalName(absl::string_view host) {
  if (host.empty()) return true;  // HTTP/1.0: no browser.
  if (host == "[::1]" || absl::StartsWith(host, "[::1]:")) return true;
  host = host.substr(0, host.find(':'));
  // A name may begin as an address does, 127.example.org, but none has digits alone.
  const bool is_address = host.find_first_not_of("0123456789.") == absl::string_view::npos;
  return host == "localhost" || (is_address && absl::StartsWith(host, "127."));
}

}  // namespace

class HttpServer::Impl {
 public:
  Impl(std::shared_ptr<grpc::Channel> channel, const HttpOptions& options, const rpc::ListenAddress& address)
      : client_(std::move(channel)),
        access_(options.token, options.pages_open),
        metrics_{options.metrics_max_ranks},
        local_(address.is_local()) {}
  ~Impl() {
    if (context_ != nullptr) mg_stop(context_);
    if (context_ != nullptr) mg_exit_library();
  }

  absl::Status Start(const rpc::ListenAddress& address) {
    const std::string ports = absl::StrJoin(
        address.sockets, ",",
        [](std::string* out, const rpc::SocketAddress& socket) { absl::StrAppend(out, socket.ToString()); });
    const char* const options[] = {"listening_ports",
                                   ports.c_str(),
                                   "num_threads",
                                   "32",
                                   "request_timeout_ms",
                                   "5000",
                                   "connection_queue",
                                   "32",
                                   "max_request_size",
                                   "8192",
                                   "enable_keep_alive",
                                   "no",
                                   "linger_timeout_ms",
                                   "1000",
                                   nullptr};
    mg_callbacks callbacks = {};
    callbacks.log_message = &Impl::Note;
    std::array<char, 256> text = {};
    unsigned code = 0;
    mg_error_data error = {&code, text.data(), text.size()};
    mg_init_data init = {&callbacks, this, const_cast<const char**>(options)};
    mg_init_library(0);
    starting_ = true;
    context_ = mg_start2(&init, &error);
    starting_ = false;
    if (context_ == nullptr) {
      mg_exit_library();
      return absl::UnavailableError(absl::StrCat("cannot serve HTTP on \"", address.text,
                                                 "\": ", failure_.empty() ? std::string(text.data()) : failure_));
    }
    mg_set_request_handler(context_, "**", &Impl::Handle, this);
    std::array<mg_server_port, 8> bound = {};
    const int count = mg_get_server_ports(context_, static_cast<int>(bound.size()), bound.data());
    address_ = absl::StrCat(address.host, ":", count > 0 ? bound[0].port : 0);
    return absl::OkStatus();
  }

  const std::string& address() const { return address_; }
  // Returns whether this is a forked child, which has none of the threads that this object waits for.
  bool IsForked() const { return open_.forked(); }

 private:
  // Keeps civetweb's message about an address that cannot be bound, and its other messages from stderr: they are about
  // peers.
  static int Note(const mg_connection* connection, const char* message) {
    auto* const self = static_cast<Impl*>(mg_get_user_data(mg_get_context(connection)));
    if (self != nullptr && self->starting_ && self->failure_.empty()) self->failure_ = message;
    return 1;
  }

  static int Handle(mg_connection* connection, void* self) { return static_cast<const Impl*>(self)->Serve(connection); }

  // Returns the HTTP status.
  int Serve(mg_connection* connection) const {
    const mg_request_info* const request = mg_get_request_info(connection);
    const absl::string_view method = request->request_method;
    const char* const host = mg_get_header(connection, "Host");
    if (method != "GET" && method != "HEAD") {
      return Send(connection, {405, kText, "only GET and HEAD are served here\n"}, true);
    }
    if (local_ && host != nullptr && !IsLocalName(host)) {
      return Send(connection, {421, kText, "this server is called localhost or 127.0.0.1\n"}, true);
    }
    const char* const authorization = mg_get_header(connection, "Authorization");
    const bool with_body = method == "GET";
    if (const auto refusal = access_.Refuse(request->local_uri, authorization == nullptr ? "" : authorization)) {
      return Send(connection, *refusal, with_body);
    }
    const absl::string_view query = request->query_string == nullptr ? "" : request->query_string;
    const auto value_of = [query](const char* name) {
      std::array<char, 2048> value = {};
      const int length = mg_get_var(query.data(), query.size(), name, value.data(), value.size());
      return length <= 0 ? std::string() : std::string(value.data(), static_cast<size_t>(length));
    };
    return Send(connection, Route(request->local_uri, value_of, client_, metrics_), with_body);
  }

  static int Send(mg_connection* connection, const Answer& answer, bool with_body) {
    mg_response_header_start(connection, answer.status);
    mg_response_header_add(connection, "Content-Type", answer.type.c_str(), -1);
    mg_response_header_add(connection, "Content-Length", absl::StrCat(answer.body.size()).c_str(), -1);
    mg_response_header_add(connection, "Cache-Control", "no-store", -1);
    mg_response_header_add(connection, "Content-Security-Policy", "default-src 'self'; frame-ancestors 'none'", -1);
    mg_response_header_add(connection, "X-Content-Type-Options", "nosniff", -1);
    // Browsers ask for a name and a password, and scripts of the page send what was given.
    if (answer.status == 401) mg_response_header_add(connection, "WWW-Authenticate", "Basic realm=\"syncbn\"", -1);
    if (answer.status == 405) mg_response_header_add(connection, "Allow", "GET, HEAD", -1);
    mg_response_header_send(connection);
    if (with_body) mg_write(connection, answer.body.data(), answer.body.size());
    return answer.status;
  }

  const OpenHere open_;
  const InspectionClient client_;
  const Access access_;
  const MetricsOptions metrics_;
  const bool local_;
  mg_context* context_ = nullptr;
  std::atomic<bool> starting_{false};  // Only the thread that starts the server calls Note then.
  std::string failure_;
  std::string address_;
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
  // A host's name may stand for several addresses, and a free port of one need not be free on the others.
  if (address->sockets.front().port() == 0) address->sockets.resize(1);
  auto impl = std::make_unique<Impl>(std::move(channel), options, *address);
  if (absl::Status status = impl->Start(*address); !status.ok()) return status;
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() {
  if (impl_->IsForked()) static_cast<void>(impl_.release());  // Its threads are the parent's.
}
std::string HttpServer::address() const { return impl_->address(); }

}  // namespace syncbn::http
