#include "tests/simulation/worker.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <utility>

namespace syncbn::simulation {

using core::BackwardRole;
using core::Phase;
using core::RoundKey;

FramePtr Worker::JoinFrame() {
  core::Join join = testing::MakeJoin(rank_, settings_.world_size);
  join.incarnation = incarnation_;
  join.run_id = run_id_;
  join.config = settings_.config;
  auto frame = std::make_shared<Frame>();
  if (settings_.redeclared_at.has_value()) {
    declared_ = &settings_.LayersAt(sequence_);
    frame->layers = *declared_;
  } else {
    join.layers = settings_.layers;
  }
  frame->join = std::move(join);
  return frame;
}

void Worker::OnJoined(const core::SendJoined& joined) {
  incarnation_ = joined.incarnation;
  run_id_ = joined.run_id;
  changed_.clear();
}

void Worker::OnOutcome(const core::RoundOutcome& outcome) {
  const auto changed = changed_.find(outcome.key);
  if (changed != changed_.end() && changed->second > 0 && testing::ReasonOf(outcome) == "PAYLOAD_CHANGED") {
    --changed->second;
    return;
  }
  if (unanswered_.erase(outcome.key) == 0 || outcome.key.phase != Phase::kForward) return;
  const auto& missing = outcome.missing_ranks;
  const bool counted = !std::count(missing.begin(), missing.end(), rank_);
  const bool can = sent_.at(outcome.key)->role != BackwardRole::kNone;
  // Now and then one contributes though it has said that it would not.
  if (!outcome.error.has_value() && outcome.backward_required && counted && (can || random_.Chance(0.1))) {
    backward_.push_back({outcome.key.layer, outcome.key.sequence, Phase::kBackward});
  }
}

std::vector<RoundKey> Worker::Unanswered() const { return {unanswered_.begin(), unanswered_.end()}; }

void Worker::Declare(Frame& frame) {
  if (!settings_.redeclared_at.has_value() || frame.parts.empty()) return;
  const auto* const layers = &settings_.LayersAt(frame.parts.front().key.sequence);
  if (declared_ == layers) return;
  declared_ = layers;
  frame.layers = *layers;
}

FramePtr Worker::Resend() {
  auto frame = std::make_shared<Frame>();
  for (const RoundKey& key : unanswered_) frame->parts.push_back({key, sent_.at(key)});
  if (habits_.says_blocked && to_send_.empty()) frame->blocked_on = Unanswered();
  Declare(*frame);
  return frame->parts.empty() ? nullptr : frame;
}

void Worker::PlanForward() {
  for (const core::LayerSpec& spec : settings_.layers) {
    const Phase phase = spec.kind == core::LayerKind::kSum ? Phase::kSum : Phase::kForward;
    to_send_.push_back({spec.name, sequence_, phase});
  }
  random_.Shuffle(to_send_);
  forward_planned_ = true;
}

void Worker::PlanBackward() {
  to_send_ = std::exchange(backward_, {});
  random_.Shuffle(to_send_);
  backward_planned_ = true;
}

FramePtr Worker::Next() {
  if (leaving_) return nullptr;
  if (to_send_.empty() && unanswered_.empty()) {
    if (backward_planned_) {
      ++sequence_;
      forward_planned_ = backward_planned_ = false;
    }
    if (forward_planned_) {
      PlanBackward();
    } else if (sequence_ < habits_.sequences) {
      PlanForward();
    }
    if (backward_planned_ && to_send_.empty()) return Next();
  }
  auto frame = std::make_shared<Frame>();
  if (to_send_.empty()) {
    if (!unanswered_.empty()) return nullptr;
    leaving_ = frame->leave = true;
    return frame;
  }
  if (habits_.one_by_one && !unanswered_.empty()) return nullptr;
  const size_t parts = habits_.one_by_one ? 1 : 1 + random_.Below(to_send_.size());
  for (size_t i = 0; i < parts; ++i) {
    const RoundKey key = to_send_.back();
    to_send_.pop_back();
    frame->parts.push_back({key, sent_[key] = MakeNumbers(key)});
    unanswered_.insert(key);
  }
  if (habits_.says_blocked && (to_send_.empty() || habits_.one_by_one)) frame->blocked_on = Unanswered();
  Declare(*frame);
  return frame;
}

FramePtr Worker::Repeat() {
  if (sent_.empty() || leaving_) return nullptr;
  const auto part = std::next(sent_.begin(), random_.Below(sent_.size()));
  auto frame = std::make_shared<Frame>();
  NumbersPtr numbers = part->second;
  if (random_.Chance(habits_.changed_repeats)) {
    auto other = std::make_shared<testing::Numbers>(*numbers);
    if (other->first.empty()) return nullptr;
    other->first[0] = random_.Chance(0.2) ? std::numeric_limits<double>::quiet_NaN() : other->first[0] + 1.0;
    numbers = std::move(other);
    ++changed_[part->first];
  }
  frame->parts.push_back({part->first, std::move(numbers)});
  Declare(*frame);
  return frame;
}

NumbersPtr Worker::MakeNumbers(const RoundKey& key) {
  const core::LayerSpec& spec = settings_.LayerOf(key);
  auto numbers = std::make_shared<testing::Numbers>();
  const bool forward = key.phase == Phase::kForward;
  if (forward) numbers->count = random_.Between(0, 5);
  if (forward && random_.Chance(habits_.odd_roles)) {
    numbers->role = random_.Chance(0.5) ? BackwardRole::kIfRequired : BackwardRole::kNone;
  }
  const bool empty = forward ? numbers->count == 0 : key.phase == Phase::kBackward && random_.Chance(0.1);
  for (uint32_t c = 0; !empty && c < spec.channels; ++c) {
    numbers->first.push_back((forward ? habits_.offset : 0.0) + random_.Unit());
    if (key.phase != Phase::kSum) numbers->second.push_back(numbers->count == 1 ? 0.0 : random_.Unit());
  }
  if (!empty && random_.Chance(habits_.bad_numbers)) {
    switch (random_.Below(3)) {
      case 0:
        numbers->first[0] = std::numeric_limits<double>::quiet_NaN();
        break;
      case 1:
        numbers->first.push_back(0.0);
        break;
      default:
        if (forward) numbers->second[0] = -1.0;
        if (!forward) numbers->first[0] = std::numeric_limits<double>::infinity();
    }
  }
  return numbers;
}

}  // namespace syncbn::simulation
