#include "server/core/layer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "plumbing/check.h"
#include "server/core/error.h"
#include "vocabulary/bad_number.h"

namespace syncbn::core {

std::optional<Error> CheckSpec(const LayerSpec& spec, const Limits& limits) {
  if (spec.name.empty()) return MalformedError("a layer's name is empty");
  if (spec.name.size() > limits.max_name_bytes) {
    return LimitError(spec.name.size(), "bytes of a layer's name", "max_name_bytes", limits.max_name_bytes);
  }
  if (const auto fault = FindBadNumber(spec)) return MalformedError(*fault);
  if (spec.kind == LayerKind::kBatchNorm && spec.channels > limits.max_channels) {
    return LimitError(spec.channels, absl::StrCat("channels of layer \"", spec.name, "\""), "max_channels",
                      limits.max_channels);
  }
  if (spec.kind == LayerKind::kSum && spec.channels > limits.max_vector_elements) {
    return LimitError(spec.channels, absl::StrCat("elements of vector \"", spec.name, "\""), "max_vector_elements",
                      limits.max_vector_elements);
  }
  return std::nullopt;
}

namespace {

ChannelSummary SummaryOf(const std::vector<double>& mean, const std::vector<double>& var) {
  constexpr double kConstant = 1e-10;
  constexpr double kMostMagnitude = 1e4;
  ChannelSummary summary;
  summary.least_var = var.front();
  for (uint32_t c = 0; c < var.size(); ++c) {
    summary.least_var = std::min(summary.least_var, var[c]);
    summary.greatest_var = std::max(summary.greatest_var, var[c]);
    summary.greatest_mean = std::max(summary.greatest_mean, std::abs(mean[c]));
    // A comparison with NaN is false, so these find it too.
    const bool tame = std::abs(mean[c]) <= kMostMagnitude && var[c] <= kMostMagnitude * kMostMagnitude;
    if (!tame) {
      if (summary.exploding++ < kMostShownKeys) summary.exploding_channels.push_back(c);
    } else if (var[c] <= kConstant * std::max(1.0, mean[c] * mean[c])) {
      if (summary.constant++ < kMostShownKeys) summary.constant_channels.push_back(c);
    }
  }
  return summary;
}

}  // namespace

void Layer::Observe(const EndedRound& round) {
  if (!running_.Observe(round.declaration, *round.outcome)) return;
  if (newest_forward_sequence_ > round.outcome->key.sequence) return;
  newest_forward_ = round.outcome;
  newest_forward_sequence_ = round.outcome->key.sequence;
}

void Layer::Resume(const LayerState& state) {
  History& h = history(Phase::kForward);
  SYNCBN_CHECK(state.spec.name == name() && !running_.newest_sequence().has_value(), name());
  running_.Resume(state);
  declarations_.NoteAgreement();
  h.newest_completed = std::max(h.newest_completed.value_or(0), state.newest_sequence);
}

const EndedRound* Layer::Find(Phase phase, uint64_t sequence) const {
  const History& h = history(phase);
  if (h.ended == 0 || sequence > h.greatest) return nullptr;  // The common case: a round in flight.
  for (const Records* records : {&h.rounds, &h.awaited}) {
    if (const auto it = records->find(sequence); it != records->end()) return it->second.round.get();
  }
  return nullptr;
}

EndedRound* Layer::Find(Phase phase, uint64_t sequence) {
  return const_cast<EndedRound*>(std::as_const(*this).Find(phase, sequence));
}

bool Layer::LostAwaited(uint64_t sequence) const {
  return sequence < history(Phase::kForward).floor && Find(Phase::kForward, sequence) == nullptr;
}

bool Layer::Expired(Phase phase, uint64_t sequence) const {
  const History& h = history(phase);
  if (phase == Phase::kBackward) {
    const EndedRound* const forward = Find(Phase::kForward, sequence);
    if (forward != nullptr && forward->awaited) return false;
    if (LostAwaited(sequence)) return true;
  }
  return sequence < h.floor || FarBehind(h, sequence);
}

void Layer::Drop(Phase phase, uint64_t sequence) {
  History& h = history(phase);
  for (Records* records : {&h.rounds, &h.awaited}) {
    if (const auto it = records->find(sequence); it != records->end()) Erase(*records, it);
  }
  h.floor = std::max(h.floor, sequence + 1);
}

void Layer::Erase(Records& records, Records::iterator record) {
  budget_->Refund(record->second.handle);
  records.erase(record);
}

void Layer::Prune(Phase phase) {
  History& h = history(phase);
  while (!h.rounds.empty() && FarBehind(h, h.rounds.begin()->first)) {
    const auto oldest = h.rounds.begin();
    // Backward passes run in reverse order of their sequences, so a record far behind may be a recent one. Keep it.
    if (phase == Phase::kBackward && oldest->second.number + retained_rounds_ >= h.ended) return;
    Retire(h, oldest);
  }
}

void Layer::Retire(History& h, Records::iterator record) {
  if (record->second.round->awaited) {
    h.awaited.emplace(record->first, std::move(record->second));
    h.rounds.erase(record);
  } else {
    Erase(h.rounds, record);
  }
}

void Layer::EndAwaiting(uint64_t sequence) {
  EndedRound* const forward = Find(Phase::kForward, sequence);
  if (forward == nullptr) return;
  forward->awaited = false;
  History& h = history(Phase::kForward);
  if (const auto it = h.awaited.find(sequence); it != h.awaited.end()) Erase(h.awaited, it);
}

void Layer::Record(const RoundKey& key, EndedRound round) {
  SYNCBN_CHECK(key.layer == name() && round.declaration != nullptr, Describe(key));
  SYNCBN_CHECK(round.roster != nullptr && round.roster->size() == round.digests.size(), Describe(key));
  SYNCBN_CHECK((round.outcome == nullptr) == round.restored, Describe(key));
  SYNCBN_CHECK(round.restored || round.failed == round.outcome->error.has_value(), Describe(key));
  SYNCBN_CHECK(Find(key.phase, key.sequence) == nullptr, "the ", Describe(key), " has ended twice");
  if (round.failed) {
    ++failed_;
  } else {
    History& h = history(key.phase);
    completed_ += round.restored ? 0 : 1;
    declarations_.NoteAgreement();
    h.newest_completed = std::max(h.newest_completed.value_or(0), key.sequence);
    if (key.phase == Phase::kForward) {
      if (round.restored) {
        running_.Expect(key.sequence);
      } else {
        Observe(round);
      }
      round.awaited = round.backward_required;
    }
  }
  if (key.phase == Phase::kBackward) EndAwaiting(key.sequence);
  const bool aside = round.failed || round.alone;
  File(key, std::move(round), aside);
}

void Layer::File(const RoundKey& key, EndedRound round, bool aside) {
  History& h = history(key.phase);
  auto record = std::make_unique<EndedRound>(std::move(round));
  EndedRound* const address = record.get();
  h.rounds[key.sequence] = Retained{std::move(record), Charge(key, address), ++h.ended};
  h.greatest = std::max(h.greatest, key.sequence);
  if (aside) {
    h.aside.push_back(key.sequence);
  } else {
    h.newest = std::max(h.newest, key.sequence);
  }
  Prune(key.phase);
  while (h.aside.size() > retained_failures_) {
    const auto oldest = h.rounds.find(h.aside.front());
    h.aside.pop_front();
    if (oldest != h.rounds.end()) Retire(h, oldest);
  }
  budget_->Trim();
}

OutcomeBudget::Handle Layer::Charge(const RoundKey& key, EndedRound* round) {
  size_t bytes = 0;
  if (round->outcome != nullptr) {
    const RoundOutcome& outcome = *round->outcome;
    bytes = (outcome.first.size() + outcome.second.size()) * sizeof(double) +
            (outcome.missing_ranks.size() + outcome.abstaining_ranks.size()) * sizeof(Rank);
    if (round->failed) bytes += outcome.error->message.size() + outcome.error->ranks.size() * sizeof(Rank);
  }
  constexpr size_t kMapBytes = 64;
  size_t record_bytes = sizeof(EndedRound) + sizeof(OutcomeBudget::Entry) + kMapBytes;
  record_bytes += round->digests.size() * sizeof(uint64_t);
  // A shared roster costs next to nothing. Two of its owners are this record and the group's newest roster.
  if (round->roster.use_count() <= 2) record_bytes += round->roster->size() * sizeof(Contributor);
  if (!round->holders.empty()) record_bytes += round->roster->size() / 8;
  return budget_->Charge({this, key.phase, key.sequence, round, bytes, record_bytes, round->outcome == nullptr});
}

void Layer::Restore(const RoundKey& key, EndedRound round) {
  SYNCBN_CHECK(!round.restored && !round.failed && round.outcome != nullptr, Describe(key));
  ++completed_;
  if (key.phase == Phase::kForward) Observe(round);
  History& h = history(key.phase);
  for (Records* records : {&h.rounds, &h.awaited}) {
    const auto record = records->find(key.sequence);
    if (record == records->end()) continue;
    round.awaited = record->second.round->awaited;
    round.holders = std::move(record->second.round->holders);
    budget_->Refund(record->second.handle);
    *record->second.round = std::move(round);
    record->second.handle = Charge(key, record->second.round.get());
    budget_->Trim();
    return;
  }
}

std::optional<uint64_t> Layer::NoteForgotten(Rank rank, const RoundKey& key) {
  History& h = history(key.phase);
  h.greatest_forgotten = std::max(h.greatest_forgotten, key.sequence);
  const auto [greatest, first] = h.forgotten.emplace(rank, key.sequence);
  if (first) return 0;
  if (key.sequence <= greatest->second) return std::nullopt;
  return std::exchange(greatest->second, key.sequence) + 1;
}

bool Layer::MayHaveForgotten(Rank rank, Phase phase, uint64_t sequence) const {
  const History& h = history(phase);
  const auto forgotten = h.forgotten.find(rank);
  if (forgotten == h.forgotten.end() || sequence > forgotten->second) return false;
  if (phase != Phase::kBackward) return true;
  // Backward rounds end in any order, so that a lesser one need not have ended before a greater one.
  const EndedRound* const forward = Find(Phase::kForward, sequence);
  if (forward == nullptr || forward->holders.empty() || forward->holders.contains(rank)) return false;
  const Contributor* const contributor = forward->Find(rank);
  return contributor != nullptr && contributor->role != BackwardRole::kNone;
}

std::optional<Rank> Layer::ForgottenBy(Phase phase, uint64_t sequence) const {
  const History& h = history(phase);
  if (h.forgotten.empty() || sequence > h.greatest_forgotten) return std::nullopt;
  for (const auto& [rank, greatest] : h.forgotten) {
    if (MayHaveForgotten(rank, phase, sequence)) return rank;
  }
  return std::nullopt;
}

size_t Layer::CheckInvariants() const {
  declarations_.CheckInvariants();
  size_t records = 0;
  for (const Phase phase : {Phase::kForward, Phase::kBackward, Phase::kSum}) {
    const History& h = history(phase);
    for (const Records* list : {&h.rounds, &h.awaited}) {
      for (const auto& [sequence, retained] : *list) {
        const EndedRound& round = *retained.round;
        const OutcomeBudget::Entry& entry = *retained.handle;
        SYNCBN_CHECK(entry.layer == this && entry.phase == phase && entry.sequence == sequence, name(), " ", sequence);
        SYNCBN_CHECK(entry.round == &round, name(), " ", sequence);
        SYNCBN_CHECK(sequence <= h.greatest && retained.number <= h.ended, name(), " ", sequence);
        SYNCBN_CHECK(!round.awaited || (phase == Phase::kForward && round.backward_required), name(), " ", sequence);
        SYNCBN_CHECK(list == &h.rounds || (round.awaited && !h.rounds.contains(sequence)), name(), " ", sequence);
      }
      records += list->size();
    }
    SYNCBN_CHECK(h.newest <= h.greatest && h.aside.size() <= retained_failures_, name());
  }
  return records;
}

std::optional<ChannelSummary> Layer::SummarizeChannels() const {
  const LayerSpec& spec = declarations_.current()->spec;
  // Results of a size that the layer no longer has are of no use, nor is what nobody has sent yet.
  if (const auto batch = newest_forward_.lock(); batch != nullptr) {
    if (batch->first.size() != spec.channels || batch->second.size() != spec.channels) return std::nullopt;
    return SummaryOf(batch->first, batch->second);
  }
  const RunningStatisticsView running = running_.View(spec);
  if (running.updates == 0) return std::nullopt;
  return SummaryOf(running.mean, running.var);
}

LayerSummary Layer::Summary() const {
  LayerSummary summary;
  summary.spec = declarations_.current()->spec;
  summary.newest_sequence =
      history(summary.spec.kind == LayerKind::kSum ? Phase::kSum : Phase::kForward).newest_completed;
  summary.rounds_completed = completed_;
  summary.rounds_failed = failed_;
  summary.conflict = declarations_.conflict();
  if (summary.spec.kind == LayerKind::kBatchNorm) summary.channels = SummarizeChannels();
  return summary;
}

LayerView Layer::View() const {
  LayerView view;
  view.summary = Summary();
  const LayerSpec& spec = view.summary.spec;
  // Omit results of a size that the layer no longer has.
  if (auto batch = newest_forward_.lock(); batch != nullptr && batch->first.size() == spec.channels) {
    view.batch = std::move(batch);
  }
  view.running = running_.View(spec);
  return view;
}

}  // namespace syncbn::core
