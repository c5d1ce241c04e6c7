// The floor: the same numbers over blocking sockets, with nothing around them.
//
// A worker sends its rank (uint32) once, then messages: channels and layers (uint32 each), then for each layer count,
// mean and M2 as doubles, 1 + 2 * channels of them. The answer is count, mean and variance, likewise, without a header.

#ifndef SYNCBN_TESTS_BENCHMARKS_ROUND_RAW_STAR_H_
#define SYNCBN_TESTS_BENCHMARKS_ROUND_RAW_STAR_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "tests/benchmarks/round/exchange.h"

namespace syncbn::benchmarks {

// A blocking stream socket.
class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  ~Socket();
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;

  // TARGET is 127.0.0.1:PORT or unix:PATH.
  static absl::StatusOr<std::unique_ptr<Socket>> Connect(const std::string& target);
  // The same; port 0 takes a free one. `target` becomes what Connect wants.
  static absl::StatusOr<std::unique_ptr<Socket>> Listen(std::string* target, int backlog);
  absl::StatusOr<std::unique_ptr<Socket>> Accept() const;

  absl::Status Send(const void* data, size_t bytes) const;
  // Exactly `bytes`, in as few calls as the kernel allows. OUT_OF_RANGE where the peer has closed before the first.
  absl::Status Receive(void* data, size_t bytes) const;
  // At most `bytes`; 0 where the peer has closed.
  absl::StatusOr<size_t> ReceiveSome(void* data, size_t bytes) const;

 private:
  const int fd_;
};

struct RawHeader {
  uint32_t channels = 0;
  uint32_t layers = 0;
  size_t doubles() const { return size_t{layers} * (1 + 2 * size_t{channels}); }
};

class RawExchange final : public Exchange {
 public:
  static absl::StatusOr<std::unique_ptr<RawExchange>> Connect(const std::string& target, uint32_t rank);

  absl::Status Prepare(uint32_t channels, uint32_t layers) override;
  absl::Status Run(uint32_t first, absl::Span<const Contribution* const> contributions,
                   std::vector<MergedView>* results) override;

 private:
  explicit RawExchange(std::unique_ptr<Socket> socket) : socket_(std::move(socket)) {}

  std::unique_ptr<Socket> socket_;
  uint32_t channels_ = 0;
  std::vector<char> message_;
  std::vector<double> answer_;
};

// Accepts `world_size` workers and merges their messages in rank order, on the calling thread, until one of them
// closes.
absl::Status ServeRawStar(const Socket& listener, uint32_t world_size);

}  // namespace syncbn::benchmarks

#endif  // SYNCBN_TESTS_BENCHMARKS_ROUND_RAW_STAR_H_
