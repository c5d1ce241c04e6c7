#include "server/core/running_statistics.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "kernels/coefficients.h"
#include "plumbing/check.h"

namespace syncbn::core {

bool RunningStatistics::Includes(uint64_t sequence) const {
  return sequence <= newest_ && std::find(recent_.begin(), recent_.end(), sequence) != recent_.end();
}

void RunningStatistics::Include(uint64_t sequence) {
  if (!std::exchange(connected_, true)) {
    const std::optional<uint64_t> newest = newest_sequence();
    const uint64_t next = newest.has_value() ? *newest + 1 : 0;
    if (sequence > next) missing_ = MissingRounds{missing_.has_value() ? missing_->after : newest, sequence};
  }
  newest_ = std::max(newest_, sequence);
  if (recent_.size() < kRecentRounds) {
    recent_.push_back(sequence);
  } else {
    recent_[oldest_] = sequence;
    oldest_ = (oldest_ + 1) % kRecentRounds;
  }
}

void RunningStatistics::Expect(uint64_t sequence) {
  if (!Includes(sequence)) expected_.insert(sequence);
}

std::optional<MissingRounds> RunningStatistics::Missing() const {
  if (expected_.empty()) return missing_;
  const uint64_t least = *expected_.begin();
  MissingRounds missing;
  if (least != 0) missing.after = least - 1;
  missing.before = *expected_.rbegin() + 1;
  if (missing_.has_value()) {
    missing.after = std::min(missing.after, missing_->after);  // None is the least.
    missing.before = std::max(missing.before, missing_->before);
  }
  return missing;
}

bool RunningStatistics::Observe(const DeclarationPtr& declaration, const RoundOutcome& forward) {
  const uint64_t sequence = forward.key.sequence;
  expected_.erase(sequence);
  if (Includes(sequence)) {
    connected_ = true;
    return true;
  }
  if (declaration_ != nullptr && declaration->spec.channels != declaration_->spec.channels) {
    // Sequences tell which size is newer. Declarations do not: a worker that resends an old round declares the old size
    // again. Ignore an older round that ends late, and do not begin statistics with an empty batch.
    if (sequence < newest_ || forward.count == 0) return false;
    mean_.clear();
    var_.clear();
    updates_ = 0;
    missing_.reset();
    expected_.clear();
  }
  Include(sequence);
  if (forward.count == 0) return true;
  declaration_ = declaration;
  Update(declaration->spec, forward);
  return true;
}

void RunningStatistics::Update(const LayerSpec& spec, const RoundOutcome& forward) {
  if (mean_.empty()) {
    mean_.assign(spec.channels, 0.0);
    var_.assign(spec.channels, 1.0);
  }
  ++updates_;
  const double momentum = spec.momentum.value_or(1.0 / static_cast<double>(updates_));
  const kernels::RunningUpdate update(forward.count, momentum, spec.biased_running_variance);
  // One loop for each vector, without a branch inside, so that the compiler vectorizes them.
  const auto each = [](const std::vector<double>& from, std::vector<double>& running, auto blend) {
    const double* const observed = from.data();
    double* __restrict const to = running.data();
    for (size_t c = 0; c < running.size(); ++c) to[c] = blend(to[c], observed[c]);
  };
  each(forward.first, mean_, [&update](double running, double observed) { return update.Mean(running, observed); });
  if (!update.moves_var()) return;
  each(forward.second, var_, [&update](double running, double observed) { return update.Var(running, observed); });
}

RunningStatisticsView RunningStatistics::View(const LayerSpec& spec) const {
  RunningStatisticsView view;
  if (declaration_ != nullptr && declaration_->spec.channels == spec.channels) {
    view = {mean_, var_, updates_, Missing()};
  } else if (spec.kind == LayerKind::kBatchNorm) {
    view.mean.assign(spec.channels, 0.0);
    view.var.assign(spec.channels, 1.0);
  }
  return view;
}

std::optional<uint64_t> RunningStatistics::newest_sequence() const {
  if (recent_.empty()) return std::nullopt;
  return newest_;
}

std::optional<LayerState> RunningStatistics::State() const {
  if (declaration_ == nullptr) return std::nullopt;
  LayerState state;
  state.spec = declaration_->spec;
  state.updates = updates_;
  state.mean = mean_;
  state.var = var_;
  state.newest_sequence = newest_;
  state.recent.assign(recent_.begin() + oldest_, recent_.end());
  state.recent.insert(state.recent.end(), recent_.begin(), recent_.begin() + oldest_);
  state.missing = Missing();
  return state;
}

void RunningStatistics::ResumeFromNothing() {
  SYNCBN_CHECK(recent_.empty());
  connected_ = false;
}

void RunningStatistics::Resume(const LayerState& state) {
  SYNCBN_CHECK(state.mean.size() == state.spec.channels && state.var.size() == state.spec.channels, state.spec.name);
  SYNCBN_CHECK(!state.recent.empty() && state.recent.size() <= kRecentRounds, state.spec.name);
  mean_ = state.mean;
  var_ = state.var;
  updates_ = state.updates;
  declaration_ = std::make_shared<const Declaration>(Declaration{state.spec});
  newest_ = state.newest_sequence;
  recent_ = state.recent;
  oldest_ = 0;
  missing_ = state.missing;
  connected_ = false;
}

}  // namespace syncbn::core
