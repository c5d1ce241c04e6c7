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

// This worker's part of one round: the key, and the session's notes on what became of it.
//
// The numbers are the driver's. It derives a type that holds them as its transport sends them (bytes of the wire, or
// plain vectors in a simulation), makes each contribution within Session::Begin, and finds it again in the frames to
// write and in Complete. The session keeps a contribution until its round has ended, and may send it several times.
class Contribution {
 public:
  // `bytes`: what it takes in a frame.
  Contribution(RoundKey key, size_t bytes) : key_(std::move(key)), bytes_(bytes) {}
  Contribution(const Contribution&) = delete;
  Contribution& operator=(const Contribution&) = delete;

  const RoundKey& key() const { return key_; }
  size_t bytes() const { return bytes_; }

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
  bool sent_ = false;
  bool ended_ = false;
  absl::Time first_sent_at_, sent_at_;
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
};

// Its parts count in this order.
struct ClientFrame {
  std::optional<Join> join;  // In the first frame of a stream, and only there.
  std::vector<std::shared_ptr<const LayerOptions>> layers;
  std::vector<ContributionPtr> contributions;
  ContributionPtr blocked_on;  // Null: not blocked. A frame without any part takes an earlier `blocked_on` back.
  std::optional<std::string> leave;
};

// ---- From the master ------------------------------------------------------------------------------------------------

struct Joined {
  uint64_t incarnation = 0;
  uint64_t run_id = 0;
  absl::Duration round_timeout;
  size_t present_ranks = 0;
};

struct Outcome {
  RoundKey key;
  absl::Status status;              // Not OK: why the round failed, with its details (client/cc/errors.h).
  Phase payload = Phase::kForward;  // If OK, the kind of result that the master sent.
  RoundResult result;
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
  std::optional<size_t> present_ranks;  // The membership has changed.
  std::vector<Outcome> outcomes;
  std::vector<LateRound> late_rounds;
};

}  // namespace syncbn::session

#endif  // SYNCBN_CLIENT_CC_SESSION_FRAME_H_
