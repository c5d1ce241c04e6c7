// A layer's running mean and variance as the master keeps them, for inspection and for workers that begin again.

#ifndef SYNCBN_SERVER_CORE_RUNNING_STATISTICS_H_
#define SYNCBN_SERVER_CORE_RUNNING_STATISTICS_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/container/btree_set.h"
#include "server/core/state.h"
#include "server/core/types.h"
#include "server/core/views.h"

namespace syncbn::core {

// From mean 0 and variance 1, one update for each forward round that completed with count > 0:
// running <- (1 - momentum) * running + momentum * observed. Without momentum: the average of all updates.
//
// A round updates them once, however often it completes. After Resume, workers may give rounds again that an earlier
// master has counted; the sequences of the newest such rounds are remembered.
//
// Thread safety: none; pure.
class RunningStatistics {
 public:
  // Takes a forward round that has just completed. Returns false, having ignored it, if the layer has had another
  // number of channels since.
  bool Observe(const DeclarationPtr& declaration, const RoundOutcome& forward);

  // A forward round ended under an earlier master. Unless it is counted, it is missing until it is observed, which it
  // is once its contributors have repeated what they had sent.
  void Expect(uint64_t sequence);

  // The statistics of a layer with this spec: those of before the first update where they are of another size.
  RunningStatisticsView View(const LayerSpec& spec) const;
  // Returns the newest sequence that was observed; nothing before the first.
  std::optional<uint64_t> newest_sequence() const;

  // Returns what is to be stored; nothing before the first update.
  std::optional<LayerState> State() const;
  // Goes on after an earlier master, with what it has stored in place of these statistics.
  void Resume(const LayerState& state);
  // Goes on after an earlier master that has stored nothing. Nothing may have been observed.
  void ResumeFromNothing();

 private:
  bool Includes(uint64_t sequence) const;
  void Include(uint64_t sequence);
  // Returns missing_, widened by what is expected.
  std::optional<MissingRounds> Missing() const;
  // The variance that goes in is M2/(N-1), or M2/N if the layer says so; at count 1 the former has no value and the
  // running variance stays.
  void Update(const LayerSpec& spec, const RoundOutcome& forward);

  std::vector<double> mean_;
  std::vector<double> var_;
  uint64_t updates_ = 0;
  DeclarationPtr declaration_;  // The newest update's; null before the first.

  uint64_t newest_ = 0;           // The greatest sequence ever observed.
  std::vector<uint64_t> recent_;  // A ring of the newest kRecentRounds sequences; the oldest is at `oldest_`.
  size_t oldest_ = 0;
  std::optional<MissingRounds> missing_;
  absl::btree_set<uint64_t> expected_;  // Sequences, until they are observed.
  // No round can be missing before the next one: the statistics began with this master, or a round that was counted
  // under an earlier one has completed again, and workers give again all that came after it.
  bool connected_ = true;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_RUNNING_STATISTICS_H_
