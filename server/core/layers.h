// The layers of a group, and the agreement of its members on which layers there are.

#ifndef SYNCBN_SERVER_CORE_LAYERS_H_
#define SYNCBN_SERVER_CORE_LAYERS_H_

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/btree_set.h"
#include "absl/strings/string_view.h"
#include "server/core/layer.h"
#include "server/core/limits.h"
#include "server/core/outcome_budget.h"
#include "server/core/state.h"
#include "server/core/types.h"
#include "server/core/views.h"

namespace syncbn::core {

// Layers are added by their first declaration and stay until the group ends. The first join that declares layers fixes
// the complete set: later joins that declare layers must declare the same ones. Frames may still add layers.
//
// Thread safety: none; pure.
class Layers {
 public:
  // `limits` must outlive this object.
  Layers(const Limits& limits, MissingPolicy policy);
  Layers(const Layers&) = delete;
  Layers& operator=(const Layers&) = delete;

  size_t size() const { return layers_.size(); }
  // Returns null if no member has declared a layer of that name.
  Layer* Find(absl::string_view name);
  const Layer* Find(absl::string_view name) const;
  // Returns a layer that a member has declared.
  Layer& Get(absl::string_view name);
  const Layer& Get(absl::string_view name) const;
  // The size in bytes of the longest result that a round of the layers declared so far can have.
  size_t longest_result() const { return longest_result_; }
  std::vector<LayerSummary> Summaries() const;
  // Returns the completed round of the greatest sequence for each layer and phase, by layer, as many as
  // max_newest_rounds_bytes hold.
  std::vector<RoundKey> NewestRounds() const;
  // The bytes of ended rounds that are kept for replays,
  size_t retained_bytes() const { return budget_.bytes(); }
  // and the bytes of outcomes that are kept at most.
  size_t max_retained_bytes() const { return budget_.max_bytes(); }
  // Returns whether outcomes were last forgotten because all groups together keep too much.
  bool forgot_for_others() const { return budget_.forgot_for_others(); }

  // As OutcomeBudget::ForgetOldest.
  size_t ForgetOldestOutcomes(size_t bytes) { return budget_.ForgetOldest(bytes); }

  // Returns why these layers cannot be declared (MALFORMED_FRAME, LIMIT_EXCEEDED); nothing if they can.
  std::optional<Error> CheckSpecs(const std::vector<LayerSpec>& specs) const;
  // Returns how the layers of the join differ from the complete set of the group (LAYER_SET_MISMATCH); nothing if they
  // are the same, or if the join declares none.
  std::optional<Error> CheckSet(const Join& join) const;
  // Makes the layers of the join the complete set, unless it is known.
  void FixSet(const Join& join);

  // Adds the layer if it is new, and declares it for the rank; `returning` as in declarations.h.
  Layer& Declare(Rank rank, const LayerSpec& spec, bool returning);
  // Goes on after an earlier master, with what it has stored. Rounds may have completed under it that nobody has
  // stored, of these layers and of those that are added later.
  void Resume(const std::vector<LayerState>& stored);
  // Drops every declaration of the rank.
  void Forget(Rank rank);

  // Aborts unless layers and the memory of their ended rounds agree.
  void CheckInvariants() const;

 private:
  friend struct InvariantsPeer;

  Layer& FindOrAdd(const LayerSpec& spec);

  const Limits& limits_;
  OutcomeBudget budget_;  // Layers refer to it.
  absl::btree_map<std::string, std::unique_ptr<Layer>> layers_;
  std::optional<Rank> set_declared_by_;
  absl::btree_set<std::string> set_;
  size_t longest_result_ = 0;
  bool resumed_ = false;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_LAYERS_H_
