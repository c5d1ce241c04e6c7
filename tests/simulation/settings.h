// The settings of a schedule, and counters over many schedules.

#ifndef SYNCBN_TESTS_SIMULATION_SETTINGS_H_
#define SYNCBN_TESTS_SIMULATION_SETTINGS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "server/core/coordinator.h"

namespace syncbn::simulation {

// Elements of a long vector in one contribution.
inline constexpr size_t kChunkElements = 5;

struct Settings {
  uint32_t world_size = 2;
  core::GroupConfig config;  // Complete.
  std::vector<core::LayerSpec> layers;
  // Joins bring all layers, and there are no others.
  bool complete_set = true;
  // From this sequence on, every worker declares all layers anew, as `later`, if there is one.
  std::optional<uint64_t> redeclared_at;
  std::vector<core::LayerSpec> later;
  // The elements of the vector "v", which goes in chunks: the layers v#0, v#1 and so on. 0: there is none.
  size_t long_vector = 0;

  absl::Duration join_timeout = absl::Seconds(1);
  std::vector<std::string> targets;  // Tried in turn. The master is at kMaster, and nobody elsewhere.
  size_t contribution_bytes = 100;   // As the session is told.
  // Masters die, or workers do as well, and nothing else goes wrong: every round completes, with the same bits for all.
  bool only_deaths = false;
  // Workers die in such a schedule. Their successors repeat the last steps, with the same numbers.
  bool workers_die = false;
  // Masters die in it too. Then workers die one after the other: what two of them have taken along may be lost.
  bool masters_die = true;

  // A rank whose worker does not go on at the number that an error names, if there is one.
  std::optional<core::Rank> old_rank;
  // Programs raise within their first steps, and nothing else goes wrong: their last steps succeed.
  bool only_raises = false;

  // The rank's worker goes on at the number that an error names. Nobody does where the number of a round tells how its
  // layer is declared: programs declare them anew at a step, whatever its number.
  bool Resumes(core::Rank rank) const { return rank != old_rank && !redeclared_at.has_value(); }
  const std::vector<core::LayerSpec>& LayersAt(uint64_t sequence) const {
    return redeclared_at.has_value() && sequence >= *redeclared_at ? later : layers;
  }
  const core::LayerSpec& LayerOf(const core::RoundKey& key) const {
    for (const core::LayerSpec& spec : LayersAt(key.sequence)) {
      if (spec.name == key.layer) return spec;
    }
    return layers.front();
  }
};

inline constexpr char kMaster[] = "master:1";

// The engine's, but for a wait after which rounds are late that is within the schedules' deadlines, and turns that the
// rounds of a group do not fit into.
inline const core::Limits& SimulatedLimits() {
  static const core::Limits limits = [] {
    core::Limits simulated;
    simulated.late_round_after = absl::Milliseconds(25);
    simulated.max_turn_bytes = 6'000;  // Two or three rounds.
    return simulated;
  }();
  return limits;
}

// Counts how often schedules have reached what is checked. A simulation that no longer reaches one of these proves
// nothing about it.
struct Tally {
  // Masters.
  uint64_t completed = 0;
  uint64_t partial = 0;  // Completed without all that were expected.
  uint64_t replayed = 0;
  uint64_t redeclared = 0;  // Completed, and the layer had been declared anew.
  uint64_t fenced = 0;
  uint64_t late = 0;                       // Rounds that were told to be.
  uint64_t taken = 0;                      // Joins that were refused because another had the seat.
  uint64_t restored = 0;                   // Rounds that were merged again for those who waited for them.
  uint64_t adopted = 0;                    // Runs that a new group took from a worker that came back.
  uint64_t outlived = 0;                   // Rounds that a rank had left before, under another master.
  uint64_t diverged = 0;                   // Workers that knew another outcome than their group.
  uint64_t left_again = 0;                 // Streams that ended behind the join of a rank that had left.
  uint64_t resumed = 0;                    // Rounds that have failed and told where to go on,
  uint64_t untold = 0;                     // or for missing ranks, where nobody had to be told.
  uint64_t succeeded = 0;                  // Workers that died where only deaths happen, and were told where all stand.
  std::map<std::string, uint64_t> failed;  // By reason.
  std::map<std::string, uint64_t> refused;  // To the sender alone.
  // Sessions.
  uint64_t rejoins = 0;
  uint64_t resent = 0;                    // Contributions that an earlier stream had taken already,
  uint64_t repeated = 0;                  // and those of them that had been answered by another master.
  uint64_t forgotten = 0;                 // Answered contributions that were not held any more.
  uint64_t unanswered = 0;                // Rounds that ended with their session.
  uint64_t chunks = 0;                    // Chunks of long vectors that were sent,
  uint64_t held_back = 0;                 // and checks that found one waiting for others.
  uint64_t blocked = 0;                   // The master was told so,
  uint64_t retracted = 0;                 // or the opposite.
  uint64_t raised = 0;                    // Programs have left the rest of a step out.
  uint64_t not_found = 0;                 // Nobody knew where the master is.
  uint64_t silent = 0;                    // Masters that were given up.
  std::map<std::string, uint64_t> ended;  // By reason.

  void Add(const Tally& other) {
    completed += other.completed;
    partial += other.partial;
    replayed += other.replayed;
    redeclared += other.redeclared;
    fenced += other.fenced;
    late += other.late;
    taken += other.taken;
    restored += other.restored;
    adopted += other.adopted;
    outlived += other.outlived;
    diverged += other.diverged;
    left_again += other.left_again;
    resumed += other.resumed;
    untold += other.untold;
    succeeded += other.succeeded;
    for (const auto& [reason, times] : other.failed) failed[reason] += times;
    for (const auto& [reason, times] : other.refused) refused[reason] += times;
    rejoins += other.rejoins;
    resent += other.resent;
    repeated += other.repeated;
    forgotten += other.forgotten;
    unanswered += other.unanswered;
    chunks += other.chunks;
    held_back += other.held_back;
    blocked += other.blocked;
    retracted += other.retracted;
    raised += other.raised;
    not_found += other.not_found;
    silent += other.silent;
    for (const auto& [reason, times] : other.ended) ended[reason] += times;
  }
};

}  // namespace syncbn::simulation

#endif  // SYNCBN_TESTS_SIMULATION_SETTINGS_H_
