#include "server/master_server.h"

#include <sys/resource.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpcpp/channel.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/impl/server_builder_option.h"
#include "grpcpp/resource_quota.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "plumbing/channel_arguments.h"
#include "plumbing/clock.h"
#include "plumbing/forked.h"
#include "plumbing/grpc_process.h"
#include "plumbing/log.h"
#include "plumbing/secret.h"
#include "server/rpc/acceptor.h"
#include "server/rpc/auto_tls.h"
#include "server/rpc/connections.h"
#include "server/rpc/listen_address.h"
#include "server/rpc/listener.h"
#include "server/rpc/master_loop.h"
#include "server/rpc/secrets.h"
#include "server/rpc/server_tls.h"
#include "server/state/sqlite_store.h"
#include "server/state/writer.h"
#include "vocabulary/version.h"

namespace syncbn {
namespace {

absl::StatusOr<std::vector<rpc::ListenAddress>> ParseAddresses(const MasterServer::Options& options) {
  if (options.addresses.empty()) return absl::InvalidArgumentError("there is no address to listen on");
  const bool tls = !options.tls.cert_file.empty() || options.tls.auto_tls;
  std::vector<rpc::ListenAddress> addresses;
  for (const std::string& text : options.addresses) {
    auto address = rpc::ParseListenAddress(text);
    if (!address.ok()) return address.status();
    if (!tls && !options.insecure && !address->is_local()) {
      return absl::InvalidArgumentError(
          absl::StrCat("\"", text, "\" is reachable from other hosts, and there is no TLS: give a certificate and a ",
                       "key, or say --insecure"));
    }
    addresses.push_back(*std::move(address));
  }
  return addresses;
}

// Returns a number that no other master has.
uint64_t DrawInstance() {
  uint64_t instance = 0;
  while (instance == 0) std::memcpy(&instance, RandomBytes(sizeof(instance)).data(), sizeof(instance));
  return instance;
}

absl::StatusOr<std::vector<rpc::IdentityTemplate>> ParseIdentity(const MasterServer::TlsOptions& tls) {
  std::vector<rpc::IdentityTemplate> templates;
  for (const std::string& text : tls.identity_templates) {
    auto parsed = rpc::IdentityTemplate::Parse(text);
    if (!parsed.ok()) return parsed.status();
    templates.push_back(*std::move(parsed));
  }
  if (!templates.empty() && !tls.client_cert_auth) {
    return absl::InvalidArgumentError(
        "an identity template is given, but clients are not asked for a certificate: say --client-cert-auth too");
  }
  return templates;
}

// Returns null without TLS.
absl::StatusOr<std::shared_ptr<rpc::ServerTls>> LoadTls(const MasterServer::TlsOptions& tls) {
  if (tls.cert_file.empty() != tls.key_file.empty()) {
    return absl::InvalidArgumentError("TLS needs a certificate and its key, both");
  }
  if (tls.client_cert_auth && (tls.trusted_ca_file.empty() || tls.cert_file.empty())) {
    return absl::InvalidArgumentError("authenticating clients needs a certificate, its key, and a trusted CA");
  }
  if (!tls.client_cert_auth && !tls.trusted_ca_file.empty()) {
    return absl::InvalidArgumentError(
        "a trusted CA is given, but clients are not asked for a certificate: say --client-cert-auth too");
  }
  if (tls.cert_file.empty()) return nullptr;
  return rpc::ServerTls::Load({tls.cert_file, tls.key_file, tls.trusted_ca_file});
}

// Leaves descriptors for files, the loop and libraries.
size_t DefaultMaxConnections() {
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return size_t{1} << 20;
  const size_t descriptors = limit.rlim_cur;
  return std::max<size_t>(descriptors - std::min<size_t>(descriptors / 4, 128), 1);
}

// Takes what is stored in the directory, if there is one, and has the loop store more there. Returns the writer, which
// is null without a directory.
absl::StatusOr<std::unique_ptr<state::Writer>> OpenState(const std::string& directory, rpc::LoopOptions* loop) {
  if (directory.empty()) return nullptr;
  auto store = state::OpenSqliteStore(directory);
  if (!store.ok()) return store.status();
  auto groups = (*store)->Load();
  if (!groups.ok()) return groups.status();
  size_t layers = 0;
  for (const core::GroupState& group : *groups) layers += group.layers.size();
  Log(LogLevel::kInfo,
      absl::StrCat("restored ", layers, " layers of ", groups->size(), " groups from \"", directory, "\""));
  loop->restored = *std::move(groups);
  auto writer = state::Writer::Start(*std::move(store), absl::StrCat("\"", directory, "\""));
  if (writer.ok()) loop->state_writer = writer->get();
  return writer;
}

// Sets the common channel arguments. Removes reflection and channelz, which register themselves with every server of
// the process, where they are not wanted.
class ServerOptions final : public grpc::ServerBuilderOption {
 public:
  explicit ServerOptions(bool wanted) : wanted_(wanted) {}
  void UpdateArguments(grpc::ChannelArguments* arguments) override { SetTransportArguments(arguments); }
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    const std::string reflection = grpc::reflection::ProtoServerReflectionPlugin().name();
    const auto ours = [&reflection](const auto& plugin) {
      return plugin->name() == reflection || plugin->name() == "channelz_service";
    };
    if (wanted_) return;
    plugins->erase(std::remove_if(plugins->begin(), plugins->end(), ours), plugins->end());
  }

 private:
  const bool wanted_;
};

// Checks the ranges that the flags check too, for programs that set the options themselves.
absl::Status CheckLimits(const MasterServer::Options& options) {
  const core::Limits& limits = options.limits;
  for (const auto& [name, value] : {std::pair<const char*, uint64_t>{"max_workers", limits.max_workers},
                                    {"max_groups", limits.max_groups},
                                    {"max_channels", limits.max_channels},
                                    {"max_retained_bytes", limits.max_retained_bytes}}) {
    if (value == 0) return absl::InvalidArgumentError(absl::StrCat(name, " is 0; it is at least 1"));
  }
  if (options.max_frame_bytes <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_frame_bytes is ", options.max_frame_bytes, "; it is at least 1"));
  }
  return absl::OkStatus();
}

void Tune(grpc::ServerBuilder* builder, const MasterServer::Options& options) {
  builder->SetMaxReceiveMessageSize(options.max_frame_bytes);
  builder->SetMaxSendMessageSize(-1);  // Frames are bounded by the limits of layers.
  // Messages are never compressed (PROTOCOL.md, section 1). A message that claims to be is refused by its algorithm,
  // without being decompressed: a kilobyte could become a megabyte, whatever the limit of a frame.
  builder->AddChannelArgument(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0);
  builder->SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_DEFLATE, false);
  builder->SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_GZIP, false);
  // Workers of one process share a connection, and all workers of a group may be in one process.
  constexpr uint32_t kMostStreams = 1 << 20;
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS,
                              static_cast<int>(std::min(options.limits.max_workers, kMostStreams) + 64));
  builder->AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, 5000);
  // gRPC handles what it has read at once before anything else happens to the connection: by default up to 4 MiB, which
  // can be a hundred thousand calls. With less than workers read at once, gRPC receives and answers a contribution of
  // 32 KB in more system calls.
  builder->AddChannelArgument(GRPC_ARG_TCP_MAX_READ_CHUNK_SIZE, 128 << 10);
  // A worker has a call for as long as it lives. A connection without any is a stranger's, or has been forgotten.
  builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, 30000);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5000);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
  // Reflection, channelz and the answer to unknown methods are synchronous services of gRPC's: one thread waits for
  // their calls, and each call has a thread. Calls beyond the limit of threads are refused.
  constexpr int kMaxThreads = 4;
  grpc::ResourceQuota quota("syncbn-master");
  quota.SetMaxThreads(kMaxThreads);
  builder->SetResourceQuota(quota);
  builder->SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::NUM_CQS, 1);
  builder->SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::MIN_POLLERS, 1);
  builder->SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::MAX_POLLERS, 1);
}

bool IsLocal(const std::vector<rpc::ListenAddress>& addresses) {
  return std::all_of(addresses.begin(), addresses.end(), [](const auto& address) { return address.is_local(); });
}

// Returns the paths of the unix sockets among the addresses.
std::vector<std::string> SocketsOf(const std::vector<rpc::ListenAddress>& addresses) {
  std::vector<std::string> sockets;
  for (const rpc::ListenAddress& address : addresses) {
    if (!address.path.empty()) sockets.push_back(address.path);
  }
  return sockets;
}

absl::StatusOr<rpc::LoopOptions> MakeLoopOptions(const MasterServer::Options& options,
                                                 const std::vector<rpc::ListenAddress>& addresses) {
  for (const std::string* token : {&options.token, &options.inspection_token}) {
    if (token->empty()) continue;
    if (absl::Status status = CheckToken(*token); !status.ok()) return status;
  }
  auto identity = ParseIdentity(options.tls);
  if (!identity.ok()) return identity.status();
  rpc::LoopOptions loop;
  loop.limits = options.limits;
  loop.max_unread_bytes = options.max_unread_bytes;
  loop.max_frame_bytes = static_cast<size_t>(options.max_frame_bytes);
  loop.memory_sharing = options.shared_memory;
  loop.memory_directories = SharedMemoryDirectories(options.shared_memory_dir, SocketsOf(addresses));
  loop.join_timeout = options.join_timeout;
  loop.max_watchers = options.max_watchers;
  loop.description = options.description.empty() ? absl::StrCat("syncbn-master/", kVersion) : options.description;
  loop.revision = options.revision;
  loop.instance = DrawInstance();
  loop.token = rpc::SecretOf(options.token);
  loop.identity = *std::move(identity);
  loop.inspection = options.inspection.value_or(IsLocal(addresses));
  loop.inspection_token = options.inspection_token.empty() ? loop.token : rpc::SecretOf(options.inspection_token);
  return loop;
}

}  // namespace

class MasterServer::Impl {
 public:
  // `state_writer` is that of the options.
  Impl(rpc::LoopOptions options, std::unique_ptr<state::Writer> state_writer, size_t max_connections,
       size_t max_connections_per_address)
      : connections_(max_connections, max_connections_per_address),
        state_writer_(std::move(state_writer)),
        loop_(WithConnections(std::move(options))) {}
  ~Impl() { Shutdown(absl::ZeroDuration()); }

  absl::Status Start(const Options& options, const std::vector<rpc::ListenAddress>& addresses,
                     std::shared_ptr<rpc::ServerTls> tls, std::optional<rpc::AutoTls> made) {
    static const bool plugins = [] {
      grpc::reflection::InitProtoReflectionServerBuilderPlugin();
      return true;
    }();
    (void)plugins;
    tls_ = std::move(tls);
    made_ = std::move(made);
    std::vector<rpc::Listener> listeners;
    for (const rpc::ListenAddress& address : addresses) {
      auto listener = rpc::Listener::Open(address);
      if (!listener.ok()) return listener.status();
      targets_.push_back(listener->target());
      if (port_ == 0) port_ = listener->port();
      listeners.push_back(*std::move(listener));
    }
    grpc::ServerBuilder builder;
    Tune(&builder, options);
    builder.SetOption(std::make_unique<ServerOptions>(options.reflection.value_or(IsLocal(addresses))));
    auto sink = builder.experimental().AddExternalConnectionAcceptor(
        grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD,
        tls_ == nullptr ? grpc::InsecureServerCredentials() : tls_->MakeCredentials());
    loop_.Register(&builder);
    server_ = builder.BuildAndStart();
    if (server_ == nullptr) return absl::UnavailableError("the server cannot be started");
    acceptor_ = std::make_unique<rpc::Acceptor>(
        std::move(listeners), &connections_, [this] { return loop_.progress(); },
        [this](bool add) { loop_.Relieve(add); }, [this](bool listening) { loop_.SetListening(listening); });
    absl::Status started = loop_.Start();
    if (started.ok()) started = acceptor_->Start(std::move(sink));
    const absl::MutexLock lock(&mutex_);
    serving_ = true;
    // The destructor ends what has been started.
    return started;
  }

  int port() const { return port_; }
  size_t max_connections() const { return connections_.max_connections(); }
  size_t workers() const { return loop_.workers(); }
  const std::vector<std::string>& targets() const { return targets_; }
  // Returns whether this is a forked child, which has none of the threads that this object waits for.
  bool IsForked() const { return open_.forked(); }

  absl::Status ReloadCertificates() {
    if (tls_ == nullptr)
      return absl::FailedPreconditionError("there is no TLS, so there are no certificates to reload");
    return tls_->Reload();
  }

  std::shared_ptr<grpc::Channel> InProcessChannel() const {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(-1);  // Answers are bounded by the master's limits.
    std::vector<std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface>> interceptors;
    interceptors.push_back(rpc::MakeBearer(own_token_));
    return server_->experimental().InProcessChannelWithInterceptors(arguments, std::move(interceptors));
  }

  absl::Time certificate_expiry() const { return tls_ == nullptr ? absl::InfiniteFuture() : tls_->expiry(); }

  bool Probe() {
    absl::MutexLock lock(&mutex_);
    if (!serving_) return true;
    if (!loop_.Probe()) return false;
    const uint64_t turns = acceptor_->turns();
    return turns != std::exchange(turns_, turns);
  }

  void Shutdown(absl::Duration grace) {
    absl::MutexLock lock(&mutex_);
    if (!std::exchange(serving_, false)) return;
    loop_.BeginShutdown();
    acceptor_->Stop();
    const Clock clock;
    server_->Shutdown(clock.QueueDeadline(clock.Now() + grace));
    loop_.Stop();
    if (state_writer_ != nullptr) state_writer_->Close();
  }

 private:
  rpc::LoopOptions WithConnections(rpc::LoopOptions options) {
    options.connections = &connections_;
    options.own_token = rpc::SecretOf(own_token_);
    return options;
  }

  const OpenHere open_;  // Until the loop and the server have been taken down.
  // Lets channels of this process inspect the master, whatever its options are.
  const std::string own_token_ = absl::BytesToHexString(RandomBytes(16));
  rpc::Connections connections_;
  const std::unique_ptr<state::Writer> state_writer_;  // Null without a state directory.
  rpc::MasterLoop loop_;
  std::optional<rpc::AutoTls> made_;
  std::shared_ptr<rpc::ServerTls> tls_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<rpc::Acceptor> acceptor_;
  std::vector<std::string> targets_;
  int port_ = 0;
  absl::Mutex mutex_;
  bool serving_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t turns_ ABSL_GUARDED_BY(mutex_) = 0;  // The acceptor's, when the loop last answered a probe.
};

absl::StatusOr<std::unique_ptr<MasterServer>> MasterServer::Start(Options options) {
  if (absl::Status status = CheckNotForked(); !status.ok()) return status;
  PrepareGrpc();
  if (absl::Status status = CheckLimits(options); !status.ok()) return status;
  const auto addresses = ParseAddresses(options);
  if (!addresses.ok()) return addresses.status();
  auto loop = MakeLoopOptions(options, *addresses);
  if (!loop.ok()) return loop.status();
  std::optional<rpc::AutoTls> made;
  if (options.tls.auto_tls) {
    auto pair = rpc::AutoTls::Make(*addresses, {options.tls.cert_file, options.tls.key_file, ""});
    if (!pair.ok()) return pair.status();
    made = *std::move(pair);
    options.tls.cert_file = made->files().cert_file;
    options.tls.key_file = made->files().key_file;
  }
  auto tls = LoadTls(options.tls);
  if (!tls.ok()) return tls.status();
  auto state_writer = OpenState(options.state_dir, &*loop);
  if (!state_writer.ok()) return state_writer.status();
  if (absl::Status status = StartGrpc(); !status.ok()) return status;
  auto impl = std::make_unique<Impl>(*std::move(loop), *std::move(state_writer),
                                     options.max_connections != 0 ? options.max_connections : DefaultMaxConnections(),
                                     options.max_connections_per_address);
  if (absl::Status status = impl->Start(options, *addresses, *std::move(tls), std::move(made)); !status.ok()) {
    return status;
  }
  return std::unique_ptr<MasterServer>(new MasterServer(std::move(impl)));
}

MasterServer::MasterServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
MasterServer::~MasterServer() {
  if (impl_->IsForked()) static_cast<void>(impl_.release());  // Its threads are the parent's: nothing can be ended.
}

int MasterServer::port() const { return impl_->port(); }
std::string MasterServer::target() const { return impl_->targets().front(); }
std::vector<std::string> MasterServer::targets() const { return impl_->targets(); }
size_t MasterServer::max_connections() const { return impl_->max_connections(); }
size_t MasterServer::workers() const { return impl_->workers(); }
absl::Status MasterServer::ReloadCertificates() { return impl_->ReloadCertificates(); }
absl::Time MasterServer::certificate_expiry() const { return impl_->certificate_expiry(); }
bool MasterServer::Probe() { return impl_->IsForked() || impl_->Probe(); }
std::shared_ptr<grpc::Channel> MasterServer::InProcessChannel() const { return impl_->InProcessChannel(); }
void MasterServer::Shutdown(absl::Duration grace) {
  if (!impl_->IsForked()) impl_->Shutdown(grace);
}

}  // namespace syncbn
