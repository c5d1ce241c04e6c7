// Members that have left, and whose leaves are not acknowledged yet.

#ifndef SYNCBN_SERVER_CORE_DEPARTURES_H_
#define SYNCBN_SERVER_CORE_DEPARTURES_H_

#include <algorithm>
#include <deque>
#include <vector>

#include "absl/time/time.h"
#include "server/core/types.h"

namespace syncbn::core {

// A worker that has left keeps what it contributed until its stream ends, and repeats it if the master dies before. So
// the stream is kept open while others may not have read an outcome that this worker was told.
//
// Thread safety: none; pure.
class Departures {
 public:
  bool empty() const { return departures_.empty(); }
  size_t size() const { return departures_.size(); }
  bool Contains(StreamId stream) const {
    return std::any_of(departures_.begin(), departures_.end(),
                       [stream](const Departure& d) { return d.stream == stream; });
  }
  // The member of this stream leaves, and is kept until `until` at the longest, which is no earlier than those before.
  void Add(StreamId stream, absl::Time until) { departures_.push_back({stream, until}); }
  // The stream has broken.
  void Remove(StreamId stream) {
    const auto is_its = [stream](const Departure& departure) { return departure.stream == stream; };
    departures_.erase(std::remove_if(departures_.begin(), departures_.end(), is_its), departures_.end());
  }
  // Removes those that are due by `now`, and returns their streams.
  std::vector<StreamId> TakeDue(absl::Time now) {
    std::vector<StreamId> streams;
    for (; !departures_.empty() && departures_.front().until <= now; departures_.pop_front()) {
      streams.push_back(departures_.front().stream);
    }
    return streams;
  }
  std::vector<StreamId> TakeAll() { return TakeDue(absl::InfiniteFuture()); }
  absl::Time NextDeadline() const { return departures_.empty() ? absl::InfiniteFuture() : departures_.front().until; }

 private:
  struct Departure {
    StreamId stream = 0;
    absl::Time until;
  };
  std::deque<Departure> departures_;  // Oldest first.
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_DEPARTURES_H_
