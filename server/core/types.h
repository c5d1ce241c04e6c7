// The vocabulary of the round engine: what proto/syncbn/v1/statistics.proto says on the wire, as plain values. Where a
// type here has a message's name, that message's comments hold for it.

#ifndef SYNCBN_SERVER_CORE_TYPES_H_
#define SYNCBN_SERVER_CORE_TYPES_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "server/core/secret.h"
#include "vocabulary/enums.h"
#include "vocabulary/layer_spec.h"
#include "vocabulary/round_key.h"

namespace syncbn::core {

using syncbn::BackwardRole;
using syncbn::EpsMode;
using syncbn::GroupConfig;
using syncbn::LayerKind;
using syncbn::LayerSpec;
using syncbn::MissingPolicy;
using syncbn::NumericPolicy;
using syncbn::Phase;
using syncbn::RoundKey;

using Rank = uint32_t;
// One worker's stream, for as long as it is open. The transport numbers streams and never uses a number twice.
using StreamId = uint64_t;

enum class MemberState : uint8_t { kAbsent = 1, kPresent = 2, kLost = 3, kLeft = 4 };

struct GroupId {
  std::string job;
  std::string group;

  friend bool operator==(const GroupId& a, const GroupId& b) { return a.job == b.job && a.group == b.group; }
  friend bool operator<(const GroupId& a, const GroupId& b) {
    return std::tie(a.job, a.group) < std::tie(b.job, b.group);
  }
  template <typename H>
  friend H AbslHashValue(H h, const GroupId& id) {
    return H::combine(std::move(h), id.job, id.group);
  }
};

// A spec that a member has declared. Immutable and shared by all that refer to it.
struct Declaration {
  LayerSpec spec;
};
using DeclarationPtr = std::shared_ptr<const Declaration>;

// The bytes of the longest result that a round of the layer can have.
inline size_t LongestResult(const LayerSpec& spec) {
  return size_t{spec.channels} * sizeof(double) * (spec.kind == LayerKind::kSum ? 1 : 2);
}

struct Join {
  uint32_t min_protocol_version = 0;
  uint32_t max_protocol_version = 0;
  GroupId id;
  Rank rank = 0;
  uint32_t world_size = 0;
  uint64_t incarnation = 0;
  uint64_t run_id = 0;
  uint64_t generation = 0;
  GroupConfig config;
  std::vector<LayerSpec> layers;
  std::string description;
  Secret token;
  Secret life_key;
  std::vector<Rank> left_ranks;  // As the worker has last heard from an earlier master.
  bool without_outcome = false;  // It has not been told the end of any round in its run.
  bool resumes = false;          // It numbers its rounds from Error::resume_at on, once it has been told one.
  // The names of the connection that it came by and of the address of its other end, neither of which may begin too
  // many groups. Empty if that does not matter.
  std::string connection;
  std::string address;
};

// A worker's part of a round. `first` and `second` are, by phase: mean and m2; sum_dy and sum_dy_xmu; the vector, and
// nothing. They point into the caller's memory, which must outlive the call that takes the contribution and no more.
struct Contribution {
  RoundKey key;
  int64_t count = 0;                                     // Forward only.
  BackwardRole backward_role = BackwardRole::kRequired;  // Forward only.
  absl::Span<const double> first;
  absl::Span<const double> second;
  bool repeats = false;  // The sender has had the outcome from an earlier master, and wants none.
};

// The reason for which a call or a round failed. `reason` is one of those that statistics.proto lists, and has static
// storage.
struct Error {
  absl::StatusCode code = absl::StatusCode::kUnknown;
  const char* reason = "";
  std::string message;
  std::vector<Rank> ranks;  // To blame, ascending; may be empty. Of many, the first kMostNamedRanks.
  uint32_t rank_count = 0;  // The number to blame.
  const char* limit = "";   // The name of the limit that was exceeded; static storage.
  // The sequence at which its contributors begin their next rounds, whatever the layer and phase.
  std::optional<uint64_t> resume_at{};
};

// The outcome of a round. Immutable and shared: the same object goes to every member, and serves replays.
struct RoundOutcome {
  RoundKey key;
  std::optional<Error> error;  // If set, what follows is empty.
  int64_t count = 0;           // Forward, and backward (of its forward round).
  std::vector<double> first;   // mean; sum_dy; vector.
  std::vector<double> second;  // var (biased); sum_dy_xmu; empty.
  bool backward_required = false;
  std::vector<Rank> missing_ranks;
  std::vector<Rank> abstaining_ranks;  // Forward: contributors whose role was NONE.
  uint64_t digest = 0;                 // Covers all the above but the key; 0 if there is an error.
  bool refused = false;                // The error is told to one sender, and is not the outcome of the round.
};

// A member's report of a round that ended under an earlier master, so that it can end again in the same way.
struct EndedReport {
  RoundKey key;
  std::optional<Error> error;  // If set, what follows is empty.
  std::vector<Rank> missing_ranks;
  uint64_t digest = 0;
  int64_t count = 0;               // Forward,
  bool backward_required = false;  // and these too.
  std::vector<Rank> abstaining_ranks;
};

struct Membership {
  uint32_t world_size = 0;
  std::vector<Rank> present_ranks;
  std::vector<Rank> left_ranks;
  uint64_t version = 0;  // Counts those that the group has announced.
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_TYPES_H_
