#include "server/stats_server.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <fstream>
#include <sstream>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "grpcpp/ext/channelz_service_plugin.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "server/rpc/master_loop.h"

namespace syncbn {
namespace {

bool IsUnix(absl::string_view address) {
  return absl::StartsWith(address, "unix:") || absl::StartsWith(address, "unix-abstract:");
}

// HOST of HOST:PORT, without brackets; empty if the address has no port.
absl::string_view HostOf(absl::string_view address) {
  const size_t colon = address.rfind(':');
  if (colon == absl::string_view::npos || colon + 1 == address.size()) return {};
  absl::string_view host = address.substr(0, colon);
  if (absl::StartsWith(host, "[") && absl::EndsWith(host, "]")) host = host.substr(1, host.size() - 2);
  return host;
}

bool IsLoopback(absl::string_view address) {
  if (IsUnix(address)) return true;
  const absl::string_view host = HostOf(address);
  if (host == "localhost" || host == "::1") return true;
  in_addr parsed;  // A name may begin with "127." too.
  return inet_pton(AF_INET, std::string(host).c_str(), &parsed) == 1 && absl::StartsWith(host, "127.");
}

// Whether someone answers on the socket. gRPC would take a path over from a master that serves on it.
bool IsServed(absl::string_view unix_address) {
  sockaddr_un socket_address = {};
  socket_address.sun_family = AF_UNIX;
  const absl::string_view path = absl::StripPrefix(absl::StripPrefix(unix_address, "unix:"), "//");
  if (!absl::StartsWith(unix_address, "unix:") || path.size() >= sizeof(socket_address.sun_path)) return false;
  path.copy(socket_address.sun_path, path.size());
  const int descriptor = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (descriptor < 0) return false;
  const int result = connect(descriptor, reinterpret_cast<const sockaddr*>(&socket_address), sizeof(socket_address));
  close(descriptor);
  return result == 0;
}

absl::Status CheckAddresses(const MasterServer::Options& options) {
  if (options.addresses.empty()) return absl::InvalidArgumentError("there is no address to listen on");
  const bool tls = !options.tls.cert_file.empty();
  for (const std::string& address : options.addresses) {
    if (!IsUnix(address) && HostOf(address).empty()) {
      return absl::InvalidArgumentError(absl::StrCat("\"", address, "\" is neither HOST:PORT nor unix:PATH"));
    }
    if (!tls && !options.insecure && !IsLoopback(address)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "\"", address, "\" is reachable from other hosts, and there is no TLS: give a certificate and a ",
          "key, or say --insecure"));
    }
  }
  return absl::OkStatus();
}

// The text of a PEM file that has a block of the given kind.
absl::StatusOr<std::string> ReadPem(const std::string& path, absl::string_view what, absl::string_view block) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) return absl::InvalidArgumentError(absl::StrCat("cannot read the ", what, " \"", path, "\""));
  if (!absl::StrContains(text.str(), absl::StrCat(block, "-----"))) {
    return absl::InvalidArgumentError(absl::StrCat("the ", what, " \"", path, "\" has no PEM block of a ", block));
  }
  return text.str();
}

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeCredentials(const MasterServer::TlsOptions& tls) {
  if (tls.cert_file.empty() != tls.key_file.empty()) {
    return absl::InvalidArgumentError("TLS needs a certificate and its key, both");
  }
  if (tls.client_cert_auth && (tls.trusted_ca_file.empty() || tls.cert_file.empty())) {
    return absl::InvalidArgumentError("authenticating clients needs a certificate, its key, and a trusted CA");
  }
  if (tls.cert_file.empty()) return grpc::InsecureServerCredentials();
  grpc::SslServerCredentialsOptions options(tls.client_cert_auth
                                                ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                                                : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE);
  const auto certificate = ReadPem(tls.cert_file, "certificate", "CERTIFICATE");
  if (!certificate.ok()) return certificate.status();
  const auto key = ReadPem(tls.key_file, "key", "PRIVATE KEY");
  if (!key.ok()) return key.status();
  options.pem_key_cert_pairs.push_back({*key, *certificate});
  if (!tls.trusted_ca_file.empty()) {
    const auto ca = ReadPem(tls.trusted_ca_file, "trusted CA", "CERTIFICATE");
    if (!ca.ok()) return ca.status();
    options.pem_root_certs = *ca;
  }
  return grpc::SslServerCredentials(options);
}

void Tune(grpc::ServerBuilder* builder, int max_frame_bytes) {
  builder->SetMaxReceiveMessageSize(max_frame_bytes);
  builder->SetMaxSendMessageSize(-1);                        // Ours are bounded by the layers' limits.
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // A second master on a port must fail, not share it.
  builder->AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, 5000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 30000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20000);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5000);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
  // Larger reads, fewer of them.
  builder->AddChannelArgument("grpc.experimental.tcp_read_chunk_size", 131072);
  builder->AddChannelArgument("grpc.experimental.tcp_min_read_chunk_size", 131072);
  // Reflection is gRPC's own synchronous service: one thread waits for it.
  builder->SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::NUM_CQS, 1);
  builder->SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::MIN_POLLERS, 1);
  builder->SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::MAX_POLLERS, 1);
}

}  // namespace

class MasterServer::Impl {
 public:
  explicit Impl(rpc::LoopOptions options) : loop_(std::move(options)) {}
  ~Impl() { Shutdown(absl::ZeroDuration()); }

  absl::Status Start(const Options& options, const std::shared_ptr<grpc::ServerCredentials>& credentials) {
    static const bool plugins = [] {
      absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
      grpc::reflection::InitProtoReflectionServerBuilderPlugin();
      grpc::channelz::experimental::InitChannelzService();
      return true;
    }();
    (void)plugins;
    grpc::ServerBuilder builder;
    Tune(&builder, options.max_frame_bytes);
    ports_.resize(options.addresses.size());
    for (size_t i = 0; i < options.addresses.size(); ++i) {
      if (IsServed(options.addresses[i])) {
        return absl::UnavailableError(absl::StrCat("\"", options.addresses[i], "\" is in use"));
      }
      builder.AddListeningPort(options.addresses[i], credentials, &ports_[i]);
    }
    loop_.Register(&builder);
    server_ = builder.BuildAndStart();
    for (size_t i = 0; i < options.addresses.size(); ++i) {
      if (ports_[i] != 0) continue;
      return absl::UnavailableError(absl::StrCat("cannot listen on \"", options.addresses[i], "\""));
    }
    if (server_ == nullptr) return absl::UnavailableError("the server cannot be started");
    addresses_ = options.addresses;
    loop_.Start();
    serving_ = true;
    return absl::OkStatus();
  }

  std::vector<std::string> targets() const {
    std::vector<std::string> targets;
    for (size_t i = 0; i < addresses_.size(); ++i) {
      const std::string& address = addresses_[i];
      if (IsUnix(address)) {
        targets.push_back(address);
      } else {
        targets.push_back(absl::StrCat(address.substr(0, address.rfind(':')), ":", ports_[i]));
      }
    }
    return targets;
  }

  int port() const {
    for (size_t i = 0; i < addresses_.size(); ++i) {
      if (!IsUnix(addresses_[i])) return ports_[i];
    }
    return 0;
  }

  void Shutdown(absl::Duration grace) {
    absl::MutexLock lock(&mutex_);
    if (!std::exchange(serving_, false)) return;
    loop_.BeginShutdown();
    server_->Shutdown(absl::ToChronoTime(absl::Now() + grace));
    loop_.Stop();
  }

 private:
  rpc::MasterLoop loop_;
  std::unique_ptr<grpc::Server> server_;
  std::vector<std::string> addresses_;
  std::vector<int> ports_;
  absl::Mutex mutex_;
  bool serving_ ABSL_GUARDED_BY(mutex_) = false;
};

absl::StatusOr<std::unique_ptr<MasterServer>> MasterServer::Start(Options options) {
  if (absl::Status status = CheckAddresses(options); !status.ok()) return status;
  const auto credentials = MakeCredentials(options.tls);
  if (!credentials.ok()) return credentials.status();
  rpc::LoopOptions loop;
  loop.limits = options.limits;
  loop.max_unread_bytes = options.max_unread_bytes;
  loop.join_timeout = options.join_timeout;
  loop.max_watchers = options.max_watchers;
  loop.description = options.description.empty() ? "syncbn-master/0.1.0" : options.description;
  auto impl = std::make_unique<Impl>(std::move(loop));
  if (absl::Status status = impl->Start(options, *credentials); !status.ok()) return status;
  return std::unique_ptr<MasterServer>(new MasterServer(std::move(impl)));
}

MasterServer::MasterServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
MasterServer::~MasterServer() = default;

int MasterServer::port() const { return impl_->port(); }
std::string MasterServer::target() const { return impl_->targets().front(); }
std::vector<std::string> MasterServer::targets() const { return impl_->targets(); }
void MasterServer::Shutdown(absl::Duration grace) { impl_->Shutdown(grace); }

}  // namespace syncbn
