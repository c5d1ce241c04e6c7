#include "tests/simulation/trainer.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>

namespace syncbn::simulation {

using core::BackwardRole;

bool Trainer::OnOutcome(const session::Complete& complete) {
  const auto found = std::find(waiting_.begin(), waiting_.end(), complete.contribution);
  if (found == waiting_.end()) return false;
  waiting_.erase(found);
  has_waited_ = true;
  second_thread_at_ = absl::InfiniteFuture();
  const RoundKey& key = complete.contribution->key();
  if (!complete.status.ok()) {
    failed_last_ = failed_last_ || sequence_ + 1 == Sequences();
    if (habits_.gives_up && !leaving_) GiveUp();
    return true;
  }
  if (key.phase != syncbn::Phase::kForward) return true;
  const testing::Numbers& numbers = *static_cast<const SimulatedContribution&>(*complete.contribution).numbers;
  const auto& missing = complete.result.missing_ranks;
  const bool counted = !std::count(missing.begin(), missing.end(), rank_);
  const bool can = numbers.role != BackwardRole::kNone;
  // Now and then one contributes though it has said that it would not.
  if (complete.result.backward_required && counted && (can || random_.Chance(0.1))) {
    const RoundKey backward{key.layer, key.sequence, syncbn::Phase::kBackward};
    backward_.push_back({backward, settings_.LayerOf(key).channels});
  }
  return true;
}

void Trainer::GiveUp() {
  plan_.clear();
  backward_.clear();
  waiting_.clear();
  forward_planned_ = backward_planned_ = false;
  ++sequence_;
}

std::optional<absl::Duration> Trainer::Act(CheckedSession& session, absl::Time now) {
  if (leaving_) return std::nullopt;
  if (habits_.raises != 0.0 && sequence_ < 3 && raising_.Chance(habits_.raises)) {
    GiveUp();
    ++raised_;
  }
  if (plan_.empty() && WaitsFor() == nullptr) PlanStage(session);
  if (plan_.empty() && waiting_.empty()) {
    leaving_ = true;
    session.Leave(now);
    return std::nullopt;
  }
  const bool waits = plan_.empty() || (habits_.one_by_one && WaitsFor() != nullptr && !several_threads_);
  if (waits && now < second_thread_at_) return Wait(session, now);
  if (waits) {
    several_threads_ = true;
    second_thread_at_ = absl::InfiniteFuture();
    session.Unblocked(/*retract=*/true);
    if (plan_.empty()) return std::nullopt;
  }
  Begin(session, now);
  return absl::Microseconds(random_.Between(10, 500));
}

ContributionRef Trainer::WaitsFor() const {
  const auto found = std::find_if(waiting_.begin(), waiting_.end(), [this](const ContributionRef& contribution) {
    return !habits_.sums_overlap || sequence_ == Sequences() || contribution->key().phase != syncbn::Phase::kSum;
  });
  return found == waiting_.end() ? nullptr : *found;
}

void Trainer::PlanStage(CheckedSession& session) {
  for (;;) {
    if (backward_planned_) {
      ++sequence_;
      forward_planned_ = backward_planned_ = false;
    }
    if (!forward_planned_) {
      if (sequence_ < Sequences()) PlanForward(session);
      return;
    }
    plan_ = std::exchange(backward_, {});
    random_.Shuffle(plan_);
    backward_planned_ = true;
    if (!plan_.empty()) return;
  }
}

void Trainer::PlanForward(CheckedSession& session) {
  for (const core::LayerSpec& spec : settings_.LayersAt(sequence_)) {
    const bool sum = spec.kind == core::LayerKind::kSum;
    if (sum && spec.name[0] == 'v') continue;  // A chunk of the long vector.
    if (!sum && !settings_.complete_set) session.Declare(spec);
    plan_.push_back({{spec.name, sequence_, sum ? syncbn::Phase::kSum : syncbn::Phase::kForward}, spec.channels});
  }
  if (settings_.long_vector != 0) plan_.push_back({{"v", sequence_, syncbn::Phase::kSum}, settings_.long_vector});
  random_.Shuffle(plan_);
  forward_planned_ = true;
}

void Trainer::Begin(CheckedSession& session, absl::Time now) {
  const size_t rounds = habits_.one_by_one ? 1 : 1 + random_.Below(plan_.size());
  for (size_t i = 0; i < rounds; ++i) {
    Planned round = std::move(plan_.back());
    plan_.pop_back();
    const NumbersPtr numbers = MakeNumbers(round);
    // Backward rounds name their forward round; all others are the next of their layer.
    if (round.key.phase != syncbn::Phase::kBackward) round.key.sequence = kNextSequence;
    for (ContributionRef& contribution : session.Begin(round.key, numbers)) waiting_.push_back(std::move(contribution));
  }
  const bool last = plan_.empty() && backward_planned_ && sequence_ + 1 == Sequences();
  if (last && random_.Chance(habits_.early_leave)) {
    leaving_ = true;
    session.Leave(now);
  }
}

std::optional<absl::Duration> Trainer::Wait(CheckedSession& session, absl::Time now) {
  const ContributionRef awaited = WaitsFor();
  if (habits_.says_blocked && !several_threads_ && awaited != nullptr) session.Blocked(awaited, has_waited_, now);
  if (!habits_.second_thread || several_threads_) return std::nullopt;
  if (second_thread_at_ == absl::InfiniteFuture()) {
    second_thread_at_ = now + absl::Microseconds(random_.Between(1'000, 250'000));
  }
  return second_thread_at_ - now;
}

NumbersPtr Trainer::MakeNumbers(const Planned& round) {
  if (!habits_.numbers_seed.has_value()) return MakeNumbers(round, random_);
  uint64_t seed = *habits_.numbers_seed;
  for (const uint64_t part : {uint64_t{rank_}, round.key.sequence, uint64_t(round.key.phase)}) {
    seed = Random(seed ^ part).Next();
  }
  for (const char letter : round.key.layer) seed = Random(seed ^ static_cast<uint8_t>(letter)).Next();
  Random random(seed);
  return MakeNumbers(round, random);
}

NumbersPtr Trainer::MakeNumbers(const Planned& round, Random& random) const {
  auto numbers = std::make_shared<testing::Numbers>();
  const bool forward = round.key.phase == syncbn::Phase::kForward;
  const bool sum = round.key.phase == syncbn::Phase::kSum;
  if (forward) numbers->count = random.Between(0, 5);
  if (forward && random.Chance(habits_.odd_roles)) {
    numbers->role = random.Chance(0.5) ? BackwardRole::kIfRequired : BackwardRole::kNone;
  }
  const bool empty = forward ? numbers->count == 0 : !sum && random.Chance(0.1);
  for (size_t c = 0; !empty && c < round.length; ++c) {
    numbers->first.push_back((forward ? habits_.offset : 0.0) + random.Unit());
    if (!sum) numbers->second.push_back(numbers->count == 1 ? 0.0 : random.Unit());
  }
  if (!empty && random.Chance(habits_.bad_numbers)) {
    switch (random.Below(3)) {
      case 0:
        numbers->first[0] = std::numeric_limits<double>::quiet_NaN();
        break;
      case 1:
        if (!sum) numbers->first.push_back(0.0);
        break;
      default:
        if (forward) numbers->second[0] = -1.0;
        if (!forward) numbers->first[0] = std::numeric_limits<double>::infinity();
    }
  }
  return numbers;
}

}  // namespace syncbn::simulation
