// The worker of one rank as its group knows it, and the table of a group's ranks.

#ifndef SYNCBN_SERVER_CORE_MEMBER_H_
#define SYNCBN_SERVER_CORE_MEMBER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "plumbing/check.h"
#include "server/core/duration_histogram.h"
#include "server/core/types.h"

namespace syncbn::core {

// A member's contributions since its rank was first taken.
struct Activity {
  DeclarationPtr layer;  // The newest contribution's; the next three describe it too.
  uint64_t sequence = 0;
  Phase phase = Phase::kForward;
  absl::Time at;
  DurationHistogram lateness;  // Behind the first contribution to each completed round.

  RoundKey key() const { return {layer->spec.name, sequence, phase}; }
};

struct Member {
  MemberState state = MemberState::kAbsent;
  StreamId stream = 0;       // While present.
  uint64_t incarnation = 0;  // The newest; 0 before the first that was here.
  Secret life_key;           // This incarnation's.
  std::string description;
  uint64_t contributions = 0;
  uint64_t last_arrivals = 0;  // Completed rounds to which it was the last to contribute.
  absl::Time joined_at;
  bool has_contributed = false;  // In this incarnation.
  // Came back from an earlier master, and has not sent yet all that it had sent to that one.
  bool catching_up = false;
  bool left_before = false;  // Has left under an earlier master, which may have had contributions of it.
  // While present: its rank had left when it joined, and nothing has come since. Perhaps there is nobody: a process may
  // have died while its join was on the way.
  bool had_left = false;
  bool had_left_before = false;  // With that: `left_before`, as it was.
  bool unheard = false;          // While left: was to catch up when it left again, so that it is when it comes back.
  // While present: came back, and has not said yet that it has sent again what it had no outcome of.
  bool returning = false;
  bool confirms = false;               // Has said, in this incarnation, which membership it has read.
  uint64_t read_membership = 0;        // While present: the version of the newest that it has read.
  absl::Time grace_until;              // While lost: when it is given up.
  bool given_up = false;               // While lost.
  bool lags = false;                   // While present: has not read what it was sent.
  bool resumes = false;                // Goes on at Error::resume_at.
  std::vector<RoundKey> blocked_on;    // While present: sends nothing until one of these rounds ends. Ascending.
  std::unique_ptr<Activity> activity;  // Null before the first contribution.
  uint64_t beyond_used = 0;            // Greater than all sequences that the rank has ever contributed to.
  uint32_t awaited = 0;                // Rounds in flight, restored ones aside, that the rank has contributed to.
};

// The members by rank. It takes memory for those of whom something is known: anyone can say that a group has thousands
// of workers.
//
// Thread safety: none; pure.
class MemberTable {
 public:
  explicit MemberTable(uint32_t world_size) : world_size_(world_size), blocks_((world_size + kBlock - 1) / kBlock) {}

  uint32_t world_size() const { return world_size_; }
  // Returns an absent member if nothing is known of the rank.
  const Member& operator[](Rank rank) const {
    SYNCBN_CHECK(rank < world_size_, "rank ", rank, " of ", world_size_);
    const std::unique_ptr<Block>& block = blocks_[rank / kBlock];
    return block == nullptr ? *nobody_ : (*block)[rank % kBlock];
  }
  // Returns the member, to be changed.
  Member& At(Rank rank) {
    SYNCBN_CHECK(rank < world_size_, "rank ", rank, " of ", world_size_);
    std::unique_ptr<Block>& block = blocks_[rank / kBlock];
    if (block == nullptr) block = std::make_unique<Block>();
    return (*block)[rank % kBlock];
  }

 private:
  static constexpr uint32_t kBlock = 16;
  using Block = std::array<Member, kBlock>;

  static const Member* Nobody() {
    static const auto* const nobody = new Member();
    return nobody;
  }

  const uint32_t world_size_;
  const Member* const nobody_ = Nobody();
  std::vector<std::unique_ptr<Block>> blocks_;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_MEMBER_H_
