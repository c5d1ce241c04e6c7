#include "server/rpc/relief_watch.h"

#include <cstddef>

namespace syncbn::rpc {

void ReliefWatch::Look(const LoopProgress& progress) {
  bool any = false;
  bool all = true;
  for (size_t i = 0; i < progress.turns.size(); ++i) {
    const LoopTurn& turn = progress.turns[i];
    if (!turn.there) continue;
    if (!seen_[i].there || turn.number != seen_[i].number || turn.cpu < seen_[i].cpu) seen_[i] = turn;
    const bool kept = turn.in_grpc && turn.cpu - seen_[i].cpu >= kKeptCall;
    any = any || kept;
    all = all && kept;
  }
  if (any) relieve_(all);
}

}  // namespace syncbn::rpc
