#include "server/core/layer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/core/error.h"

namespace syncbn::core {

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

void Layer::Observe(const EndedRound& round) {
  const DeclarationPtr& declaration = round.declaration;
  if (running_of_ != nullptr && declaration->spec.channels != running_of_->spec.channels) {
    // A round of an older declaration, which ends late, is nothing to the statistics of a newer size.
    if (declaration->ordinal < running_of_->ordinal) return;
    running_ = RunningStatistics();
    newest_forward_.reset();
  }
  if (running_of_ == nullptr || declaration->ordinal >= running_of_->ordinal) running_of_ = declaration;
  running_.Update(declaration->spec, *round.outcome);
  if (!newest_forward_ || newest_forward_->key.sequence <= round.outcome->key.sequence) newest_forward_ = round.outcome;
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
    declarations_.NoteAgreement();
    h.newest_completed = std::max(h.newest_completed.value_or(0), key.sequence);
    if (key.phase == Phase::kForward) Observe(round);
  }
  size_t bytes = (outcome.first.size() + outcome.second.size()) * sizeof(double) +
                 outcome.missing_ranks.size() * sizeof(Rank) + round.digests.size() * sizeof(uint64_t);
  if (round.failed) bytes += outcome.error->message.size() + outcome.error->ranks.size() * sizeof(Rank);
  const bool aside = round.failed || round.alone;
  auto record = std::make_unique<EndedRound>(std::move(round));
  EndedRound* const address = record.get();
  h.rounds[key.sequence] = Retained{std::move(record), budget_->Retain(address, bytes)};
  if (aside) {
    h.aside.push_back(key.sequence);
  } else {
    h.newest = std::max(h.newest, key.sequence);
  }
  while (!h.rounds.empty() && Expired(key.phase, h.rounds.begin()->first)) Erase(h, h.rounds.begin());
  while (h.aside.size() > retained_failures_) {
    const auto oldest = h.rounds.find(h.aside.front());
    h.aside.pop_front();
    if (oldest != h.rounds.end()) Erase(h, oldest);
  }
}

void Layer::Erase(History& history, absl::btree_map<uint64_t, Retained>::iterator record) {
  budget_->Release(record->second.handle);
  history.rounds.erase(record);
}

LayerSummary Layer::Summary() const {
  LayerSummary summary;
  summary.spec = declarations_.current()->spec;
  summary.newest_sequence =
      history(summary.spec.kind == LayerKind::kSum ? Phase::kSum : Phase::kForward).newest_completed;
  summary.rounds_completed = completed_;
  summary.rounds_failed = failed_;
  summary.conflict = declarations_.conflict();
  return summary;
}

LayerView Layer::View() const {
  LayerView view;
  view.summary = Summary();
  const LayerSpec& spec = view.summary.spec;
  // Not those of a layer that all have since declared to be of another size.
  if (running_of_ != nullptr && running_of_->spec.channels == spec.channels) {
    view.batch = newest_forward_;
    view.running.updates = running_.updates;
    view.running.mean = running_.mean;
    view.running.var = running_.var;
  }
  if (view.running.mean.empty() && spec.kind == LayerKind::kBatchNorm) {
    view.running.mean.assign(spec.channels, 0.0);
    view.running.var.assign(spec.channels, 1.0);
  }
  return view;
}

}  // namespace syncbn::core
