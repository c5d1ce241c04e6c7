#include "server/core/layer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/core/error.h"

namespace syncbn::core {
namespace {

const char* Name(LayerKind kind) { return kind == LayerKind::kSum ? "SUM" : "BATCH_NORM"; }
const char* Name(EpsMode mode) { return mode == EpsMode::kClamp ? "CLAMP" : "ADD"; }
const char* Name(NumericPolicy policy) { return policy == NumericPolicy::kPropagate ? "PROPAGATE" : "REFUSE"; }

}  // namespace

std::string Difference(const LayerSpec& worker, const LayerSpec& reference) {
  std::string text;
  const auto compare = [&text](const char* field, const auto& mine, const auto& theirs) {
    if (mine == theirs) return;
    absl::StrAppend(&text, text.empty() ? "" : ", ", field, " ", mine, " instead of ", theirs);
  };
  compare("channels", worker.channels, reference.channels);
  compare("kind", absl::string_view(Name(worker.kind)), absl::string_view(Name(reference.kind)));
  compare("eps", worker.eps, reference.eps);
  compare("eps_mode", absl::string_view(Name(worker.eps_mode)), absl::string_view(Name(reference.eps_mode)));
  compare("numeric_policy", absl::string_view(Name(worker.numeric_policy)),
          absl::string_view(Name(reference.numeric_policy)));
  compare("biased_running_variance", int{worker.biased_running_variance}, int{reference.biased_running_variance});
  return text;
}

std::optional<Error> CheckSpec(const LayerSpec& spec, const Limits& limits) {
  const auto malformed = [](std::string message) {
    return MakeError(absl::StatusCode::kInvalidArgument, kMalformedFrame, std::move(message));
  };
  if (spec.name.empty()) return malformed("a layer's name is empty");
  if (spec.name.size() > limits.max_name_bytes) {
    return LimitError(spec.name.size(), "bytes of a layer's name", "max_name_bytes", limits.max_name_bytes);
  }
  if (spec.channels == 0)
    return malformed(absl::StrCat("layer \"", spec.name, "\" has 0 channels; at least 1 is needed"));
  if (spec.kind == LayerKind::kBatchNorm && spec.channels > limits.max_channels) {
    return LimitError(spec.channels, absl::StrCat("channels of layer \"", spec.name, "\""), "max_channels",
                      limits.max_channels);
  }
  if (spec.kind == LayerKind::kSum && spec.channels > limits.max_vector_elements) {
    return LimitError(spec.channels, absl::StrCat("elements of vector \"", spec.name, "\""), "max_vector_elements",
                      limits.max_vector_elements);
  }
  if (!(spec.eps >= 0.0) || !std::isfinite(spec.eps)) {
    return malformed(absl::StrCat("layer \"", spec.name, "\" has eps = ", spec.eps, "; it is finite and not negative"));
  }
  if (spec.momentum.has_value() && !std::isfinite(*spec.momentum)) {
    return malformed(absl::StrCat("layer \"", spec.name, "\" has momentum = ", *spec.momentum, "; it is finite"));
  }
  return std::nullopt;
}

const Contributor* EndedRound::Find(Rank rank) const {
  const auto it = std::lower_bound(roster->begin(), roster->end(), rank,
                                   [](const Contributor& contributor, Rank r) { return contributor.rank < r; });
  return it != roster->end() && it->rank == rank ? &*it : nullptr;
}

OutcomeBudget::Handle OutcomeBudget::Retain(EndedRound* round, size_t bytes) {
  remembered_.push_back({round, bytes, false});
  bytes_ += bytes;
  while (bytes_ > max_bytes_ && remembered_.size() > min_outcomes_) {
    Entry& oldest = remembered_.front();
    oldest.round->outcome.reset();
    oldest.forgotten = true;
    bytes_ -= oldest.bytes;
    forgotten_.splice(forgotten_.end(), remembered_, remembered_.begin());
  }
  return std::prev(remembered_.end());
}

void OutcomeBudget::Release(Handle handle) {
  if (handle->forgotten) {
    forgotten_.erase(handle);
    return;
  }
  bytes_ -= handle->bytes;
  remembered_.erase(handle);
}

bool Layer::Declare(Rank rank, const LayerSpec& spec) {
  if (!known_to_.contains(rank)) {
    known_to_.insert(rank);
    ++knowing_;
  }
  if (Difference(spec, spec_).empty()) {
    deviating_.erase(rank);
    spec_.momentum = spec.momentum;
    return false;
  }
  deviating_[rank] = spec;
  return MaybeAdopt();
}

void Layer::Forget(Rank rank) {
  if (!known_to_.contains(rank)) return;
  known_to_.erase(rank);
  --knowing_;
  if (deviating_.erase(rank) != 0 || !deviating_.empty()) MaybeAdopt();
}

bool Layer::MaybeAdopt() {
  if (deviating_.empty() || deviating_.size() != knowing_) return false;
  const LayerSpec& candidate = deviating_.begin()->second;
  for (const auto& [rank, spec] : deviating_) {
    if (!Difference(spec, candidate).empty()) return false;
  }
  spec_ = LayerSpec(candidate);
  deviating_.clear();
  running_ = RunningStatistics();
  newest_forward_.reset();
  return true;
}

std::optional<Error> Layer::conflict() const {
  if (deviating_.empty()) return std::nullopt;
  std::vector<Rank> ranks;
  std::string text = absl::StrCat("workers disagree about layer \"", spec_.name, "\": ");
  constexpr size_t kShown = 4;
  for (const auto& [rank, spec] : deviating_) {
    if (ranks.size() < kShown) {
      absl::StrAppend(&text, ranks.empty() ? "" : "; ", "rank ", rank, " has ", Difference(spec, spec_));
    }
    ranks.push_back(rank);
  }
  if (ranks.size() > kShown) absl::StrAppend(&text, "; and ", ranks.size() - kShown, " more");
  return MakeError(absl::StatusCode::kFailedPrecondition, kLayerSpecMismatch, std::move(text), std::move(ranks));
}

EndedRound* Layer::Find(Phase phase, uint64_t sequence) {
  History& h = history(phase);
  const auto it = h.rounds.find(sequence);
  return it == h.rounds.end() ? nullptr : it->second.round.get();
}

bool Layer::Expired(Phase phase, uint64_t sequence) const {
  const History& h = history(phase);
  return h.newest >= retained_rounds_ && sequence <= h.newest - retained_rounds_;
}

void Layer::Record(const RoundKey& key, EndedRound round) {
  History& h = history(key.phase);
  const RoundOutcome& outcome = *round.outcome;
  if (round.failed) {
    ++failed_;
  } else {
    ++completed_;
    h.newest_completed = std::max(h.newest_completed.value_or(0), key.sequence);
    if (key.phase == Phase::kForward) {
      running_.Update(spec_, outcome);
      if (!newest_forward_ || newest_forward_->key.sequence <= key.sequence) newest_forward_ = round.outcome;
    }
  }
  size_t bytes = (outcome.first.size() + outcome.second.size()) * sizeof(double) +
                 outcome.missing_ranks.size() * sizeof(Rank) + round.digests.size() * sizeof(uint64_t);
  if (round.failed) bytes += outcome.error->message.size() + outcome.error->ranks.size() * sizeof(Rank);
  auto record = std::make_unique<EndedRound>(std::move(round));
  EndedRound* const address = record.get();
  h.rounds[key.sequence] = Retained{std::move(record), budget_->Retain(address, bytes)};
  h.newest = std::max(h.newest, key.sequence);
  while (!h.rounds.empty() && Expired(key.phase, h.rounds.begin()->first)) {
    budget_->Release(h.rounds.begin()->second.handle);
    h.rounds.erase(h.rounds.begin());
  }
}

LayerSummary Layer::Summary() const {
  LayerSummary summary;
  summary.spec = spec_;
  summary.newest_sequence = history(spec_.kind == LayerKind::kSum ? Phase::kSum : Phase::kForward).newest_completed;
  summary.rounds_completed = completed_;
  summary.rounds_failed = failed_;
  summary.conflict = conflict();
  return summary;
}

LayerView Layer::View() const {
  LayerView view;
  view.summary = Summary();
  view.batch = newest_forward_;
  view.running.updates = running_.updates;
  view.running.mean = running_.mean;
  view.running.var = running_.var;
  if (running_.mean.empty() && spec_.kind == LayerKind::kBatchNorm) {
    view.running.mean.assign(spec_.channels, 0.0);
    view.running.var.assign(spec_.channels, 1.0);
  }
  return view;
}

}  // namespace syncbn::core
