#include "server/core/declarations.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "plumbing/check.h"
#include "server/core/error.h"

namespace syncbn::core {
namespace {

// Replaced declarations that are remembered: a slower member may still make one of them for the first time.
constexpr size_t kPast = 16;

DeclarationPtr Make(const LayerSpec& spec) { return std::make_shared<const Declaration>(Declaration{spec}); }

}  // namespace

std::string Difference(const LayerSpec& worker, const LayerSpec& reference) {
  std::string text;
  for (const FieldDifference& field : Differences(kLayerSpecFields, worker, reference)) {
    absl::StrAppend(&text, text.empty() ? "" : ", ", field.name, " ", field.mine, " instead of ", field.theirs);
  }
  return text;
}

Declarations::Declarations(const LayerSpec& spec) : current_(Make(spec)) {}

std::vector<Declarations::Side>::iterator Declarations::SideOf(Rank rank) {
  if (!ranks_.contains(rank)) return sides_.end();
  return std::find_if(sides_.begin(), sides_.end(), [rank](const Side& side) { return side.ranks.contains(rank); });
}

DeclarationPtr Declarations::Of(Rank rank) const {
  if (!ranks_.contains(rank)) return nullptr;
  for (const Side& side : sides_) {
    if (side.ranks.contains(rank)) return side.declaration;
  }
  return nullptr;
}

bool Declarations::Known(const LayerSpec& spec) const {
  const auto same = [&spec](const DeclarationPtr& said) { return Agree(kLayerSpecFields, spec, said->spec); };
  return std::any_of(sides_.begin(), sides_.end(), [&](const Side& side) { return same(side.declaration); }) ||
         std::any_of(past_.begin(), past_.end(), same);
}

void Declarations::Declare(Rank rank, const LayerSpec& spec, bool returning) {
  agreed_ = agreed_ || returning;
  const bool disputed = !agreed_ && !ranks_.contains(rank) && !sides_.empty() && !Known(spec);
  const auto says_so = [&](const Side& side) { return Agree(kLayerSpecFields, spec, side.declaration->spec); };
  const auto before = SideOf(rank);
  if (before == sides_.end() || !says_so(*before)) {
    RemoveFromSide(rank, /*remember=*/true);
    auto side = std::find_if(sides_.begin(), sides_.end(), says_so);
    if (side == sides_.end()) side = sides_.insert(side, Side{Make(spec), disputed, RankSet(), 0});
    side->ranks.insert(rank);
    ++side->size;
    ranks_.insert(rank);
  }
  AdoptMomentum(*SideOf(rank), spec);
  AdoptUnanimous();
}

void Declarations::NoteAgreement() {
  agreed_ = true;
  for (Side& side : sides_) side.disputed = false;
}

void Declarations::AdoptMomentum(Side& side, const LayerSpec& spec) {
  if (side.declaration->spec.momentum == spec.momentum) return;
  DeclarationPtr renewed = Make(spec);
  if (current_ == side.declaration) current_ = renewed;
  side.declaration = std::move(renewed);
}

void Declarations::RemoveFromSide(Rank rank, bool remember) {
  const auto side = SideOf(rank);
  if (side == sides_.end()) return;
  side->ranks.erase(rank);
  ranks_.erase(rank);
  if (--side->size != 0) return;
  const DeclarationPtr abandoned = std::move(side->declaration);
  sides_.erase(side);
  if (!remember || Known(abandoned->spec)) return;
  past_.push_back(abandoned);
  if (past_.size() > kPast) past_.pop_front();
}

void Declarations::Forget(Rank rank) {
  if (!ranks_.contains(rank)) return;
  RemoveFromSide(rank, /*remember=*/false);
  AdoptUnanimous();
}

void Declarations::AdoptUnanimous() {
  if (sides_.size() != 1) return;
  sides_.front().disputed = false;
  current_ = sides_.front().declaration;
}

void Declarations::CheckInvariants() const {
  size_t ranks = 0;
  for (const Side& side : sides_) {
    SYNCBN_CHECK(side.size == side.ranks.size() && side.size != 0, side.size, ", not ", side.ranks.size());
    side.ranks.ForEach([&](Rank rank) { SYNCBN_CHECK(ranks_.contains(rank), "rank ", rank, " is not counted"); });
    ranks += side.size;
  }
  // Ranks that are all counted are as many as are counted only if none is on two sides.
  SYNCBN_CHECK(ranks_.size() == ranks, ranks_.size(), ", not ", ranks);
  SYNCBN_CHECK(current_ != nullptr && past_.size() <= kPast);
  SYNCBN_CHECK(sides_.size() != 1 || (!sides_[0].disputed && current_ == sides_[0].declaration));
}

std::optional<Error> Declarations::conflict() const {
  if (std::none_of(sides_.begin(), sides_.end(), [](const Side& side) { return side.disputed; })) return std::nullopt;
  const LayerSpec* reference = nullptr;
  std::vector<Rank> ranks;
  for (const Side& side : sides_) {
    if (!side.disputed && reference == nullptr) reference = &side.declaration->spec;
    if (!side.disputed) continue;
    for (const Rank rank : side.ranks.ToVector()) ranks.push_back(rank);
  }
  if (reference == nullptr) reference = &sides_.front().declaration->spec;
  std::sort(ranks.begin(), ranks.end());
  std::string text = absl::StrCat("workers disagree about layer \"", reference->name, "\": ");
  constexpr size_t kShown = 4;
  const char* separator = "";
  for (size_t i = 0; i < ranks.size() && i < kShown; ++i) {
    const std::string difference = Difference(Of(ranks[i])->spec, *reference);
    if (difference.empty()) continue;
    absl::StrAppend(&text, std::exchange(separator, "; "), "rank ", ranks[i], " has ", difference);
  }
  if (ranks.size() > kShown) absl::StrAppend(&text, "; and ", ranks.size() - kShown, " more");
  return MakeError(absl::StatusCode::kFailedPrecondition, kLayerSpecMismatch, std::move(text), std::move(ranks));
}

}  // namespace syncbn::core
