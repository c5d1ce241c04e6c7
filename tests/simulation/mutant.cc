#include "tests/simulation/mutant.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "server/core/error.h"

namespace syncbn::simulation {

using core::RoundOutcome;
using core::StreamId;

core::Limits Mutant::LimitsWith(Bug bug) {
  core::Limits limits = SimulatedLimits();
  if (bug == Bug::kHastyLeave) limits.max_leave_delay = absl::ZeroDuration();
  if (bug == Bug::kUsedNumber) limits.max_sequence_jump = 0;
  if (bug != Bug::kForgottenSteps) return limits;
  limits.max_retained_bytes_waiting = 0;
  limits.min_retained_outcomes = 1;
  return limits;
}

core::Effects Mutant::OnFrame(StreamId stream, const Frame& frame, absl::Time now) {
  core::FrameReceived event = ToEvent(stream, frame);
  if (bug_ != Bug::kNone) DistortFrame(stream, event);
  return Distort(coordinator_.On(event, now));
}

core::Effects Mutant::OnClosed(StreamId stream, absl::Time now) {
  const auto rank = rank_of_.find(stream);
  const bool seated = rank != rank_of_.end() && seats_[rank->second] == stream && closed_.count(stream) == 0;
  core::FrameReceived last;
  last.stream = stream;
  if (seated && bug_ == Bug::kEarlyLeave) {
    last.leave = "broken";
    return Distort(coordinator_.On(last, now));
  }
  core::Effects effects;
  if (seated && bug_ == Bug::kLateJoin) effects = coordinator_.On(last, now);
  core::Effects more = coordinator_.On(core::StreamClosed{stream}, now);
  effects.insert(effects.end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
  return Distort(std::move(effects));
}

absl::Time Mutant::NextDeadline() const {
  return bug_ == Bug::kIgnoredDeadline ? absl::InfiniteFuture() : coordinator_.NextDeadline();
}

void Mutant::DistortFrame(StreamId stream, core::FrameReceived& event) {
  asked_ = 0;
  if (event.join.has_value()) {
    rank_of_[stream] = event.join->rank;
    std::vector<core::LayerSpec>& layers = event.join->layers;
    if (bug_ == Bug::kAnyLayers && !layers.empty() && layers.back().name == "z") layers.pop_back();
    const uint64_t present = incarnations_[event.join->rank];
    if (bug_ == Bug::kNoFencing && event.join->incarnation != 0 && event.join->incarnation < present) {
      asked_ = std::exchange(event.join->incarnation, present);
    }
    if (bug_ == Bug::kForgottenLeaves) event.join->left_ranks.clear();
    core::MissingPolicy& policy = event.join->config.missing_policy;
    if (bug_ == Bug::kImpatience && policy == core::MissingPolicy::kWait) policy = core::MissingPolicy::kFail;
    if (bug_ == Bug::kStolenSeat && event.join->incarnation == 0) event.join->incarnation = present;
    return;
  }
  const auto rank = rank_of_.find(stream);
  if (rank == rank_of_.end()) return;
  if (event.leave.has_value()) left_.insert(stream);
  if (bug_ == Bug::kEarlyCatchUp) event.caught_up = true;
  if (bug_ == Bug::kUnknownLeaves) event.left_ranks.clear();
  if (bug_ == Bug::kChangedRoster) {
    for (core::EndedReport& report : event.ended) report.missing_ranks.clear();
  }
  if (bug_ == Bug::kLostDeclaration && rank->second == 0) event.layers.clear();
  if (bug_ == Bug::kStaleStream && closed_.count(stream) != 0 && closed_.count(seats_[rank->second]) == 0) {
    event.stream = seats_[rank->second];
  }
  for (core::Contribution& contribution : event.contributions) {
    if (bug_ == Bug::kAskingRepeats) contribution.repeats = false;
    if (bug_ == Bug::kSmallerStep && incarnations_[rank->second] > 1 && contribution.count > 0) --contribution.count;
    if (bug_ == Bug::kDoubleCount && rank->second == 0) {
      const StreamId first = first_stream_.emplace(contribution.key, stream).first->second;
      if (first != stream && contribution.key.phase == core::Phase::kForward) contribution.count *= 2;
    }
    if (bug_ != Bug::kAcceptedNan) continue;
    for (absl::Span<const double>* vector : {&contribution.first, &contribution.second}) {
      if (std::none_of(vector->begin(), vector->end(), [](double value) { return std::isnan(value); })) continue;
      kept_.push_back(std::make_unique<std::vector<double>>(vector->size(), 1.0));
      *vector = *kept_.back();
    }
  }
}

// The change is the same wherever the outcome is told.
void Mutant::ChangeNumber(std::shared_ptr<const RoundOutcome>* outcome) const {
  if (!(*outcome)->error.has_value()) return;
  auto changed = std::make_shared<RoundOutcome>(**outcome);
  const core::RoundKey& key = changed->key;
  std::optional<uint64_t>& number = changed->error->resume_at;
  if (number.has_value() && bug_ == Bug::kSplitNumber) *number += static_cast<uint64_t>(key.layer[0] - 'a');
  if (number.has_value() && bug_ == Bug::kUntoldNumber) number.reset();
  const bool late = changed->error->reason == std::string(core::kRoundTimeout);
  if (!number.has_value() && late && bug_ == Bug::kNeedlessNumber) number = key.sequence + 1;
  *outcome = std::move(changed);
}

core::Effects Mutant::Distort(core::Effects effects) {
  if (bug_ == Bug::kNone) return effects;
  for (core::Effect& effect : effects) {
    if (auto* joined = std::get_if<core::SendJoined>(&effect)) {
      const core::Rank rank = rank_of_[joined->stream];
      seats_[rank] = joined->stream;
      incarnations_[rank] = joined->incarnation;
      if (asked_ != 0) joined->incarnation = asked_;
      if (bug_ == Bug::kSameMemory) joined->memory = 1;
      if (bug_ == Bug::kWrongPlace) {
        for (core::RoundKey& key : joined->newest_rounds) key.sequence -= key.sequence == 0 ? 0 : 1;
      }
    } else if (auto* close = std::get_if<core::CloseStream>(&effect)) {
      closed_.insert(close->stream);
      const bool left = left_.count(close->stream) != 0;
      if (bug_ == Bug::kLightShutdown && left) close->error.reset();
    } else if (auto* late = std::get_if<core::SendLateRounds>(&effect)) {
      if (bug_ == Bug::kSilentLate) late->rounds.clear();
    } else if (auto* results = std::get_if<core::SendResults>(&effect)) {
      Distort(*results);
    } else if (auto* ended = std::get_if<core::RoundEnded>(&effect)) {
      ChangeNumber(&ended->outcome);
      if (bug_ != Bug::kWrongVariance || ended->outcome->key.phase != core::Phase::kForward) continue;
      auto wrong = std::make_shared<RoundOutcome>(*ended->outcome);
      for (double& var : wrong->second) var *= 1.0 + 1e-9;
      ended->outcome = std::move(wrong);
    }
  }
  return effects;
}

void Mutant::Distort(core::SendResults& results) {
  if (bug_ == Bug::kSendAfterClose && !closed_.empty()) results.streams.push_back(*closed_.begin());
  if (bug_ == Bug::kLostOutcome && results.streams.size() > 1) results.streams.pop_back();
  for (auto& outcome : results.outcomes) {
    ChangeNumber(&outcome);
    if (bug_ == Bug::kOpenEar && !outcome->refused) ended_.emplace(outcome->key, outcome);
    if (bug_ == Bug::kOpenEar && outcome->refused && outcome->error->reason == std::string(core::kNotAContributor)) {
      if (const auto ended = ended_.find(outcome->key); ended != ended_.end()) outcome = ended->second;
    }
    const bool replay = !told_.insert(outcome->key).second;
    const bool split = bug_ == Bug::kSplitOutcome && results.streams.size() > 1;
    if (outcome->first.empty() || !(split || (bug_ == Bug::kChangedReplay && replay))) continue;
    auto changed = std::make_shared<RoundOutcome>(*outcome);
    changed->first[0] = std::nextafter(changed->first[0], std::numeric_limits<double>::infinity());
    outcome = std::move(changed);
  }
}

}  // namespace syncbn::simulation
