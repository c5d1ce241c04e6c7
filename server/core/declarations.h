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

// The declarations of one layer. Each member has one at a time, and may replace it: its contributions belong to the one
// that it had made when it sent them. So members may be under way from one declaration to the next, each in its own
// time, and no rule but that of rounds holds them together: all contributions to a key are made under one declaration.
//
// A dispute is something else: a member's first word on a layer upon which none have agreed yet, which is neither what
// another member says nor what one has said before. It lasts until all say the same. Once they have agreed, a first
// word comes from a rank that has restarted, and may be ahead of the others or behind them.
//
// Not thread-safe; pure.
class Declarations {
 public:
  explicit Declarations(const LayerSpec& spec);

  // A rank says what the layer is. One that is `returning` may have declared the layer before, to a master that has
  // lost its memory; its word begins no dispute.
  void Declare(Rank rank, const LayerSpec& spec, bool returning);
  // A round of the layer has completed.
  void NoteAgreement() { agreed_ = true; }
  // Drops the rank's declaration: it has left, or its successor speaks for it.
  void Forget(Rank rank);

  // Returns the rank's declaration; null if it has made none.
  DeclarationPtr Of(Rank rank) const;
  // The declaration that all members last agreed on.
  const DeclarationPtr& current() const { return current_; }
  // Returns whether a member declares this, or a member that stayed has declared it not long ago.
  bool Known(const LayerSpec& spec) const;
  const RankSet& ranks() const { return ranks_; }
  // The dispute, if there is one: LAYER_SPEC_MISMATCH, naming the deviating ranks and the differences.
  std::optional<Error> conflict() const;

 private:
  // Members that declare the same.
  struct Side {
    DeclarationPtr declaration;
    bool disputed = false;
    RankSet ranks;
    size_t size = 0;
  };

  std::vector<Side>::iterator SideOf(Rank rank);
  // Takes the rank from its side. What nobody says any more then is remembered if `keep`.
  void Quit(Rank rank, bool keep);
  // The momentum that was declared last counts.
  void Renew(Side& side, const LayerSpec& spec);
  void Settle();

  std::vector<Side> sides_;  // Oldest first.
  std::deque<DeclarationPtr> past_;
  RankSet ranks_;  // Of all sides.
  DeclarationPtr current_;
  bool agreed_ = false;  // Before, and be it under an earlier master.
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_DECLARATIONS_H_
