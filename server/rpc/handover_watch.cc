#include "server/rpc/handover_watch.h"

namespace syncbn::rpc {

void HandoverWatch::Look() {
  const Handover handover = handover_();
  if (handover.descriptor < 0 || handover.number != seen_.number) {
    seen_ = handover;
    counted_.reset();
    return;
  }
  if (handover.cpu - seen_.cpu < kLongCall) return;
  if (!counted_.has_value()) {
    counted_ = {handover.cpu, connections_->ReadBytes(handover.descriptor)};
    return;
  }
  const absl::Duration spent = handover.cpu - counted_->cpu;
  if (spent < kObserved) return;
  connections_->EndHandover(handover.descriptor, counted_->read, spent);
  counted_.reset();
}

}  // namespace syncbn::rpc
