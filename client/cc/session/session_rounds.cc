// The rounds of a session: how they begin, what goes into a frame, and what an outcome ends.

#include <algorithm>
#include <iterator>
#include <optional>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cc/errors.h"
#include "client/cc/session/chunks.h"
#include "client/cc/session/results.h"
#include "client/cc/session/session.h"
#include "plumbing/check.h"
#include "plumbing/utf8.h"
#include "vocabulary/bad_number.h"
#include "vocabulary/derived_name.h"

namespace syncbn::session {
namespace {

// Contributions beyond this many bytes go into another frame; masters take frames of 64 MiB by default.
constexpr size_t kFullFrameBytes = size_t{16} << 20;
// And beyond as many contributions; masters take 65536 by default.
constexpr size_t kFullFrameRounds = 16384;
// The time for which a worker is blocked before that is worth a frame of its own.
constexpr absl::Duration kSayBlockedAfter = absl::Milliseconds(20);
// The same where nothing has shown yet that one thread alone uses the worker: others may have yet to start.
constexpr absl::Duration kSayBlockedIfUnsureAfter = absl::Milliseconds(200);

absl::Status CheckName(absl::string_view name) {
  if (!name.empty() && name.size() <= kMostNameBytes) return CheckUtf8("a layer's name", name);
  return absl::InvalidArgumentError(
      absl::StrCat("a layer's name has 1 to ", kMostNameBytes, " bytes; this one has ", name.size()));
}

absl::Status CheckSequence(uint64_t sequence) {
  if (sequence <= kGreatestSequence) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("the sequence to resume at is ", sequence, ", the greatest is ", kGreatestSequence));
}

absl::Status CheckLayer(const LayerOptions& layer) {
  if (absl::Status status = CheckName(layer.name); !status.ok()) return status;
  const auto fault = FindBadNumber(layer);
  return fault.has_value() ? absl::InvalidArgumentError(*fault) : absl::OkStatus();
}

absl::Status PendingAlready(const RoundKey& key) {
  return absl::AlreadyExistsError(
      absl::StrCat("a round of layer \"", key.layer, "\" with sequence ", key.sequence, " is pending already"));
}

}  // namespace

// ---- Beginning ------------------------------------------------------------------------------------------------------

absl::Status Session::Declare(const LayerOptions& layer) {
  if (absl::Status status = CheckLayer(layer); !status.ok()) return status;
  declarations_.Declare(layer);
  blocked_on_ = nullptr;
  return absl::OkStatus();
}

std::shared_ptr<const LayerOptions> Session::FindLayer(absl::string_view name) const {
  const KnownLayer* const layer = declarations_.Find(name);
  return layer == nullptr ? nullptr : OptionsOf(layer->now);
}

absl::Status Session::ResumeAt(uint64_t sequence) {
  if (absl::Status status = CheckSequence(sequence); !status.ok()) return status;
  first_sequence_ = sequence;
  next_sequence_.clear();
  return absl::OkStatus();
}

absl::Status Session::ResumeLayerAt(const RoundKey& key) {
  if (absl::Status status = CheckName(key.layer); !status.ok()) return status;
  if (absl::Status status = CheckSequence(key.sequence); !status.ok()) return status;
  NextSequences(key.layer)[static_cast<size_t>(key.phase) - 1] = key.sequence;
  return absl::OkStatus();
}

void Session::ResumeAfter(const absl::Status& error) {
  const std::optional<uint64_t> sequence = DetailsOf(error).resume_at;
  if (!sequence.has_value() || *sequence > kGreatestSequence) return;
  first_sequence_ = std::max(first_sequence_, *sequence);
  for (auto& [layer, next] : next_sequence_) {
    for (uint64_t& of_phase : next) of_phase = std::max(of_phase, *sequence);
  }
}

std::vector<RoundKey> Session::NextRounds() const {
  std::vector<RoundKey> rounds{{"", first_sequence_, Phase::kForward}};
  for (const auto& [layer, next] : next_sequence_) {
    for (const Phase phase : {Phase::kForward, Phase::kBackward, Phase::kSum}) {
      rounds.push_back({layer, next[static_cast<size_t>(phase) - 1], phase});
    }
  }
  std::sort(rounds.begin(), rounds.end(), [](const RoundKey& a, const RoundKey& b) {
    return std::tie(a.layer, a.phase) < std::tie(b.layer, b.phase);
  });
  return rounds;
}

std::array<uint64_t, 3>& Session::NextSequences(const std::string& layer) {
  const auto [found, inserted] = next_sequence_.try_emplace(layer);
  if (inserted) found->second.fill(first_sequence_);
  return found->second;
}

absl::StatusOr<uint64_t> Session::ResolveSequence(const std::string& layer, Phase phase, uint64_t sequence) {
  uint64_t& next = NextSequences(layer)[static_cast<size_t>(phase) - 1];
  if (sequence == kNextSequence) {
    if (next > kGreatestSequence) {
      return absl::OutOfRangeError(
          absl::StrCat("layer \"", layer, "\" has used sequence ", kGreatestSequence, ", and there is none after it"));
    }
    return next++;
  }
  next = std::max(next, sequence + 1);
  return sequence;
}

absl::Status Session::Begin(RoundKey key, size_t length, MakeContribution make) {
  SYNCBN_CHECK(state_ != State::kEnded, "a round begins in a session that has ended");
  if (key.phase == Phase::kSum) return BeginSum(std::move(key), length, make);
  KnownLayer* const layer = declarations_.Find(key.layer);
  if (layer == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat("layer \"", key.layer, "\" has not been declared"));
  }
  const auto sequence = ResolveSequence(key.layer, key.phase, key.sequence);
  if (!sequence.ok()) return sequence.status();
  key.sequence = *sequence;
  if (pending_.contains(key)) return PendingAlready(key);
  const LayerOptions& options = layer->now->options;
  const bool backward = key.phase == Phase::kBackward;
  ContributionRef contribution = make(std::move(key), 0, length);
  contribution->finite_ = options.numeric_policy == NumericPolicy::kRefuse;
  if (!backward) contribution->declared_ = layer->now;
  // A backward round is of its forward round's size, and the layer may have another by now.
  Enqueue(std::move(contribution), *layer, backward ? length : options.channels);
  return absl::OkStatus();
}

absl::Status Session::BeginSum(RoundKey key, size_t length, MakeContribution make) {
  if (length == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("vector \"", key.layer, "\" is empty; a sum has at least 1 element"));
  }
  const size_t chunk = ChunkElements(length, options_.chunks);
  const bool several = length > chunk;
  if (absl::Status named = CheckName(key.layer); !named.ok()) return named;
  const auto sequence = ResolveSequence(key.layer, key.phase, key.sequence);
  if (!sequence.ok()) return sequence.status();
  key.sequence = *sequence;
  absl::InlinedVector<RoundKey, 1> keys;
  for (size_t begin = 0; begin < length; begin += chunk) {
    keys.push_back(key);
    if (several) keys.back().layer = DerivedName(key.layer, absl::StrCat("#", keys.size() - 1));
    if (pending_.contains(keys.back())) return PendingAlready(keys.back());
  }
  const auto siblings = several ? std::make_shared<size_t>(0) : nullptr;
  for (size_t i = 0; i < keys.size(); ++i) {
    const size_t begin = i * chunk;
    const size_t part = std::min(length - begin, chunk);
    LayerOptions options;
    const KnownLayer* const before = declarations_.Find(keys[i].layer);
    if (before != nullptr && before->now->options.kind == LayerKind::kSum) {
      options = before->now->options;  // Its policy is the caller's.
    } else {
      options.name = keys[i].layer;
      options.kind = LayerKind::kSum;
    }
    options.channels = static_cast<uint32_t>(part);
    KnownLayer& layer = declarations_.Declare(options);
    ContributionRef contribution = make(std::move(keys[i]), begin, part);
    contribution->declared_ = layer.now;
    contribution->siblings_under_way_ = siblings;
    Enqueue(std::move(contribution), layer, part);
  }
  return absl::OkStatus();
}

void Session::Enqueue(ContributionRef contribution, KnownLayer& layer, size_t length) {
  contribution->order_ = declarations_.NextOrder();
  contribution->length_ = length;
  contribution->layer_ = &layer;
  contribution->left_ranks_ = left_ranks_;
  const bool inserted = pending_.insert(contribution).second;
  SYNCBN_CHECK(inserted, "round ", contribution->key().sequence, " of layer ", contribution->key().layer);
  unsent_.push_back(std::move(contribution));
  blocked_on_ = nullptr;
}

// ---- Sending --------------------------------------------------------------------------------------------------------

Effects Session::Send(absl::Time now) {
  if (state_ != State::kJoined || writing_) return {};
  Effects effects;
  ClientFrame& frame = std::get<Write>(effects.emplace_back(std::in_place_type<Write>)).frame;
  FillFrame(now, &frame);
  if (catching_up_ && to_resend_ == 0) {
    catching_up_ = false;
    frame.caught_up = true;
    frame.forgotten = log_.Forgotten();
  }
  const bool news = !frame.layers.empty() || !frame.contributions.empty() || frame.caught_up || MustConfirm();
  // Any frame takes back what an earlier one has told the master, so one with news says it again.
  const bool say_blocked = told_ == blocked_on_ ? news : (blocked_surely_ && news) || now >= say_blocked_at_;
  if (say_blocked && IsBlocked()) frame.blocked_on = blocked_on_;
  if (unsent_.empty() && declarations_.all_said() && leaving_.has_value() && !leave_sent_) {
    frame.leave = leaving_;
    leave_sent_ = true;
  }
  const bool retract = std::exchange(retract_, false);
  if (!news && frame.blocked_on == nullptr && !frame.leave.has_value() && !retract) return {};
  if (membership_read_ != membership_said_) frame.membership_read = membership_said_ = membership_read_;
  writing_ = true;
  told_ = frame.blocked_on;
  return effects;
}

void Session::FillFrame(absl::Time now, ClientFrame* frame) {
  std::vector<ContributionRef> held_back;
  const std::vector<uint32_t>* left_ranks = nullptr;
  size_t taken = 0;
  for (size_t bytes = 0; taken < unsent_.size() && bytes < kFullFrameBytes && taken < kFullFrameRounds; ++taken) {
    ContributionRef& contribution = unsent_[taken];
    if (contribution->ended_ && !contribution->repeated_) {
      NoteResent(*contribution);
      continue;
    }
    if (MustWait(*contribution)) {
      held_back.push_back(std::move(contribution));
      continue;
    }
    // The master takes a frame's word about ranks that have left for all of its contributions.
    const bool tells = catching_up_ && !contribution->ended_;
    if (tells && left_ranks != nullptr && *contribution->left_ranks_ != *left_ranks) break;
    if (!declarations_.AddBefore(*contribution, frame)) break;
    if (tells) left_ranks = contribution->left_ranks_.get();
    NoteResent(*contribution);
    if (!contribution->ended_) {
      SetUnderWay(*contribution, true);
      ExpectAnswer(*contribution, now);
    }
    bytes += contribution->bytes();
    frame->contributions.push_back(std::move(contribution));
  }
  if (left_ranks != nullptr) frame->left_ranks = *left_ranks;
  if (taken == unsent_.size()) declarations_.AddRest(frame);
  unsent_.erase(unsent_.begin(), unsent_.begin() + static_cast<ptrdiff_t>(taken));
  unsent_.insert(unsent_.begin(), std::make_move_iterator(held_back.begin()), std::make_move_iterator(held_back.end()));
}

void Session::NoteResent(Contribution& contribution) {
  if (std::exchange(contribution.resent_, false)) --to_resend_;
}

bool Session::MustWait(const Contribution& contribution) const {
  // Chunks that were under way on another stream were within the limit there.
  if (contribution.resent_ || contribution.ended_ || leaving_.has_value()) return false;
  if (contribution.siblings_under_way_ == nullptr || *contribution.siblings_under_way_ == 0) return false;
  return under_way_ >= kLeastChunksUnderWay && elements_under_way_ >= options_.chunks.under_way;
}

void Session::SetUnderWay(Contribution& contribution, bool under_way) {
  if (contribution.siblings_under_way_ == nullptr || contribution.under_way_ == under_way) return;
  contribution.under_way_ = under_way;
  if (under_way) {
    ++*contribution.siblings_under_way_;
    ++under_way_;
    elements_under_way_ += contribution.length_;
  } else {
    --*contribution.siblings_under_way_;
    --under_way_;
    elements_under_way_ -= contribution.length_;
  }
}

std::vector<Session::ContributionRef> Session::PendingInOrder() const {
  std::vector<ContributionRef> pending(pending_.begin(), pending_.end());
  std::sort(pending.begin(), pending.end(), [](const auto& a, const auto& b) { return a->order_ < b->order_; });
  return pending;
}

std::vector<Session::ContributionRef> Session::HeldInOrder(std::optional<uint64_t> memory) const {
  std::vector<ContributionRef> held(pending_.begin(), pending_.end());
  log_.ForEach([&](const ContributionRef& contribution) {
    if (contribution->answered_by_ != memory) held.push_back(contribution);
  });
  std::sort(held.begin(), held.end(), [](const auto& a, const auto& b) { return a->order_ < b->order_; });
  return held;
}

// ---- Blocked --------------------------------------------------------------------------------------------------------

void Session::Blocked(const ContributionPtr& contribution, bool sure, absl::Time now) {
  if (blocked_on_ == contribution) return;
  blocked_on_ = contribution;
  blocked_surely_ = sure;
  say_blocked_at_ = now + (sure ? kSayBlockedAfter : kSayBlockedIfUnsureAfter);
}

void Session::Unblocked(bool retract) {
  if (retract && told_ != nullptr && !told_->ended_) retract_ = true;
  blocked_on_ = nullptr;
}

bool Session::IsBlocked() const {
  return blocked_on_ != nullptr && blocked_on_->sent_ && !blocked_on_->ended_ && unsent_.empty();
}

// ---- Outcomes -------------------------------------------------------------------------------------------------------

void Session::OnOutcome(Outcome outcome, Effects* effects) {
  const auto found = pending_.find(outcome.key);
  if (found == pending_.end()) return;  // A replay that nobody waits for.
  ContributionRef contribution = std::move(pending_.extract(found).value());
  attempts_.Answered();
  SetUnderWay(*contribution, false);
  contribution->ended_ = true;
  absl::Status status = outcome.status;
  if (status.ok()) {
    status =
        CheckResult(contribution->key(), outcome.payload, contribution->length_, contribution->finite_, outcome.result);
  }
  had_outcome_ = had_outcome_ || !outcome.refused;
  if (status == outcome.status && !outcome.refused && memory_ != 0) Keep(contribution, outcome);
  effects->push_back(Complete{std::move(contribution), std::move(status), std::move(outcome.result)});
}

void Session::Keep(ContributionRef contribution, const Outcome& outcome) {
  const RoundKey& key = contribution->key();
  const KnownLayer* const layer = contribution->layer_;
  if (key.phase == Phase::kBackward) log_.EndAwaiting(layer, key.sequence);
  EndedRound& end = contribution->end_;
  end.error = outcome.status;
  if (outcome.status.ok()) {
    end.missing_ranks = outcome.result.missing_ranks;
    end.digest = outcome.digest;
  }
  if (outcome.status.ok() && key.phase == Phase::kForward) {
    end.count = outcome.result.count;
    end.backward_required = outcome.result.backward_required;
    end.abstaining_ranks = outcome.abstaining_ranks;
  }
  contribution->answered_by_ = memory_;
  // A backward round that this worker has no part in does not end for it.
  const auto has = [this](const std::vector<uint32_t>& ranks) {
    return std::find(ranks.begin(), ranks.end(), options_.rank) != ranks.end();
  };
  const bool awaited = end.backward_required && !has(end.abstaining_ranks) && !has(end.missing_ranks);
  log_.Add(layer, std::move(contribution), awaited);
}

}  // namespace syncbn::session
