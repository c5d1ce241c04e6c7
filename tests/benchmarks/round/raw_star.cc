#include "tests/benchmarks/round/raw_star.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/moments.h"

namespace syncbn::benchmarks {
namespace {

absl::Status SystemError(const char* what) {
  const int error = errno;
  return absl::UnavailableError(absl::StrCat(what, ": ", std::strerror(error)));
}

struct Address {
  union {
    sockaddr any;
    sockaddr_in inet;
    sockaddr_un local;
  };
  socklen_t size = 0;
};

absl::StatusOr<Address> ParseTarget(absl::string_view target) {
  Address address;
  std::memset(&address.local, 0, sizeof(address.local));
  if (absl::ConsumePrefix(&target, "unix:")) {
    if (target.size() >= sizeof(address.local.sun_path)) return absl::InvalidArgumentError("the path is too long");
    address.local.sun_family = AF_UNIX;
    std::memcpy(address.local.sun_path, target.data(), target.size());
    address.size = sizeof(address.local);
    return address;
  }
  int port = 0;
  if (!absl::ConsumePrefix(&target, "127.0.0.1:") || !absl::SimpleAtoi(target, &port)) {
    return absl::InvalidArgumentError("a target is 127.0.0.1:PORT or unix:PATH");
  }
  address.inet.sin_family = AF_INET;
  address.inet.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.inet.sin_port = htons(static_cast<uint16_t>(port));
  address.size = sizeof(address.inet);
  return address;
}

void DisableNagle(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));  // Fails on a unix socket, which needs none of it.
}

}  // namespace

Socket::~Socket() { close(fd_); }

absl::StatusOr<std::unique_ptr<Socket>> Socket::Connect(const std::string& target) {
  const auto address = ParseTarget(target);
  if (!address.ok()) return address.status();
  auto socket = std::make_unique<Socket>(::socket(address->any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (connect(socket->fd_, &address->any, address->size) != 0) return SystemError("connect");
  DisableNagle(socket->fd_);
  return socket;
}

absl::StatusOr<std::unique_ptr<Socket>> Socket::Listen(std::string* target, int backlog) {
  auto address = ParseTarget(*target);
  if (!address.ok()) return address.status();
  auto socket = std::make_unique<Socket>(::socket(address->any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (bind(socket->fd_, &address->any, address->size) != 0) return SystemError("bind");
  if (listen(socket->fd_, backlog) != 0) return SystemError("listen");
  if (address->any.sa_family == AF_INET) {
    if (getsockname(socket->fd_, &address->any, &address->size) != 0) return SystemError("getsockname");
    *target = absl::StrCat("127.0.0.1:", ntohs(address->inet.sin_port));
  }
  return socket;
}

absl::StatusOr<std::unique_ptr<Socket>> Socket::Accept() const {
  const int fd = accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC);
  if (fd < 0) return SystemError("accept");
  DisableNagle(fd);
  return std::make_unique<Socket>(fd);
}

absl::Status Socket::Send(const void* data, size_t bytes) const {
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t sent = send(fd_, from, bytes, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) return SystemError("send");
    from += sent;
    bytes -= static_cast<size_t>(sent);
  }
  return absl::OkStatus();
}

absl::StatusOr<size_t> Socket::ReceiveSome(void* data, size_t bytes) const {
  while (true) {
    const ssize_t received = recv(fd_, data, bytes, 0);
    if (received >= 0) return static_cast<size_t>(received);
    if (errno != EINTR) return SystemError("recv");
  }
}

absl::Status Socket::Receive(void* data, size_t bytes) const {
  for (size_t have = 0; have < bytes;) {
    const auto received = ReceiveSome(static_cast<char*>(data) + have, bytes - have);
    if (!received.ok()) return received.status();
    if (*received == 0) {
      return have == 0 ? absl::OutOfRangeError("the peer has closed") : absl::DataLossError("the peer closed early");
    }
    have += *received;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<RawExchange>> RawExchange::Connect(const std::string& target, uint32_t rank) {
  auto socket = Socket::Connect(target);
  if (!socket.ok()) return socket.status();
  if (absl::Status status = (*socket)->Send(&rank, sizeof(rank)); !status.ok()) return status;
  return std::unique_ptr<RawExchange>(new RawExchange(*std::move(socket)));
}

absl::Status RawExchange::Prepare(uint32_t channels, uint32_t layers) {
  channels_ = channels;
  const size_t doubles = RawHeader{channels, layers}.doubles();
  message_.resize(sizeof(RawHeader) + doubles * sizeof(double));
  answer_.resize(doubles);
  return absl::OkStatus();
}

absl::Status RawExchange::Run(uint32_t, absl::Span<const Contribution* const> contributions,
                              std::vector<MergedView>* results) {
  const RawHeader header{channels_, static_cast<uint32_t>(contributions.size())};
  char* to = message_.data();
  const auto append = [&to](const void* from, size_t bytes) {
    std::memcpy(to, from, bytes);
    to += bytes;
  };
  append(&header, sizeof(header));
  for (const Contribution* own : contributions) {
    const double count = static_cast<double>(own->count);
    append(&count, sizeof(count));
    append(own->mean.data(), channels_ * sizeof(double));
    append(own->m2.data(), channels_ * sizeof(double));
  }
  if (absl::Status status = socket_->Send(message_.data(), to - message_.data()); !status.ok()) return status;
  if (absl::Status status = socket_->Receive(answer_.data(), header.doubles() * sizeof(double)); !status.ok()) {
    return status;
  }
  results->clear();
  for (const double* layer = answer_.data(); results->size() < header.layers; layer += 1 + 2 * channels_) {
    results->push_back({static_cast<int64_t>(layer[0]), {layer + 1, channels_}, {layer + 1 + channels_, channels_}});
  }
  return absl::OkStatus();
}

namespace {

struct RawWorker {
  std::unique_ptr<Socket> socket;
  std::vector<char> message;  // Grows to the longest.

  const RawHeader& header() const { return *reinterpret_cast<const RawHeader*>(message.data()); }
  const double* values() const { return reinterpret_cast<const double*>(message.data() + sizeof(RawHeader)); }

  // One call where the message is there as a whole and fits.
  absl::Status Receive() {
    auto have = socket->ReceiveSome(message.data(), message.size());
    if (!have.ok()) return have.status();
    if (*have == 0) return absl::OutOfRangeError("the worker has closed");
    if (*have < sizeof(RawHeader)) return absl::DataLossError("a header in pieces");
    const size_t whole = sizeof(RawHeader) + header().doubles() * sizeof(double);
    if (whole > message.size()) message.resize(whole);
    return *have < whole ? socket->Receive(message.data() + *have, whole - *have) : absl::OkStatus();
  }
};

void MergeLayer(const std::vector<RawWorker>& workers, size_t offset, size_t channels, double* out) {
  for (size_t c = 1; c <= channels; ++c) {
    Moments merged;
    for (const RawWorker& worker : workers) {
      const double* const layer = worker.values() + offset;
      merged = Merge(merged, {static_cast<int64_t>(layer[0]), layer[c], layer[c + channels]});
    }
    out[0] = static_cast<double>(merged.count);
    out[c] = merged.mean;
    out[c + channels] = merged.m2 / out[0];
  }
}

absl::Status ServeRound(std::vector<RawWorker>* workers, std::vector<double>* answer) {
  for (RawWorker& worker : *workers) {
    if (absl::Status status = worker.Receive(); !status.ok()) return status;
  }
  const RawHeader header = workers->front().header();
  const size_t stride = 1 + 2 * size_t{header.channels};
  answer->resize(header.doubles());
  for (size_t offset = 0; offset < answer->size(); offset += stride) {
    MergeLayer(*workers, offset, header.channels, answer->data() + offset);
  }
  for (const RawWorker& worker : *workers) {
    if (absl::Status status = worker.socket->Send(answer->data(), answer->size() * sizeof(double)); !status.ok()) {
      return status;
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ServeRawStar(const Socket& listener, uint32_t world_size) {
  std::vector<RawWorker> workers(world_size);
  for (uint32_t i = 0; i < world_size; ++i) {
    auto socket = listener.Accept();
    if (!socket.ok()) return socket.status();
    uint32_t rank = 0;
    if (absl::Status status = (*socket)->Receive(&rank, sizeof(rank)); !status.ok()) return status;
    if (rank >= world_size) return absl::InvalidArgumentError("a rank beyond the world size");
    workers[rank] = {*std::move(socket), std::vector<char>(1 << 16)};
  }
  std::vector<double> answer;
  while (true) {
    const absl::Status status = ServeRound(&workers, &answer);
    if (absl::IsOutOfRange(status)) return absl::OkStatus();
    if (!status.ok()) return status;
  }
}

}  // namespace syncbn::benchmarks
