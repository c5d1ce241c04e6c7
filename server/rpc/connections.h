// The connections that gRPC serves: how many there are, whose they are, and which of them have a worker that joined.

#ifndef SYNCBN_SERVER_RPC_CONNECTIONS_H_
#define SYNCBN_SERVER_RPC_CONNECTIONS_H_

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "plumbing/clock.h"
#include "server/log/throttle.h"
#include "server/rpc/listen_address.h"

namespace syncbn::rpc {

// gRPC has no means to bound or to end a connection. A socket that is shut down by its descriptor ends for gRPC as if
// its peer had gone. The acceptor adds connections; the services tell what goes on in them, by the name of the peer as
// gRPC tells it. The peers of unix sockets, and those with link-local addresses of IPv6, have no names: their
// connections are counted, and nothing else.
//
// Strangers cannot keep workers out. At the limit, the connection that has been open for longest without a worker makes
// room. One that has no worker yet may send a few megabytes, and start a hundred calls that come to nothing.
//
// gRPC keeps what has come of a frame until the rest comes, and tells nobody. What a connection has sent beyond the
// frames that came of it is that, and a little more.
//
// Thread safety: any thread may call any method.
class Connections {
 public:
  // Counts the frames that came of a connection. Thread safety: any thread may call any method.
  class Frames {
   public:
    void Add(size_t bytes) { bytes_ += bytes + bytes / 8 + kOverhead; }
    // Returns the bytes that a connection has sent for its frames, or more.
    uint64_t bytes() const { return bytes_; }

   private:
    // Bytes of HTTP/2 and TLS for each frame, those that acknowledge its answer among them. Long ones are divided.
    static constexpr size_t kOverhead = 512;
    std::atomic<uint64_t> bytes_{0};
  };

  static constexpr size_t kMostUnfinishedBytes = size_t{1} << 30;
  static constexpr size_t kMostOfStrangers = size_t{16} << 20;
  static constexpr absl::Duration kUnfinishedPatience = absl::Minutes(2);
  static constexpr absl::Duration kMostSuspected = absl::Milliseconds(500);

  // At most `max_connections`, and `max_of_address` from one address. If the latter is 0, it is half of the former, and
  // does not hold for addresses of this machine. Frames that have begun must have come after `patience`. In all, they
  // are kept up to `max_unfinished_bytes` where a worker has joined, and up to `max_of_strangers` elsewhere: headers
  // too are frames, which may have no end, and gRPC keeps twice their length.
  Connections(size_t max_connections, size_t max_of_address, size_t max_unfinished_bytes = kMostUnfinishedBytes,
              absl::Duration patience = kUnfinishedPatience, size_t max_of_strangers = kMostOfStrangers);

  size_t max_connections() const { return max_connections_; }
  // Returns whether there may be connections whose peers have names.
  bool any() const;

  // Takes note of a connection that was accepted. Returns why there is no room for it, in which case the caller closes
  // it; empty otherwise.
  std::string Add(int descriptor, const SocketAddress& peer);

  // Returns the peer's address, if max_of_address holds for it; empty otherwise.
  std::string BoundedAddressOf(absl::string_view peer) const;

  // Returns the counter to which each frame is to be added that comes of this peer by gRPC; null if it has no name.
  std::shared_ptr<Frames> FramesOf(absl::string_view peer) const;

  // A worker has joined by a call of this peer, or such a call has ended.
  void Joined(absl::string_view peer);
  void Left(absl::string_view peer);
  // The peer has ended or broken a call by which nobody had joined. Too many such calls end the connection.
  void Strayed(absl::string_view peer);
  // Shuts the connection of this peer, if there is one. `why` goes to the log.
  void End(absl::string_view peer, absl::string_view why);

  // Ends connections without a worker that have sent too much, and those that do not finish their frames. To be called
  // several times in a second.
  void Check();

  // Notes how many bytes of each connection gRPC has read and written.
  void CountBytes();
  // Ends the connection of which gRPC has read most since CountBytes, if `spent` of CPU time is far too much for what
  // it has read of all, and written to the others; and with it those of the same address that have no worker. A
  // connection by which a worker has joined stays, unless most of what gRPC reads is its for kMostSuspected of CPU
  // time, and hardly any of that becomes frames.
  void EndFlood(absl::Duration spent);
  // Returns how many bytes of a connection gRPC has read; 0 if there is no such connection.
  uint64_t ReadBytes(int descriptor) const;
  // Ends a connection that is being handed to gRPC, and of which `read` bytes had been read when `spent` of CPU time
  // began, if that is far too much for what has been read since.
  void EndHandover(int descriptor, uint64_t read, absl::Duration spent);
  // Returns how many connections have been ended for their calls, or as floods.
  uint64_t floods() const;
  // Returns whether new connections should wait, for what a flood has left behind: from before its peer can know of the
  // end, until SettleFloods.
  bool flooded() const;
  // Tells that what so many floods have left behind is gone.
  void SettleFloods(uint64_t floods);

 private:
  // The amount of something that a peer may still do; it comes back with time.
  struct Budget {
    double left = 0.0;
    absl::Time as_of;
  };
  // The cost of a connection by which a worker has joined, since it came under suspicion.
  struct Suspicion {
    absl::Duration spent;
    uint64_t read = 0;  // Bytes that had been read at its beginning,
    uint64_t come = 0;  // and bytes of frames.
  };
  struct Connection {
    int descriptor = -1;
    ino_t inode = 0;
    std::string peer;     // "192.0.2.1:4711"; empty if it has no name.
    std::string address;  // "192.0.2.1".
    bool local = false;
    absl::Time since;
    size_t workers = 0;  // Those that have joined.
    bool had_worker = false;
    // Bytes, when CountBytes was called.
    uint64_t read = 0;
    uint64_t written = 0;
    uint64_t come = 0;  // Of frames.
    Suspicion suspicion;
    Budget strays;
    std::shared_ptr<Frames> frames = std::make_shared<Frames>();
    // The count of `frames` once those have come that were unfinished at the time due_since.
    std::optional<uint64_t> due;
    absl::Time due_since;
  };
  // Bytes of unfinished frames that a connection has sent.
  struct Unfinished {
    uint64_t read = 0;     // By gRPC, or less: it holds them.
    uint64_t waiting = 0;  // They wait to be read.
    int descriptor = -1;
  };
  // A connection without a worker that was broken off. gRPC holds the unfinished bytes until it has closed the
  // descriptor.
  struct Ended {
    int descriptor = -1;
    ino_t inode = 0;
    uint64_t unfinished = 0;
  };

  // Forgets connections that gRPC has closed, which it does not tell; their descriptors may be other files by now. Does
  // nothing shortly after it has done so.
  void Purge(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Forget(int descriptor) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Returns null if there is no such peer.
  Connection* Find(absl::string_view peer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool IsBounded(const Connection& connection) const {
    return !connection.peer.empty() && (!connection.local || local_too_);
  }
  // Takes note that most of what gRPC has read since CountBytes, for `spent` of CPU time, is of a connection by which a
  // worker has joined. Returns whether it has been so for too long.
  static bool Suspect(absl::Duration spent, Connection* connection);
  // Shuts the oldest connection without a worker. Returns whether there was one that has had some time to join.
  bool MakeRoom(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  static Unfinished UnfinishedOf(const Connection& connection, absl::Time now);
  // Returns whether frames that had begun long ago have not come yet.
  bool IsOverdue(uint64_t unfinished, absl::Time now, Connection* connection) const;
  void CheckStrangers(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CheckUnfinished(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Shuts those of which gRPC holds most, until it holds `most` bytes together for the others.
  void ShutGreediest(uint64_t most, std::vector<Unfinished> all, absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Shuts strangers that hold much, or would if gRPC read on, as long as it holds too much for them and for those that
  // have ended.
  void ShutBehindEnded(const std::vector<Unfinished>& strangers, absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Breaks the connection off and forgets it. What has arrived by it is dropped.
  void Shut(const Connection& connection, absl::string_view why, absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool IsFull(const Connection& connection) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const size_t max_connections_;
  const size_t max_of_address_;
  const bool local_too_;  // max_of_address_ holds for addresses of this machine.
  const size_t max_unfinished_bytes_;
  const size_t max_of_strangers_;
  const absl::Duration patience_;
  const Clock clock_;
  mutable absl::Mutex mutex_;
  absl::Time purged_at_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  absl::flat_hash_map<int, Connection> connections_ ABSL_GUARDED_BY(mutex_);   // By descriptor.
  absl::flat_hash_map<std::string, int> descriptors_ ABSL_GUARDED_BY(mutex_);  // By peer.
  absl::flat_hash_map<std::string, size_t> of_address_ ABSL_GUARDED_BY(mutex_);
  std::vector<Ended> ended_ ABSL_GUARDED_BY(mutex_);
  uint64_t floods_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t settled_floods_ ABSL_GUARDED_BY(mutex_) = 0;
  Throttle throttle_ ABSL_GUARDED_BY(mutex_);
};

// Returns the peer as Connections names it, of gRPC's name for it ("ipv4:192.0.2.1:4711", "ipv6:%5B::1%5D:4711"); empty
// for a unix socket's.
std::string PeerName(absl::string_view uri);

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_CONNECTIONS_H_
