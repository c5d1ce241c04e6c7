#include "server/core/pending_round.h"

#include <algorithm>
#include <numeric>

#include "plumbing/check.h"

namespace syncbn::core {

bool PendingRound::Expects(Rank rank) const {
  return expected.empty() || std::binary_search(expected.begin(), expected.end(), rank);
}

bool PendingRound::Idle() const {
  return restored && latecomers.empty() &&
         std::all_of(payloads.begin(), payloads.end(), [](const auto& entry) { return entry.second.repeats; });
}

bool PendingRound::AwaitedBy(Rank rank) const {
  const auto payload = payloads.find(rank);
  if (payload != payloads.end()) return !payload->second.repeats;
  return std::find(latecomers.begin(), latecomers.end(), rank) != latecomers.end();
}

std::vector<Rank> PendingRound::MissingRanks(uint32_t world_size) const {
  std::vector<Rank> missing;
  SYNCBN_CHECK(payloads.size() <= needed, payloads.size(), " of ", needed);
  SYNCBN_CHECK(needed == (expected.empty() ? world_size : expected.size()), needed);
  if (payloads.size() == needed) return missing;
  // Contributors are a subset of the expected ranks, and both are ascending: the ranks between them are missing. Such a
  // stretch can have thousands, and rounds by the thousand may lack the same.
  missing.resize(needed - payloads.size());
  auto end = missing.begin();
  if (expected.empty()) {
    Rank next = 0;
    const auto add_until = [&](Rank rank) {
      SYNCBN_CHECK(next <= rank && rank <= world_size, "rank ", rank);
      std::iota(end, end + (rank - next), next);
      end += rank - next;
      next = rank + 1;
    };
    for (const auto& [rank, payload] : payloads) add_until(rank);
    add_until(world_size);
  } else {
    auto next = expected.begin();
    for (const auto& [rank, payload] : payloads) {
      const auto contributor = std::lower_bound(next, expected.end(), rank);
      SYNCBN_CHECK(contributor != expected.end() && *contributor == rank, "rank ", rank);
      end = std::copy(next, contributor, end);
      next = contributor + 1;
    }
    end = std::copy(next, expected.end(), end);
  }
  SYNCBN_CHECK(end == missing.end(), missing.end() - end, " too few missing of ", needed);
  return missing;
}

void PendingRound::CheckInvariants(uint32_t world_size) const {
  SYNCBN_CHECK(restored || payloads.contains(last_rank), "rank ", last_rank);
  SYNCBN_CHECK(restored ? !expected.empty() && (!payloads.empty() || !latecomers.empty()) : latecomers.empty());
  for (const Rank rank : latecomers) SYNCBN_CHECK(rank < world_size && !Expects(rank), "rank ", rank);
  SYNCBN_CHECK(declaration != nullptr);
  SYNCBN_CHECK(begun <= alarm && alarm <= deadline);
  SYNCBN_CHECK(needed == (expected.empty() ? world_size : expected.size()), needed);
  SYNCBN_CHECK(std::is_sorted(expected.begin(), expected.end()));
  size_t sum = 0;
  for (const auto& [rank, payload] : payloads) {
    SYNCBN_CHECK(rank < world_size && Expects(rank), "rank ", rank);
    SYNCBN_CHECK(payload.declaration != nullptr && payload.incarnation != 0, "rank ", rank);
    SYNCBN_CHECK(restored || !payload.repeats, "rank ", rank);
    sum += payload.bytes();
  }
  SYNCBN_CHECK(bytes == sum, bytes, ", not ", sum);
}

}  // namespace syncbn::core
