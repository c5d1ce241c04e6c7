// The log of a master's groups, in words.

#ifndef SYNCBN_SERVER_LOG_NARRATOR_H_
#define SYNCBN_SERVER_LOG_NARRATOR_H_

#include <cstddef>
#include <functional>
#include <string>
#include <utility>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/core/effects.h"
#include "server/core/types.h"
#include "server/log/throttle.h"

namespace syncbn {

// Writes one line for each event that an operator wants to know of, at a bounded rate for each reason, and none for
// rounds that complete in time. `now` must not go backwards.
//
// Thread safety: none.
class Narrator {
 public:
  // `peer_of` returns where a stream's worker is, such as its address, or "" if the stream has gone.
  explicit Narrator(std::function<std::string(core::StreamId)> peer_of) : peer_of_(std::move(peer_of)) {}

  // A worker has joined, come back, been lost, or left.
  void On(const core::MemberChanged& change, absl::Time now);
  void On(const core::JoinRefused& refused, absl::Time now);
  // A round that failed; others are passed over.
  void On(const core::RoundEnded& ended, absl::Time now);
  // Rounds that have waited for long, and the ranks that they wait for.
  void On(const core::SendLateRounds& late, absl::Time now);
  // A stream is closed with an error: a malformed frame, say. Passes over streams whose join was refused.
  void OnStreamClosed(core::StreamId stream, const core::Error& error, absl::Time now);
  // A stream is broken off since its worker does not read.
  void OnReaderCutOff(core::StreamId stream, size_t unread_bytes, absl::Time now);

 private:
  std::string PeerOf(core::StreamId stream) const;

  const std::function<std::string(core::StreamId)> peer_of_;
  core::StreamId refused_ = 0;  // The newest stream whose join was refused.
  Throttle throttle_;
};

}  // namespace syncbn

#endif  // SYNCBN_SERVER_LOG_NARRATOR_H_
