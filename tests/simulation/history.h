// The rounds of a run that have ended, under this master or an earlier one, as a model of the master remembers them.

#ifndef SYNCBN_TESTS_SIMULATION_HISTORY_H_
#define SYNCBN_TESTS_SIMULATION_HISTORY_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "server/core/coordinator.h"
#include "tests/simulation/numbers.h"

namespace syncbn::simulation {

// A round that ended under this master.
struct EndedRound {
  std::shared_ptr<const core::RoundOutcome> outcome;
  HeldParts parts;
};

// A round that ended under an earlier master, and of which this one does not know the outcome.
struct RestoredRound {
  core::EndedReport report;
  std::vector<core::Rank> roster;
};

// The facts of a forward round that its backward round depends on.
struct ForwardRound {
  std::vector<core::Rank> contributors;  // Those with a part in the backward round.
  int64_t count = 0;
  bool backward_required = false;
};

class History {
 public:
  explicit History(uint32_t world_size) : world_size_(world_size) {}

  // Returns null if the round is not one of these.
  EndedRound* FindEnded(const core::RoundKey& key);
  const EndedRound* FindEnded(const core::RoundKey& key) const;
  const RestoredRound* FindRestored(const core::RoundKey& key) const;
  // Returns the forward round of the key's layer and sequence, if it has completed.
  std::optional<ForwardRound> FindForward(const core::RoundKey& key) const;
  // Returns the ranks whose contributions the reported round has; none if that cannot be known.
  std::vector<core::Rank> RosterOf(const core::EndedReport& report) const;
  // Returns the completed round of the greatest sequence for each layer and phase.
  std::vector<core::RoundKey> NewestRounds() const;

  void End(const core::RoundKey& key, EndedRound round);
  // Notes a round that the rank knows to have ended.
  void Restore(core::Rank rank, const core::EndedReport& report, std::vector<core::Rank> roster);
  // The rank waits for the round, or knows of it.
  void NoteHolder(core::Rank rank, const core::RoundKey& key);
  // The rank has forgotten the round, and those of its layer and phase before it.
  void NoteForgotten(core::Rank rank, const core::RoundKey& key);
  // Returns whether the rank may have forgotten that the round had ended, and its own part with it.
  bool MayHaveForgotten(core::Rank rank, const core::RoundKey& key) const;
  // Returns whether any rank may have.
  bool MayBeForgotten(const core::RoundKey& key) const;

 private:
  uint32_t world_size_;
  std::map<core::RoundKey, EndedRound> ended_;
  std::map<core::RoundKey, RestoredRound> restored_;
  // The greatest sequences that ranks have forgotten, by layer and phase.
  std::map<std::pair<std::string, core::Phase>, std::map<core::Rank, uint64_t>> forgotten_;
  // Forward rounds that were reported: the ranks that know of them, or wait for them. The ends of backward rounds are
  // forgotten no sooner.
  std::map<core::RoundKey, std::set<core::Rank>> holders_;
};

}  // namespace syncbn::simulation

#endif  // SYNCBN_TESTS_SIMULATION_HISTORY_H_
