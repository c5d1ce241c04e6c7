// The declarations of a layer by the members of a group, and whether they agree.

#ifndef SYNCBN_SERVER_CORE_DECLARATIONS_H_
#define SYNCBN_SERVER_CORE_DECLARATIONS_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "server/core/rank_set.h"
#include "server/core/types.h"

namespace syncbn::core {

// Returns where `worker` deviates from `reference` ("channels 32 instead of 64"); empty if they agree. Momentum is not
// compared.
std::string Difference(const LayerSpec& worker, const LayerSpec& reference);

// The declarations of one layer. Each member has one at a time and may replace it; its contributions are made under the
// one that it has when it sends them. Members move from one declaration to the next at their own pace, and only rounds
// hold them together: all contributions to a round are made under the same declaration.
//
// A dispute is different. It begins when a member's first declaration of a layer on which none have agreed yet equals
// neither what another member declares nor an earlier declaration, and it lasts until all declare the same. Once
// members are known to have agreed, a first declaration comes from a rank that has restarted, and may be ahead of the
// others or behind them.
//
// Thread safety: none; pure.
class Declarations {
 public:
  explicit Declarations(const LayerSpec& spec);

  // Declares the layer for the rank. A rank that is `returning` may have declared the layer before, to a master that
  // has lost its memory; it begins no dispute.
  void Declare(Rank rank, const LayerSpec& spec, bool returning);
  // Notes that a round of the layer has completed, under this master or an earlier one. A dispute that began before
  // this was known ends: the members are ahead of each other.
  void NoteAgreement();
  // Drops the rank's declaration, after a leave or a restart.
  void Forget(Rank rank);

  // Returns the rank's declaration; null if it has made none.
  DeclarationPtr Of(Rank rank) const;
  // Returns true if no member has another declaration than this.
  bool AllDeclare(const DeclarationPtr& declaration) const {
    return sides_.empty() || (sides_.size() == 1 && sides_.front().declaration == declaration);
  }
  // The declaration that all members last agreed on.
  const DeclarationPtr& current() const { return current_; }
  // Returns true if a member declares this, or replaced this declaration not long ago.
  bool Known(const LayerSpec& spec) const;
  const RankSet& ranks() const { return ranks_; }
  // Returns the dispute, if there is one: LAYER_SPEC_MISMATCH, naming the deviating ranks and the differences.
  std::optional<Error> conflict() const;

  // Aborts unless each rank is on one side, and the sides agree with their counts.
  void CheckInvariants() const;

 private:
  friend struct InvariantsPeer;

  // The members that declare the same.
  struct Side {
    DeclarationPtr declaration;
    bool disputed = false;
    RankSet ranks;
    size_t size = 0;
  };

  std::vector<Side>::iterator SideOf(Rank rank);
  // Takes the rank from its side. The declaration of a side that is empty then is remembered if `remember`.
  void RemoveFromSide(Rank rank, bool remember);
  // Adopts the momentum that was declared last: it may change without a new declaration.
  void AdoptMomentum(Side& side, const LayerSpec& spec);
  // Ends the dispute, if only one side is left.
  void AdoptUnanimous();

  std::vector<Side> sides_;  // Oldest first.
  std::deque<DeclarationPtr> past_;
  RankSet ranks_;  // On all sides.
  DeclarationPtr current_;
  bool agreed_ = false;  // Members have agreed before, under this master or an earlier one.
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_DECLARATIONS_H_
