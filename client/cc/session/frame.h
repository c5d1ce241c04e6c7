// The frames of a worker's stream as plain values. What a message of proto/syncbn/v1/statistics.proto says is said here
// by the struct of the same purpose; a codec below the session turns one into the other.

#ifndef SYNCBN_CLIENT_CC_SESSION_FRAME_H_
#define SYNCBN_CLIENT_CC_SESSION_FRAME_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/cc/session/types.h"

namespace syncbn::session {

struct DeclaredLayer;
struct KnownLayer;
class Session;

// Describes a round that has ended, so that another master can end it again in the same way.
struct EndedRound {
  absl::Status error;  // OK if it completed; otherwise the rest is empty.
  std::vector<uint32_t> missing_ranks;
  uint64_t digest = 0;
  int64_t count = 0;               // A forward round's,
  bool backward_required = false;  // as these.
  std::vector<uint32_t> abstaining_ranks;
};

// This worker's part of one round: the key, and the session's notes on what became of it.
//
// The numbers are the driver's. It derives a type that holds them as its transport sends them (bytes of the wire, or
// plain vectors in a simulation), makes each contribution within Session::Begin, and finds it again in the frames to
// write and in Complete. The session keeps a contribution until its round has ended and for some while longer, and may
// send it several times.
class Contribution {
 public:
  // `bytes`: what it takes in a frame.
  Contribution(RoundKey key, size_t bytes) : key_(std::move(key)), bytes_(bytes) {}
  Contribution(const Contribution&) = delete;
  Contribution& operator=(const Contribution&) = delete;

  const RoundKey& key() const { return key_; }
  size_t bytes() const { return bytes_; }
  // Identifies the layer; null before the round has begun.
  const KnownLayer* layer() const { return layer_; }
  // In a frame: what is known of the round's end. Null for a contribution that asks for an outcome. One to a round that
  // has failed tells of the failure, and its numbers are not sent.
  const EndedRound* repeats() const { return repeated_ ? &end_ : nullptr; }

 private:
  friend class Session;
  friend class Declarations;

  const RoundKey key_;
  const size_t bytes_;
  uint64_t order_ = 0;   // Among all that this worker has declared and begun.
  size_t length_ = 0;    // The length of the result's vectors; 0 if only the master knows it.
  bool finite_ = false;  // The layer's policy refuses NaN and infinity.
  // The newest declaration of the layer that the master must have when this arrives. Null for a backward round, which
  // belongs to its forward round.
  std::shared_ptr<const DeclaredLayer> declared_;
  KnownLayer* layer_ = nullptr;
  // The ranks that have not been told its round's end, because they had left before. Ascending.
  std::shared_ptr<const std::vector<uint32_t>> left_ranks_;
  // The same when the present stream began, of a contribution that was sent before; null of others.
  std::shared_ptr<const std::vector<uint32_t>> left_earlier_;
  bool sent_ = false;
  bool ended_ = false;
  absl::Time first_sent_at_, sent_at_;
  // Once the round has ended with an outcome that all of its contributors have been told:
  EndedRound end_;
  uint64_t answered_by_ = 0;  // The memory of the master that told it.
  bool repeated_ = false;     // It was last sent to tell another master of it.
  bool resent_ = false;       // It is among what a worker has to send before it has caught up.
  // For a chunk of a long vector: how many chunks of that vector were sent and have no answer, and whether this one is
  // among them. Null for others.
  std::shared_ptr<size_t> siblings_under_way_;
  bool under_way_ = false;
};
using ContributionPtr = std::shared_ptr<const Contribution>;

// ---- To the master --------------------------------------------------------------------------------------------------

// The part of a join that tells the state of the session. The rest (job, group, rank, configuration, description) never
// changes in a worker's life and is known to whoever encodes the frame.
struct Join {
  uint64_t incarnation = 0;
  uint64_t run_id = 0;
  std::vector<std::shared_ptr<const LayerOptions>> layers;
  std::vector<uint32_t> left_ranks;
  bool without_outcome = false;  // No round of the run has ended for this worker.
};

// Its parts count in this order.
struct ClientFrame {
  std::optional<Join> join;  // In the first frame of a stream, and only there.
  std::vector<std::shared_ptr<const LayerOptions>> layers;
  std::vector<ContributionPtr> contributions;
  // Up to caught_up: the ranks that had left before the rounds ended of those contributions that ask for an outcome.
  // Ascending.
  std::vector<uint32_t> left_ranks;
  bool caught_up = false;           // All that earlier masters had from this worker, and it still holds, is sent.
  std::vector<RoundKey> forgotten;  // With caught_up: see RoundLog::Forgotten.
  ContributionPtr blocked_on;       // Null: not blocked. A frame without any part takes an earlier `blocked_on` back.
  std::optional<std::string> leave;
  uint64_t membership_read = 0;  // The version of the newest membership; 0 if the master knows.
};

// ---- From the master ------------------------------------------------------------------------------------------------

struct Membership {
  size_t present_ranks = 0;
  std::vector<uint32_t> left_ranks;
  uint64_t version = 0;  // Counts those that the group has announced; 0 if the master does not.
};

struct Joined {
  uint64_t incarnation = 0;
  uint64_t run_id = 0;
  absl::Duration round_timeout;
  Membership membership;
  uint64_t memory = 0;                  // Names the memory in which the master keeps the group; 0 if it has no name.
  std::vector<RoundKey> newest_rounds;  // For a worker that is new: where its group stands.
};

struct Outcome {
  RoundKey key;
  absl::Status status;              // Not OK: why the round failed, with its details (client/cc/errors.h).
  Phase payload = Phase::kForward;  // If OK, the kind of result that the master sent.
  RoundResult result;
  std::vector<uint32_t> abstaining_ranks;
  uint64_t digest = 0;
  bool refused = false;  // The error concerns this worker's contribution, and is not the outcome of the round.
};

// A round that has waited for long, and goes on.
struct LateRound {
  RoundKey key;
  absl::Duration age;
  std::vector<uint32_t> missing_ranks;  // The first of the ranks that it waits for,
  uint32_t missing = 0;                 // and how many there are.
};

struct ServerFrame {
  std::optional<Joined> joined;
  std::optional<Membership> membership;  // It has changed.
  std::vector<Outcome> outcomes;
  std::vector<LateRound> late_rounds;
};

}  // namespace syncbn::session

#endif  // SYNCBN_CLIENT_CC_SESSION_FRAME_H_
