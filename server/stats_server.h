// A master in this process: the round engine behind gRPC.

#ifndef SYNCBN_SERVER_STATS_SERVER_H_
#define SYNCBN_SERVER_STATS_SERVER_H_

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/core/limits.h"

namespace syncbn {

// Serves StatisticsService, InspectionService, health and reflection until it is destroyed or shut down. Channelz is
// for all servers of a process or none: a process that wants it calls
// grpc::channelz::experimental::InitChannelzService().
//
// Lines for people go to Log() of plumbing/log.h. The process keeps its signals and limits; gRPC and Abseil are
// prepared as for a worker (Worker::Join). A child that the process forks holds neither the listening sockets nor the
// connections, and may destroy the object, which does nothing there.
//
//   MasterServer::Options options;
//   options.addresses = {"127.0.0.1:0"};
//   absl::StatusOr<std::unique_ptr<MasterServer>> server = MasterServer::Start(options);
//   if (!server.ok()) return server.status();
//   Announce((*server)->target());
//
// Thread safety: all methods may be called from any thread.
class MasterServer {
 public:
  struct TlsOptions {
    // PEM files. With a certificate and key the server speaks TLS alone.
    std::string cert_file;
    std::string key_file;
    // Clients must present a certificate that one of these signed. One is nothing without the other, and refused.
    std::string trusted_ca_file;
    bool client_cert_auth = false;
  };

  struct Options {
    // Where to listen: HOST:PORT (port 0: any free one; an IPv6 address in brackets), unix:PATH or unix-abstract:NAME.
    // A host's name stands for all its addresses. At least one.
    std::vector<std::string> addresses = {"127.0.0.1:50051"};
    TlsOptions tls;
    // Listen beyond loopback without TLS. Otherwise that is INVALID_ARGUMENT.
    bool insecure = false;
    core::Limits limits;
    // Longest frame from a worker, in bytes.
    int max_frame_bytes = 64 << 20;
    // Bytes that may wait to be read by one worker before its stream is closed as too slow. With half of them waiting,
    // the worker is not read from. More than twice the longest frame that workers send.
    size_t max_unread_bytes = size_t{64} << 20;
    // A stream that has not joined by then is closed.
    absl::Duration join_timeout = absl::Seconds(5);
    // Watchers of InspectionService.WatchRounds, over all groups.
    size_t max_watchers = 64;
    // Connections that are open at one time. Beyond, they are closed as they come. 0: as many as the process's limit of
    // descriptors leaves room for.
    size_t max_connections = 0;
    // Serves gRPC's reflection. By default, only if every address is reachable from this host alone.
    std::optional<bool> reflection;
    // "syncbn-master/" and the version: what workers are told about this process.
    std::string description;
  };

  // Binds every address and starts to serve. Errors: INVALID_ARGUMENT (a malformed or unknown address, a TLS file that
  // cannot be used, a refusal to listen beyond loopback), UNAVAILABLE (an address that cannot be bound, and why);
  // FAILED_PRECONDITION (FORKED) in a process that was forked from one that has or had a worker or master, directly or
  // further up.
  static absl::StatusOr<std::unique_ptr<MasterServer>> Start(Options options);

  // Shuts down at once, as Shutdown(absl::ZeroDuration()) does.
  ~MasterServer();
  MasterServer(const MasterServer&) = delete;
  MasterServer& operator=(const MasterServer&) = delete;

  // The port of the first TCP address, also where it was asked to be any; 0 if all are unix sockets.
  int port() const;
  // What a client passes to reach the first address: "127.0.0.1:40123" or "unix:/run/syncbn.sock".
  std::string target() const;
  // The targets of all addresses, in order.
  std::vector<std::string> targets() const;

  // The limit in force.
  size_t max_connections() const;

  // Reads certificate, key and trusted CA anew, for connections to come; those that are open keep what they have.
  // Errors: INVALID_ARGUMENT (a file that cannot be used; everything stays as it was), FAILED_PRECONDITION (no TLS).
  absl::Status ReloadCertificates();
  // When the certificate expires; the infinite future without TLS.
  absl::Time certificate_expiry() const;

  // Tells every worker SHUTTING_DOWN, lets streams drain for at most `grace`, then ends. Idempotent; returns when done.
  void Shutdown(absl::Duration grace);

 private:
  class Impl;
  explicit MasterServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace syncbn

#endif  // SYNCBN_SERVER_STATS_SERVER_H_
