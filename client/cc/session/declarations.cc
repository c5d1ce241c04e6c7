#include "client/cc/session/declarations.h"

#include <algorithm>

namespace syncbn::session {

KnownLayer& Declarations::Declare(const LayerOptions& layer) {
  KnownLayer& known = layers_[layer.name];
  if (known.now != nullptr && known.now->options == layer) return known;
  known.now = std::make_shared<const DeclaredLayer>(DeclaredLayer{layer, NextOrder()});
  unsaid_.push_back(known.now);
  return known;
}

KnownLayer* Declarations::Find(absl::string_view name) {
  const auto it = layers_.find(name);
  return it == layers_.end() ? nullptr : &it->second;
}

const KnownLayer* Declarations::Find(absl::string_view name) const {
  const auto it = layers_.find(name);
  return it == layers_.end() ? nullptr : &it->second;
}

void Declarations::BeginStream(const std::vector<std::shared_ptr<Contribution>>& pending,
                               std::vector<std::shared_ptr<const LayerOptions>>* known) {
  for (auto& [name, layer] : layers_) layer.said = layer.now;
  for (const std::shared_ptr<Contribution>& contribution : pending) {
    const DeclaredLayerPtr& declared = contribution->declared_;
    if (declared != nullptr && declared->order < contribution->layer_->said->order) {
      contribution->layer_->said = declared;
    }
  }
  unsaid_.clear();
  for (const auto& [name, layer] : layers_) {
    if (layer.said != layer.now) unsaid_.push_back(layer.now);
    known->push_back(OptionsOf(layer.said));
  }
  std::sort(unsaid_.begin(), unsaid_.end(), [](const auto& a, const auto& b) { return a->order < b->order; });
}

bool Declarations::AddBefore(const Contribution& contribution, ClientFrame* frame) {
  if (!AddBefore(contribution.order_, frame)) return false;
  const DeclaredLayerPtr& declared = contribution.declared_;
  return declared == nullptr || contribution.layer_->said == declared || Add(declared, frame);
}

void Declarations::AddRest(ClientFrame* frame) { AddBefore(UINT64_MAX, frame); }

bool Declarations::AddBefore(uint64_t order, ClientFrame* frame) {
  while (!unsaid_.empty() && unsaid_.front()->order < order) {
    if (!Add(unsaid_.front(), frame)) return false;
    unsaid_.pop_front();
  }
  return true;
}

bool Declarations::Add(const DeclaredLayerPtr& declared, ClientFrame* frame) {
  const std::string& name = declared->options.name;
  for (const ContributionPtr& contribution : frame->contributions) {
    if (contribution->key().layer == name) return false;
  }
  frame->layers.push_back(OptionsOf(declared));
  layers_.find(name)->second.said = declared;
  return true;
}

}  // namespace syncbn::session
