// A bound on the work that is done in a row before the sockets are looked at.

#ifndef SYNCBN_SERVER_RPC_BURST_H_
#define SYNCBN_SERVER_RPC_BURST_H_

#include <cstddef>

#include "absl/time/time.h"

namespace syncbn::rpc {

// Calls that are taken in a row, of each kind. They take a millisecond.
inline constexpr size_t kMostCallsInARow = 32;
// The pause after many calls or long answers, where the queue is never empty.
inline constexpr absl::Duration kLongestPause = absl::Milliseconds(10);

// gRPC reads no socket while its queue has an event. Work that brings more such events (calls that are taken, frames
// that came with them) would go on until all of it is done, however much there is.
//
// A pause follows after `most` of it: until a turn without an event, after which the sockets have been looked at; or,
// where others keep the queue busy, for the time `pause`.
//
// Pure; the caller tells the time. Thread safety: none.
class Burst {
 public:
  Burst(size_t most, absl::Duration pause) : most_(most), pause_(pause) {}

  // Counts work that has been done.
  void Add(size_t amount, absl::Time now) {
    done_ += amount;
    last_ = now;
  }
  // Returns whether it is enough for now.
  bool spent() const { return done_ >= most_; }
  // Ends a turn, `quiet` if the sockets have been looked at and there was no event.
  void EndTurn(bool quiet, absl::Time now) {
    if (quiet || (spent() && now - last_ >= pause_)) done_ = 0;
  }

 private:
  const size_t most_;
  const absl::Duration pause_;
  size_t done_ = 0;
  absl::Time last_ = absl::InfinitePast();
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_BURST_H_
