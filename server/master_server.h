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
#include "plumbing/shared_file.h"
#include "server/core/limits.h"

namespace grpc {
class Channel;
}  // namespace grpc

namespace syncbn {

// Serves StatisticsService, InspectionService, health and reflection until it is destroyed or shut down. Channelz
// belongs to all servers of a process or none: a process that wants it calls
// grpc::channelz::experimental::InitChannelzService().
//
// Messages for people go to Log() of plumbing/log.h. The process keeps its signals and limits; gRPC and Abseil are
// prepared as for a worker (plumbing/grpc_process.h). A forked child holds neither the listening sockets nor the
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
    // PEM files. With a certificate and key the server accepts TLS only.
    std::string cert_file;
    std::string key_file;
    // With both, clients must present a certificate that the trusted CA signed. Only one of them is an error.
    std::string trusted_ca_file;
    bool client_cert_auth = false;
    // Makes a certificate and key where the files do not exist. Without files, they are in a folder of their own, and
    // gone when the master has ended; the log tells the certificate's path and fingerprint.
    bool auto_tls = false;
    // With client_cert_auth: names of which a worker's certificate must have one, "URI:..." or "DNS:...", with {job},
    // {group} and {rank} in place of what the worker joins as. Empty: any certificate may join as anyone.
    std::vector<std::string> identity_templates;
  };

  struct Options {
    // Addresses to listen on, at least one: HOST:PORT (port 0 for any free one; an IPv6 address in brackets), unix:PATH
    // or unix-abstract:NAME. A host's name stands for all its addresses.
    std::vector<std::string> addresses = {"127.0.0.1:50051"};
    TlsOptions tls;
    // Allows listening beyond loopback without TLS, which is refused otherwise.
    bool insecure = false;
    // The token that every worker must join with. Empty: each job has the token of its first join.
    std::string token;
    // Serves InspectionService. By default, only if no address can be reached from another machine.
    std::optional<bool> inspection;
    // The token that callers of InspectionService must bear. If empty, it is `token`.
    std::string inspection_token;
    core::Limits limits;
    // Longest frame from a worker, in bytes.
    int max_frame_bytes = 64 << 20;
    // Bytes that one worker may leave unread before its stream is closed as too slow. At half of them, its group is not
    // read from. Should be more than twice the longest frame that workers send.
    size_t max_unread_bytes = size_t{64} << 20;
    // Time after which a stream that has not joined is closed.
    absl::Duration join_timeout = absl::Seconds(5);
    // Calls of InspectionService.WatchRounds at one time, over all groups.
    size_t max_watchers = 64;
    // Connections open at one time; more are closed as they arrive. 0 for as many as the process's limit of descriptors
    // leaves room for.
    size_t max_connections = 0;
    // Connections of one address. 0 for half of max_connections, and no limit for addresses of this machine.
    size_t max_connections_per_address = 0;
    // Serves gRPC's reflection. By default, only if no address can be reached from another machine.
    std::optional<bool> reflection;
    // The place where the running statistics are kept between the lives of masters: a directory that one master uses at
    // a time, made if only its last part does not exist. Empty: they begin anew with each master.
    std::string state_dir;
    // Workers on this machine whose memory is shared, in place of frames by gRPC (PROTOCOL.md, "Shared memory").
    MemorySharing shared_memory = MemorySharing::kSameUser;
    // The directory of that memory. Empty: beside a unix socket that is listened on, or /dev/shm.
    std::string shared_memory_dir;
    // Description of this process for its workers. Empty for "syncbn-master/" and the version.
    std::string description;
    // The commit of this program, for InspectionService. Empty if it is not known.
    std::string revision;
  };

  // Binds every address and starts to serve.
  //
  // Returns: the master, which serves already.
  // Errors: INVALID_ARGUMENT (a malformed or unknown address, an unusable TLS file, token or identity template, no TLS
  // beyond loopback, a state directory that cannot be used); UNAVAILABLE (an address that cannot be bound, with the
  // reason; a state directory that another master uses); DATA_LOSS (a damaged state file, which stays as it is);
  // FAILED_PRECONDITION (a state file of a newer version, which stays as it is; FORKED in a process that was forked,
  // directly or indirectly, from one that has or had a worker or master); RESOURCE_EXHAUSTED (no thread can be had).
  static absl::StatusOr<std::unique_ptr<MasterServer>> Start(Options options);

  // Shuts down without grace.
  ~MasterServer();
  MasterServer(const MasterServer&) = delete;
  MasterServer& operator=(const MasterServer&) = delete;

  // Returns: the actual port of the first TCP address; 0 if all addresses are unix sockets.
  int port() const;
  // Returns: the target by which clients reach the first address: "127.0.0.1:40123" or "unix:/run/syncbn.sock".
  std::string target() const;
  // Returns: the targets of all addresses, in order.
  std::vector<std::string> targets() const;

  // Returns: the limit of connections in force.
  size_t max_connections() const;

  // Returns: the number of workers' streams that are open now, over all groups. A process that ends closes its own.
  size_t workers() const;

  // Asks the threads of the master for a sign of life. Returns whether they have given the one that the call before
  // asked for; a call too soon after it returns false. True after Shutdown.
  bool Probe();

  // Reads certificate, key and trusted CA again, for connections to come; open ones keep theirs.
  //
  // Errors: INVALID_ARGUMENT (an unusable file; nothing has changed), FAILED_PRECONDITION (no TLS).
  absl::Status ReloadCertificates();
  // Returns: the time at which the certificate expires; the infinite future without TLS.
  absl::Time certificate_expiry() const;

  // Returns: a channel to this master within the process, without TLS. Its calls to InspectionService are served
  // whatever the options say about inspection. They fail once the master has been shut down.
  std::shared_ptr<grpc::Channel> InProcessChannel() const;

  // Ends every worker's stream with SHUTTING_DOWN, waits at most `grace` for the streams to drain, then stops. Returns
  // when that is done. Idempotent.
  void Shutdown(absl::Duration grace);

 private:
  class Impl;
  explicit MasterServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace syncbn

#endif  // SYNCBN_SERVER_STATS_SERVER_H_
