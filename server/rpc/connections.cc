#include "server/rpc/connections.h"

#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "plumbing/log.h"

namespace syncbn::rpc {
namespace {

// The least time that a connection has for its first worker to join before it may have to make room.
constexpr absl::Duration kTimeToJoin = absl::Seconds(1);
// Looking at all connections takes a call of the system for each.
constexpr absl::Duration kPurgeInterval = absl::Milliseconds(50);
// Calls that come to nothing: so many at once, and so many in each second afterwards. Each costs the master as much as
// a small round. An honest process has a few, where its workers are interrupted while they join.
constexpr double kMostStrays = 100.0;
constexpr double kStraysPerSecond = 10.0;
// Bytes that a connection without a worker may send: a few of the longest first frames, and the calls of a patient
// inspector.
constexpr double kMostBytes = 16 << 20;
constexpr double kBytesPerSecond = 64 << 10;
// Bytes that a connection may have sent beyond its frames: calls, settings, and so much in each second for pings.
constexpr double kOtherBytes = 1 << 20;
constexpr double kOtherBytesPerSecond = 4 << 10;
// The same for one that never had a worker: a handshake of TLS with a chain of certificates, settings, and a ping every
// now and then; thousands of workers may be on their way at once. Beside them, it acknowledges what it reads, by an
// eighth of that at most.
constexpr double kOtherBytesOfStranger = 8 << 10;
constexpr double kOtherBytesOfStrangerPerSecond = 64;
constexpr uint64_t kReadBytesPerOtherByte = 8;
// Bytes that it may leave unfinished for any time.
constexpr uint64_t kBytesWithoutEnd = 56 << 10;

// A connection whose bytes take longer than this is a flood of small frames: a reset call takes 8 us and more for 28 to
// 200 bytes. A message takes less than 1 us for each KiB, less than 4 us with TLS, and perhaps 20 us on processors
// without instructions for AES.
constexpr double kFloodBytesPerMs = 32 << 10;
// Bytes that a worker sends for each byte of its frames, at most: gRPC reads the longest frame in far less CPU time
// than kMostSuspected.
constexpr int64_t kReadBytesPerFrameByte = 4;
// A flood sends at least so much while it is observed. Handshakes of TLS take as long, for much less.
constexpr int64_t kLeastFloodBytes = 8 << 10;

// Returns the inode, or 0 if the descriptor is no longer a socket.
ino_t SocketInode(int descriptor) {
  struct stat status;
  return fstat(descriptor, &status) == 0 && S_ISSOCK(status.st_mode) ? status.st_ino : 0;
}

// Returns the address in IPv4, if it is one that was written in IPv6 ("::ffff:192.0.2.1").
SocketAddress Plain(const SocketAddress& address) {
  if (address.family() != AF_INET6) return address;
  const auto& inet6 = reinterpret_cast<const sockaddr_in6&>(address.storage);
  if (!IN6_IS_ADDR_V4MAPPED(&inet6.sin6_addr)) return address;
  SocketAddress plain;
  auto& inet = reinterpret_cast<sockaddr_in&>(plain.storage);
  inet.sin_family = AF_INET;
  inet.sin_port = inet6.sin6_port;
  std::copy_n(inet6.sin6_addr.s6_addr + 12, sizeof(inet.sin_addr), reinterpret_cast<uint8_t*>(&inet.sin_addr));
  plain.length = sizeof(inet);
  return plain;
}

// Returns whether gRPC tells the address as SocketAddress::ToString does: not those of unix sockets, nor link-local
// ones of IPv6, which name an interface.
bool HasName(const SocketAddress& address) {
  if (address.family() == AF_INET6) return reinterpret_cast<const sockaddr_in6&>(address.storage).sin6_scope_id == 0;
  return address.family() == AF_INET;
}

// Returns what the system tells of the connection; zeros if it tells nothing.
tcp_info InfoOf(int descriptor) {
  tcp_info info = {};
  socklen_t length = sizeof(info);
  if (getsockopt(descriptor, IPPROTO_TCP, TCP_INFO, &info, &length) != 0) return {};
  return info;
}

// Returns the bytes that were written to the connection, sent or not.
uint64_t WrittenBytes(const tcp_info& info) {
  return info.tcpi_bytes_sent - info.tcpi_bytes_retrans + info.tcpi_notsent_bytes;
}

// Returns the bytes that wait to be read from the connection.
uint64_t WaitingBytes(int descriptor) {
  int bytes = 0;
  return ioctl(descriptor, SIOCINQ, &bytes) == 0 && bytes > 0 ? static_cast<uint64_t>(bytes) : 0;
}

// Returns how many bytes gRPC has read, or more: those that arrive meanwhile.
uint64_t ReadBytesOf(int descriptor) {
  const uint64_t waiting = WaitingBytes(descriptor);
  return InfoOf(descriptor).tcpi_bytes_received - waiting;
}

// Bounds what the system holds of a connection that is not being read. gRPC reads all of it in a row, and a stranger's
// should keep nobody waiting for long. Linux doubles the number. A first frame that is longer takes a few round trips.
void BoundBuffer(int descriptor) {
  constexpr int kBytes = 64 << 10;
  setsockopt(descriptor, SOL_SOCKET, SO_RCVBUF, &kBytes, sizeof(kBytes));
}

// Lets the system choose the length again. Returns false if it cannot: before Linux 5.14, a bound is for ever.
bool UnboundBuffer(int descriptor) {
  constexpr int kNoLocks = 0;
  return setsockopt(descriptor, SOL_SOCKET, SO_BUF_LOCK, &kNoLocks, sizeof(kNoLocks)) == 0;
}

// Ends the connection for its peer and for gRPC. After shutdown() alone, gRPC would read what has arrived: megabytes,
// and calls in them by the ten thousand.
void Break(int descriptor) {
  const sockaddr nobody = {AF_UNSPEC, {}};
  if (connect(descriptor, &nobody, sizeof(nobody)) != 0) shutdown(descriptor, SHUT_RDWR);
}

}  // namespace

std::string PeerName(absl::string_view uri) {
  if (!absl::ConsumePrefix(&uri, "ipv4:") && !absl::ConsumePrefix(&uri, "ipv6:")) return "";
  return absl::StrReplaceAll(uri, {{"%5B", "["}, {"%5D", "]"}});
}

Connections::Connections(size_t max_connections, size_t max_of_address, size_t max_unfinished_bytes,
                         absl::Duration patience, size_t max_of_strangers)
    : max_connections_(max_connections),
      max_of_address_(max_of_address != 0 ? max_of_address : std::max<size_t>(max_connections / 2, 1)),
      local_too_(max_of_address != 0),
      max_unfinished_bytes_(max_unfinished_bytes),
      max_of_strangers_(max_of_strangers),
      patience_(patience) {}

std::string Connections::Add(int descriptor, const SocketAddress& peer) {
  const SocketAddress plain = Plain(peer);
  Connection added;
  added.descriptor = descriptor;
  added.inode = SocketInode(descriptor);
  added.since = clock_.Now();
  added.strays = {kMostStrays, added.since};
  added.local = plain.is_local();
  if (HasName(plain)) {
    added.peer = plain.ToString();
    added.address = WithoutPort(added.peer);
  }
  const absl::MutexLock lock(&mutex_);
  Forget(descriptor);  // gRPC has closed the connection that had it before.
  if (connections_.size() >= max_connections_ || IsFull(added)) Purge(added.since);
  if (IsFull(added)) {
    return absl::StrCat(max_of_address_, " of ", added.address, " are open, the limit max_connections_per_address");
  }
  if (connections_.size() >= max_connections_ && !MakeRoom(added.since)) {
    return absl::StrCat(max_connections_, " are open, the limit max_connections");
  }
  if (!added.peer.empty()) {
    if (UnboundBuffer(descriptor)) BoundBuffer(descriptor);
    descriptors_[added.peer] = descriptor;
    ++of_address_[added.address];
  }
  connections_.emplace(descriptor, std::move(added));
  return "";
}

bool Connections::any() const {
  const absl::MutexLock lock(&mutex_);
  return !descriptors_.empty();
}

bool Connections::IsFull(const Connection& connection) const {
  if (!IsBounded(connection)) return false;
  const auto found = of_address_.find(connection.address);
  return found != of_address_.end() && found->second >= max_of_address_;
}

void Connections::Purge(absl::Time now) {
  if (now - purged_at_ < kPurgeInterval) return;
  purged_at_ = now;
  std::vector<int> closed;
  for (const auto& [descriptor, connection] : connections_) {
    if (SocketInode(descriptor) != connection.inode) closed.push_back(descriptor);
  }
  for (const int descriptor : closed) Forget(descriptor);
}

void Connections::Forget(int descriptor) {
  const auto found = connections_.find(descriptor);
  if (found == connections_.end()) return;
  const Connection& connection = found->second;
  if (!connection.peer.empty()) {
    const auto named = descriptors_.find(connection.peer);
    if (named != descriptors_.end() && named->second == descriptor) descriptors_.erase(named);
    const auto counted = of_address_.find(connection.address);
    if (--counted->second == 0) of_address_.erase(counted);
  }
  connections_.erase(found);
}

Connections::Connection* Connections::Find(absl::string_view peer) {
  if (peer.empty()) return nullptr;
  const auto found = descriptors_.find(peer);
  return found == descriptors_.end() ? nullptr : &connections_.at(found->second);
}

std::string Connections::BoundedAddressOf(absl::string_view peer) const {
  const absl::MutexLock lock(&mutex_);
  const auto found = descriptors_.find(peer);
  if (found == descriptors_.end()) return "";
  const Connection& connection = connections_.at(found->second);
  return IsBounded(connection) ? connection.address : "";
}

std::shared_ptr<Connections::Frames> Connections::FramesOf(absl::string_view peer) const {
  const absl::MutexLock lock(&mutex_);
  const auto found = descriptors_.find(peer);
  return found == descriptors_.end() ? nullptr : connections_.at(found->second).frames;
}

void Connections::Joined(absl::string_view peer) {
  const absl::MutexLock lock(&mutex_);
  Connection* const connection = Find(peer);
  if (connection == nullptr) return;
  ++connection->workers;
  if (!std::exchange(connection->had_worker, true)) UnboundBuffer(connection->descriptor);
}

void Connections::Left(absl::string_view peer) {
  const absl::MutexLock lock(&mutex_);
  Connection* const connection = Find(peer);
  if (connection != nullptr && connection->workers > 0) --connection->workers;
}

void Connections::Strayed(absl::string_view peer) {
  const absl::MutexLock lock(&mutex_);
  Connection* const connection = Find(peer);
  if (connection == nullptr) return;
  const absl::Time now = clock_.Now();
  Budget& strays = connection->strays;
  const double back = kStraysPerSecond * absl::ToDoubleSeconds(now - std::exchange(strays.as_of, now));
  strays.left = std::min(strays.left + back, kMostStrays) - 1.0;
  if (strays.left >= 0.0) return;
  ++floods_;
  Shut(*connection, "too many calls ended before a worker had joined by them", now);
}

void Connections::End(absl::string_view peer, absl::string_view why) {
  const absl::MutexLock lock(&mutex_);
  if (const Connection* const connection = Find(peer)) Shut(*connection, why, clock_.Now());
}

bool Connections::MakeRoom(absl::Time now) {
  const Connection* oldest = nullptr;
  for (const auto& [descriptor, connection] : connections_) {
    if (connection.peer.empty() || connection.workers > 0 || connection.since + kTimeToJoin > now) continue;
    if (oldest == nullptr || connection.since < oldest->since) oldest = &connection;
  }
  if (oldest == nullptr) return false;
  Shut(*oldest, "no worker has joined by it, and others need its place", now);
  return true;
}

void Connections::Check() {
  const absl::MutexLock lock(&mutex_);
  const absl::Time now = clock_.Now();
  CheckStrangers(now);
  CheckUnfinished(now);
}

void Connections::CheckStrangers(absl::Time now) {
  std::vector<int> greedy;
  for (const auto& [descriptor, connection] : connections_) {
    if (connection.peer.empty() || connection.workers > 0) continue;
    const double most = kMostBytes + kBytesPerSecond * absl::ToDoubleSeconds(now - connection.since);
    if (static_cast<double>(InfoOf(descriptor).tcpi_bytes_received) > most) greedy.push_back(descriptor);
  }
  for (const int descriptor : greedy) {
    Shut(connections_.at(descriptor), "it has sent more than a first frame, and no worker has joined by it", now);
  }
}

void Connections::CheckUnfinished(absl::Time now) {
  std::vector<int> overdue;
  std::vector<Unfinished> of_workers;
  std::vector<Unfinished> of_strangers;
  for (auto& [descriptor, connection] : connections_) {
    if (connection.peer.empty()) continue;
    const Unfinished unfinished = UnfinishedOf(connection, now);
    const uint64_t endless = connection.had_worker ? 0 : std::min(unfinished.read, kBytesWithoutEnd);
    if (IsOverdue(unfinished.read - endless, now, &connection)) {
      overdue.push_back(descriptor);
    } else {
      (connection.workers > 0 ? of_workers : of_strangers).push_back(unfinished);
    }
  }
  for (const int descriptor : overdue) {
    Shut(connections_.at(descriptor), "it does not finish the frames that it has begun", now);
  }
  ShutBehindEnded(of_strangers, now);
  ShutGreediest(max_unfinished_bytes_, std::move(of_workers), now);
  ShutGreediest(max_of_strangers_, std::move(of_strangers), now);
}

void Connections::ShutGreediest(uint64_t most, std::vector<Unfinished> all, absl::Time now) {
  uint64_t held = 0;
  for (const Unfinished& one : all) held += one.read;
  if (held <= most) return;
  std::sort(all.begin(), all.end(), [](const Unfinished& a, const Unfinished& b) { return a.read > b.read; });
  for (const Unfinished& one : all) {
    if (held <= most) return;
    held -= one.read;
    const auto found = connections_.find(one.descriptor);
    if (found != connections_.end()) {
      Shut(found->second, "unfinished frames take too much memory, and most of it is for this one", now);
    }
  }
}

void Connections::ShutBehindEnded(const std::vector<Unfinished>& strangers, absl::Time now) {
  const auto is_closed = [](const Ended& ended) { return SocketInode(ended.descriptor) != ended.inode; };
  ended_.erase(std::remove_if(ended_.begin(), ended_.end(), is_closed), ended_.end());
  if (ended_.empty()) return;
  uint64_t held = 0;
  for (const Ended& ended : ended_) held += ended.unfinished;
  for (const Unfinished& one : strangers) held += one.read;
  if (held <= max_of_strangers_) return;
  for (const Unfinished& one : strangers) {
    if (one.read + one.waiting <= kBytesWithoutEnd) continue;
    Shut(connections_.at(one.descriptor), "those that have just ended still take too much memory, and it would too",
         now);
  }
}

Connections::Unfinished Connections::UnfinishedOf(const Connection& connection, absl::Time now) {
  // In this order: frames that come meanwhile make it less, not more.
  const tcp_info info = InfoOf(connection.descriptor);
  const uint64_t received = info.tcpi_bytes_received;
  const uint64_t waiting = WaitingBytes(connection.descriptor);
  const double seconds = absl::ToDoubleSeconds(now - connection.since);
  uint64_t known = waiting + connection.frames->bytes();
  if (connection.had_worker) {
    known += static_cast<uint64_t>(kOtherBytes + kOtherBytesPerSecond * seconds);
  } else {
    known += static_cast<uint64_t>(kOtherBytesOfStranger + kOtherBytesOfStrangerPerSecond * seconds);
    known += WrittenBytes(info) / kReadBytesPerOtherByte;
  }
  return {received > known ? received - known : 0, waiting, connection.descriptor};
}

// Unfinished frames are due after a while, however many others come before them: a connection that wants to keep some
// has to send as much as they are again and again.
bool Connections::IsOverdue(uint64_t unfinished, absl::Time now, Connection* connection) const {
  const uint64_t come = connection->frames->bytes();
  if (unfinished == 0) {
    connection->due.reset();
  } else if (!connection->due.has_value() || come >= *connection->due) {
    connection->due = come + unfinished;
    connection->due_since = now;
  }
  return connection->due.has_value() && now - connection->due_since > patience_;
}

// Bytes that arrive between two calls of the system are on no account taken for bytes that were read: they are counted
// as read here, and as waiting below.
void Connections::CountBytes() {
  const absl::MutexLock lock(&mutex_);
  for (auto& [descriptor, connection] : connections_) {
    if (connection.peer.empty()) continue;
    const tcp_info info = InfoOf(descriptor);
    connection.read = ReadBytesOf(descriptor);
    connection.written = WrittenBytes(info);
    connection.come = connection.frames->bytes();
  }
}

bool Connections::Suspect(absl::Duration spent, Connection* connection) {
  Suspicion& suspicion = connection->suspicion;
  if (suspicion.spent == absl::ZeroDuration()) suspicion = {absl::ZeroDuration(), connection->read, connection->come};
  suspicion.spent += spent;
  const auto read = static_cast<int64_t>(ReadBytesOf(connection->descriptor) - suspicion.read);
  const auto come = static_cast<int64_t>(connection->frames->bytes() - suspicion.come);
  if (come >= read / kReadBytesPerFrameByte) suspicion = {};
  return suspicion.spent >= kMostSuspected;
}

void Connections::EndFlood(absl::Duration spent) {
  const absl::MutexLock lock(&mutex_);
  Connection* culprit = nullptr;
  int64_t of_culprit = kLeastFloodBytes - 1;
  int64_t written_to_culprit = 0;
  int64_t read_of_all = 0;
  int64_t of_all = 0;
  for (auto& [descriptor, connection] : connections_) {
    if (connection.peer.empty()) continue;
    const tcp_info info = InfoOf(descriptor);
    const auto read = static_cast<int64_t>(info.tcpi_bytes_received - WaitingBytes(descriptor) - connection.read);
    const auto written = static_cast<int64_t>(WrittenBytes(info) - connection.written);
    read_of_all += std::max<int64_t>(read, 0);
    of_all += std::max<int64_t>(read, 0) + std::max<int64_t>(written, 0);
    if (read <= of_culprit) continue;
    culprit = &connection;
    of_culprit = read;
    written_to_culprit = std::max<int64_t>(written, 0);
  }
  if (culprit == nullptr) return;
  if (culprit->workers != 0) {
    // Long vectors on a busy machine look alike: a worker that has joined is not cut off on a first suspicion.
    if (of_culprit < read_of_all / 2 || !Suspect(spent, culprit)) return;
  } else {
    // A flood of PINGs is answered in kind: what it makes gRPC write is not to its credit.
    of_all -= written_to_culprit;
    if (static_cast<double>(of_all) > kFloodBytesPerMs * absl::ToDoubleMilliseconds(spent)) return;
  }
  const absl::Time now = clock_.Now();
  const std::string address = culprit->address;
  ++floods_;
  Shut(*culprit, "it floods the master with small frames", now);
  std::vector<int> others;
  for (const auto& [descriptor, connection] : connections_) {
    if (connection.address == address && connection.workers == 0) others.push_back(descriptor);
  }
  for (const int descriptor : others)
    Shut(connections_.at(descriptor), "another of its address floods the master", now);
}

uint64_t Connections::ReadBytes(int descriptor) const {
  const absl::MutexLock lock(&mutex_);
  return connections_.contains(descriptor) ? ReadBytesOf(descriptor) : 0;
}

void Connections::EndHandover(int descriptor, uint64_t read, absl::Duration spent) {
  const absl::MutexLock lock(&mutex_);
  const auto found = connections_.find(descriptor);
  if (found == connections_.end()) return;
  const uint64_t received = InfoOf(descriptor).tcpi_bytes_received;
  const auto since = static_cast<int64_t>(received - WaitingBytes(descriptor) - read);
  if (since < kLeastFloodBytes) return;
  if (static_cast<double>(since) > kFloodBytesPerMs * absl::ToDoubleMilliseconds(spent)) return;
  ++floods_;
  Shut(found->second, "it floods the master with small frames", clock_.Now());
}

uint64_t Connections::floods() const {
  const absl::MutexLock lock(&mutex_);
  return floods_;
}

bool Connections::flooded() const {
  const absl::MutexLock lock(&mutex_);
  return settled_floods_ != floods_;
}

void Connections::SettleFloods(uint64_t floods) {
  const absl::MutexLock lock(&mutex_);
  settled_floods_ = floods;
}

void Connections::Shut(const Connection& connection, absl::string_view why, absl::Time now) {
  throttle_.Log(LogLevel::kWarning, why, now, absl::StrCat("closed a connection from ", connection.peer, ": ", why));
  // The descriptor is another file if gRPC has closed the socket meanwhile, and stays as it is.
  if (SocketInode(connection.descriptor) == connection.inode) {
    const uint64_t unfinished = UnfinishedOf(connection, now).read;
    if (connection.workers == 0 && unfinished > 0) {
      ended_.push_back({connection.descriptor, connection.inode, unfinished});
    }
    Break(connection.descriptor);
  }
  Forget(connection.descriptor);
}

}  // namespace syncbn::rpc
