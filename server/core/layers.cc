#include "server/core/layers.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "plumbing/check.h"
#include "server/core/error.h"

namespace syncbn::core {

Layers::Layers(const Limits& limits, MissingPolicy policy)
    : limits_(limits),
      budget_(policy == MissingPolicy::kWait ? limits.max_retained_bytes_waiting : limits.max_retained_bytes,
              std::max<size_t>(limits.min_retained_outcomes, 1), limits.max_awaited_bytes) {}

Layer* Layers::Find(absl::string_view name) { return const_cast<Layer*>(std::as_const(*this).Find(name)); }

const Layer* Layers::Find(absl::string_view name) const {
  const auto it = layers_.find(name);
  return it == layers_.end() ? nullptr : it->second.get();
}

Layer& Layers::Get(absl::string_view name) { return const_cast<Layer&>(std::as_const(*this).Get(name)); }

const Layer& Layers::Get(absl::string_view name) const {
  const Layer* const layer = Find(name);
  SYNCBN_CHECK(layer != nullptr, "layer \"", name, "\"");
  return *layer;
}

std::vector<RoundKey> Layers::NewestRounds() const {
  constexpr size_t kKeyBytes = 24;  // An encoded key, without the name.
  std::vector<RoundKey> newest;
  size_t bytes = 0;
  for (const auto& [name, layer] : layers_) {
    for (const Phase phase : {Phase::kForward, Phase::kBackward, Phase::kSum}) {
      const std::optional<uint64_t> sequence = layer->NewestCompleted(phase);
      if (!sequence.has_value()) continue;
      bytes += kKeyBytes + name.size();
      if (bytes > limits_.max_newest_rounds_bytes) return newest;
      newest.push_back({name, *sequence, phase});
    }
  }
  return newest;
}

std::vector<LayerSummary> Layers::Summaries() const {
  std::vector<LayerSummary> summaries;
  for (const auto& [name, layer] : layers_) summaries.push_back(layer->Summary());
  return summaries;
}

std::optional<Error> Layers::CheckSpecs(const std::vector<LayerSpec>& specs) const {
  if (specs.size() > limits_.max_layers) return LimitError(specs.size(), "layers", "max_layers", limits_.max_layers);
  absl::btree_set<absl::string_view> added;
  for (const LayerSpec& spec : specs) {
    if (auto error = CheckSpec(spec, limits_)) return error;
    if (!layers_.contains(spec.name)) added.insert(spec.name);
  }
  if (layers_.size() + added.size() <= limits_.max_layers) return std::nullopt;
  return LimitError(layers_.size() + added.size(), "layers", "max_layers", limits_.max_layers);
}

std::optional<Error> Layers::CheckSet(const Join& join) const {
  if (join.layers.empty() || !set_declared_by_.has_value()) return std::nullopt;
  LayerSetDifference sets;
  absl::btree_set<std::string> absent = set_;
  for (const LayerSpec& spec : join.layers) {
    absent.erase(spec.name);
    if (!set_.contains(spec.name)) {
      sets.added.push_back(spec.name);
      continue;
    }
    // A member that comes back may have declared the layer anew meanwhile.
    const Declarations& declarations = Get(spec.name).declarations();
    if (join.incarnation != 0 || declarations.Known(spec)) continue;
    const std::string difference = Difference(spec, declarations.current()->spec);
    if (difference.empty()) continue;
    sets.different.push_back(absl::StrCat("layer \"", spec.name, "\" has ", difference));
  }
  sets.absent.assign(absent.begin(), absent.end());
  if (sets.empty()) return std::nullopt;
  return LayerSetError(join.rank, *set_declared_by_, sets);
}

void Layers::FixSet(const Join& join) {
  if (join.layers.empty() || set_declared_by_.has_value()) return;
  set_declared_by_ = join.rank;
  for (const LayerSpec& spec : join.layers) set_.insert(spec.name);
}

Layer& Layers::FindOrAdd(const LayerSpec& spec) {
  auto it = layers_.find(spec.name);
  if (it == layers_.end()) {
    it = layers_.emplace(spec.name, std::make_unique<Layer>(spec, limits_, &budget_)).first;
    if (resumed_) it->second->ResumeFromNothing();
  }
  longest_result_ = std::max(longest_result_, LongestResult(spec));
  return *it->second;
}

Layer& Layers::Declare(Rank rank, const LayerSpec& spec, bool returning) {
  Layer& layer = FindOrAdd(spec);
  layer.Declare(rank, spec, returning);
  return layer;
}

void Layers::Resume(const std::vector<LayerState>& stored) {
  resumed_ = true;
  for (auto& [name, layer] : layers_) layer->ResumeFromNothing();
  for (const LayerState& state : stored) FindOrAdd(state.spec).Resume(state);
}

void Layers::Forget(Rank rank) {
  for (auto& [name, layer] : layers_) layer->Forget(rank);
}

void Layers::CheckInvariants() const {
  size_t records = 0;
  for (const auto& [name, layer] : layers_) {
    SYNCBN_CHECK(layer->name() == name, "layer \"", name, "\" is called \"", layer->name(), "\"");
    SYNCBN_CHECK(LongestResult(layer->declarations().current()->spec) <= longest_result_, "layer \"", name, "\"");
    records += layer->CheckInvariants();
  }
  SYNCBN_CHECK(layers_.size() <= limits_.max_layers, layers_.size());
  SYNCBN_CHECK(set_declared_by_.has_value() || set_.empty());
  for (const std::string& name : set_) SYNCBN_CHECK(layers_.contains(name), "layer \"", name, "\"");
  budget_.CheckInvariants(records);
}

}  // namespace syncbn::core
