// Handing of a master's state to the thread that stores it: when, and how much.

#ifndef SYNCBN_SERVER_RPC_STATE_SAVER_H_
#define SYNCBN_SERVER_RPC_STATE_SAVER_H_

#include <cstddef>
#include <cstdint>

#include "absl/time/time.h"
#include "server/core/coordinator.h"
#include "server/state/writer.h"

namespace syncbn::rpc {

// Hands over what has changed once a layer has had `kMostUnsavedRounds` rounds since it was last handed over, once
// `kLongestDelay` has passed, and at once if a group has ended; as long as the writer is busy, nothing. So the store
// lags by less than the 16 rounds of each layer that workers repeat to a master that does not know them, unless the
// disk is slow; and a training whose rounds are rare writes rarely.
//
// Thread safety: none; it lives on the loop's thread.
class StateSaver {
 public:
  static constexpr uint64_t kMostUnsavedRounds = 8;
  static constexpr absl::Duration kLongestDelay = absl::Seconds(1);
  // Time between two looks at a writer that is busy.
  static constexpr absl::Duration kPause = absl::Milliseconds(10);

  // Without a writer, which is null then, nothing is done. `max_turn_bytes` bounds what is copied at once.
  StateSaver(core::Coordinator* coordinator, state::Writer* writer, size_t max_turn_bytes)
      : coordinator_(coordinator), writer_(writer), max_turn_bytes_(max_turn_bytes) {}

  // After each event.
  void OnTurn(absl::Time now) {
    if (writer_ != nullptr && coordinator_->journal().has_changes()) HandOver(now);
  }
  // Returns when OnTurn is next due, if nothing happens before.
  absl::Time NextTurn() const { return next_turn_; }
  // Hands over everything, before a shutdown ends the groups.
  void Finish();

 private:
  void HandOver(absl::Time now);

  core::Coordinator* const coordinator_;
  state::Writer* const writer_;
  const size_t max_turn_bytes_;
  absl::Time unsaved_since_ = absl::InfiniteFuture();
  absl::Time next_turn_ = absl::InfiniteFuture();
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_STATE_SAVER_H_
