#include "server/rpc/lanes.h"

#include <algorithm>
#include <utility>

#include "plumbing/check.h"

namespace syncbn::rpc {

Lane* Lanes::Enter(const core::GroupId& id) {
  std::unique_ptr<Lane>& lane = lanes_[id];
  if (lane == nullptr) lane = std::make_unique<Lane>(id);
  ++lane->streams;
  return lane.get();
}

void Lanes::Leave(Lane* lane) {
  SYNCBN_CHECK(lane->streams > 0);
  if (--lane->streams != 0) return;
  SYNCBN_CHECK(lane->lagging == 0, "the last stream of a group has left and lags");
  turns_.erase(std::remove(turns_.begin(), turns_.end(), lane), turns_.end());
  lanes_.erase(core::GroupId(lane->id));  // A copy: the lane goes with its name.
}

std::vector<core::StreamId> Lanes::CatchUp(Lane& lane) {
  SYNCBN_CHECK(lane.lagging > 0);
  if (--lane.lagging != 0) return {};
  return std::exchange(lane.waiting, {});
}

void Lanes::AddToBacklog(Lane& lane, core::StreamId id) {
  if (lane.backlog.empty()) turns_.push_back(&lane);
  lane.backlog.push_back(id);
}

core::StreamId Lanes::NextTurn() {
  SYNCBN_CHECK(has_backlog());
  Lane* const lane = turns_.front();
  turns_.pop_front();
  SYNCBN_CHECK(!lane->backlog.empty());
  const core::StreamId id = lane->backlog.front();
  lane->backlog.pop_front();
  if (!lane->backlog.empty()) turns_.push_back(lane);
  return id;
}

}  // namespace syncbn::rpc
