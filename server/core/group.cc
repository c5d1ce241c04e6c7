#include "server/core/group.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "server/core/error.h"

namespace syncbn::core {
namespace {

Error Malformed(std::string message) {
  return MakeError(absl::StatusCode::kInvalidArgument, kMalformedFrame, std::move(message));
}

// At most `kShown` names, quoted.
std::string NameList(const std::vector<std::string>& names) {
  constexpr size_t kShown = 5;
  std::string text;
  for (size_t i = 0; i < names.size() && i < kShown; ++i) {
    absl::StrAppend(&text, i == 0 ? "" : ", ", "\"", names[i], "\"");
  }
  if (names.size() > kShown) absl::StrAppend(&text, " and ", names.size() - kShown, " more");
  return text;
}

}  // namespace

std::optional<Error> FillConfig(const GroupConfig& config, uint32_t world_size, const Limits& limits,
                                GroupConfig& filled) {
  filled = config;
  filled.round_timeout = config.round_timeout.value_or(limits.default_round_timeout);
  filled.rejoin_grace = config.rejoin_grace.value_or(limits.default_rejoin_grace);
  if (*filled.round_timeout < limits.min_round_timeout || *filled.round_timeout > limits.max_round_timeout) {
    return Malformed(absl::StrCat("round_timeout ", absl::FormatDuration(*filled.round_timeout), " is not within ",
                                  absl::FormatDuration(limits.min_round_timeout), " and ",
                                  absl::FormatDuration(limits.max_round_timeout)));
  }
  if (*filled.rejoin_grace < absl::ZeroDuration() || *filled.rejoin_grace > limits.max_rejoin_grace) {
    return Malformed(absl::StrCat("rejoin_grace ", absl::FormatDuration(*filled.rejoin_grace), " is not within 0 and ",
                                  absl::FormatDuration(limits.max_rejoin_grace)));
  }
  if (config.missing_policy == MissingPolicy::kProceed) {
    if (config.min_workers < 1 || config.min_workers > world_size) {
      return Malformed(
          absl::StrCat("min_workers = ", config.min_workers, " is not within 1 and the world size of ", world_size));
    }
  } else {
    filled.min_workers = 0;
  }
  return std::nullopt;
}

Group::Group(const Join& join, const GroupConfig& filled, uint64_t run_id, const Limits& limits, absl::Time now)
    : id_(join.id),
      generation_(join.generation),
      run_id_(run_id),
      incarnation_floor_(join.run_id == 0 ? 0 : static_cast<uint64_t>(std::max<int64_t>(absl::ToUnixMicros(now), 0))),
      world_size_(join.world_size),
      config_(filled),
      limits_(limits),
      members_(join.world_size),
      linger_until_(now + limits.group_linger),
      budget_(limits.max_retained_bytes, std::max<size_t>(limits.min_retained_outcomes, 1), limits.max_awaited_bytes) {}

// ---- Joining --------------------------------------------------------------------------------------------------------

bool Group::OnJoin(StreamId stream, const Join& join, const GroupConfig& filled, uint32_t protocol_version,
                   absl::Time now, Effects& effects) {
  BeginTurn();
  auto error = CheckJoin(join, filled);
  if (!error.has_value()) error = CheckLayers(join.layers);
  if (error.has_value()) {
    effects.push_back(CloseStream{stream, std::move(error)});
    return false;
  }
  if (error = CheckLayerSet(join); error.has_value()) {
    NoteRefused(join, *error, now, effects);
    effects.push_back(CloseStream{stream, std::move(error)});
    return false;
  }
  TakeSeat(stream, join, now, effects);
  const uint64_t incarnation = members_[join.rank].incarnation;
  effects.push_back(SendJoined{stream, protocol_version, incarnation, run_id_, config_, CurrentMembership()});
  DeclareLayers(join.rank, join.layers, join.incarnation != 0, now, effects);
  if (!join.layers.empty() && !set_declared_by_.has_value()) {
    set_declared_by_ = join.rank;
    for (const LayerSpec& spec : join.layers) set_.insert(spec.name);
  }
  if (present_ == world_size_) AnnounceMembership(join.rank, effects);
  return true;
}

void Group::NoteRefused(const Join& join, const Error& error, absl::Time now, Effects& effects) {
  const MemberState state = members_[join.rank].state;
  // Who sits there, or has left, has said what it had to say; a stranger's word is none against it.
  const bool vacant = state == MemberState::kAbsent || state == MemberState::kLost;
  // Those who know these layers otherwise learn of it now, not when their rounds time out.
  for (const LayerSpec& spec : join.layers) {
    const auto it = layers_.find(spec.name);
    if (!vacant || it == layers_.end() || it->second->declarations().Known(spec)) continue;
    it->second->Forget(join.rank);  // Its predecessor's word, if there is one.
    Declare(join.rank, spec, /*returning=*/false, *it->second, now, effects);
  }
  if (std::vector<StreamId> streams = Streams(); !streams.empty()) {
    effects.push_back(SendLayerError{std::move(streams), "", error});
  }
  if (!vacant) return;
  refused_.insert_or_assign(join.rank, error);
  SettleAll(now, effects);
}

std::optional<Error> Group::CheckJoin(const Join& join, const GroupConfig& filled) const {
  const auto mismatch = [&](absl::string_view what, const auto& mine, const auto& theirs) {
    return MakeError(absl::StatusCode::kFailedPrecondition, kGroupConfigMismatch,
                     absl::StrCat("rank ", join.rank, " joins with ", what, " ", mine, ", but group \"", id_.group,
                                  "\" of job \"", id_.job, "\" has ", theirs));
  };
  if (join.run_id != 0 && join.run_id != run_id_) {
    return MakeError(absl::StatusCode::kFailedPrecondition, kRunSuperseded,
                     absl::StrCat("rank ", join.rank, " reconnects to run ", join.run_id, " of group \"", id_.group,
                                  "\", which is over; the run is now ", run_id_));
  }
  if (join.world_size != world_size_) return mismatch("world_size", join.world_size, world_size_);
  if (filled.missing_policy != config_.missing_policy) {
    return mismatch("missing_policy", Name(filled.missing_policy), Name(config_.missing_policy));
  }
  if (filled.min_workers != config_.min_workers)
    return mismatch("min_workers", filled.min_workers, config_.min_workers);
  if (*filled.round_timeout != *config_.round_timeout) {
    return mismatch("round_timeout", absl::FormatDuration(*filled.round_timeout),
                    absl::FormatDuration(*config_.round_timeout));
  }
  if (*filled.rejoin_grace != *config_.rejoin_grace) {
    return mismatch("rejoin_grace", absl::FormatDuration(*filled.rejoin_grace),
                    absl::FormatDuration(*config_.rejoin_grace));
  }
  const MemberRecord& member = members_[join.rank];
  if (join.incarnation != 0 && join.incarnation < member.incarnation) {
    return MakeError(absl::StatusCode::kAborted, kFenced,
                     absl::StrCat("rank ", join.rank, " has restarted: incarnation ", join.incarnation,
                                  " is fenced by incarnation ", member.incarnation),
                     {join.rank});
  }
  return CheckSeat(join);
}

std::optional<Error> Group::CheckSeat(const Join& join) const {
  const MemberRecord& member = members_[join.rank];
  // The same incarnation has come back: whatever its old stream looks like, nobody else is at the other end.
  if (join.incarnation != 0 && join.incarnation == member.incarnation) return std::nullopt;
  if (member.state == MemberState::kPresent) {
    const std::string& holder = member.description;
    return MakeError(absl::StatusCode::kAlreadyExists, kRankTaken,
                     absl::StrCat("rank ", join.rank, " of group \"", id_.group, "\" of job \"", id_.job,
                                  "\" is taken by a worker that is connected (incarnation ", member.incarnation,
                                  holder.empty() ? "" : ", ", holder, "); a job of its own needs a name of its own, ",
                                  "and a restart of the whole group a greater generation"),
                     {join.rank});
  }
  // This master knows every incarnation that it has given; an earlier master of the run may have given others.
  if (incarnation_floor_ != 0 || join.incarnation <= member.incarnation) return std::nullopt;
  return Malformed(absl::StrCat("incarnation ", join.incarnation, " of rank ", join.rank,
                                " was never given; the greatest so far is ", member.incarnation));
}

std::optional<Error> Group::CheckLayerSet(const Join& join) const {
  if (join.layers.empty() || !set_declared_by_.has_value()) return std::nullopt;
  std::vector<std::string> added;
  absl::btree_set<std::string> absent = set_;
  std::string text;
  constexpr size_t kShown = 5;
  size_t different = 0;
  for (const LayerSpec& spec : join.layers) {
    absent.erase(spec.name);
    if (!set_.contains(spec.name)) {
      added.push_back(spec.name);
      continue;
    }
    // A member that comes back may have declared it anew meanwhile.
    const Declarations& declarations = layers_.at(spec.name)->declarations();
    if (join.incarnation != 0 || declarations.Known(spec)) continue;
    const std::string difference = Difference(spec, declarations.current()->spec);
    if (difference.empty() || ++different > kShown) continue;
    absl::StrAppend(&text, "; layer \"", spec.name, "\" has ", difference);
  }
  if (different > kShown) absl::StrAppend(&text, "; and ", different - kShown, " more differ");
  if (!added.empty()) absl::StrAppend(&text, "; it alone has ", NameList(added));
  if (!absent.empty()) absl::StrAppend(&text, "; it lacks ", NameList({absent.begin(), absent.end()}));
  if (text.empty()) return std::nullopt;
  return MakeError(absl::StatusCode::kFailedPrecondition, kLayerSetMismatch,
                   absl::StrCat("rank ", join.rank, " declares other layers than rank ", *set_declared_by_, text),
                   {join.rank});
}

void Group::TakeSeat(StreamId stream, const Join& join, absl::Time now, Effects& effects) {
  MemberRecord& member = members_[join.rank];
  const bool reborn = join.incarnation == 0 || join.incarnation > member.incarnation;
  const uint64_t incarnation =
      join.incarnation != 0 ? join.incarnation : std::max(member.incarnation, incarnation_floor_) + 1;
  if (member.state == MemberState::kPresent) {
    effects.push_back(CloseStream{member.stream, MakeError(absl::StatusCode::kAborted, kFenced,
                                                           absl::StrCat("incarnation ", incarnation, " of rank ",
                                                                        join.rank, " has joined on another stream"),
                                                           {join.rank})});
  }
  // The first that this master sees of an incarnation that an earlier one gave.
  if (join.incarnation != member.incarnation) member.resuming = join.incarnation != 0;
  const bool had_contributed = member.has_contributed;
  Vacate(join.rank);
  member.state = MemberState::kPresent;
  member.stream = stream;
  member.incarnation = incarnation;
  member.description = join.description;
  member.joined_at = now;
  ranks_[stream] = join.rank;
  ++present_;
  linger_until_ = absl::InfiniteFuture();
  refused_.erase(join.rank);
  if (!reborn) return;
  for (auto& [name, layer] : layers_) layer->Forget(join.rank);
  member.has_contributed = false;
  if (!had_contributed || config_.missing_policy == MissingPolicy::kProceed) return;
  // Its predecessor is fenced, so whoever waits for it waits in vain.
  for (auto round = pending_.begin(); round != pending_.end();) {
    const auto next = std::next(round);
    const std::vector<Rank> missing = MissingRanks(round->first, round->second);
    if (std::binary_search(missing.begin(), missing.end(), join.rank)) {
      Fail(round,
           MakeError(
               absl::StatusCode::kUnavailable, kWorkerLost,
               absl::StrCat("rank ", join.rank, " restarted before it contributed to the ", Describe(round->first)),
               {join.rank}),
           now, effects);
    }
    round = next;
  }
}

void Group::Vacate(Rank rank) {
  MemberRecord& member = members_[rank];
  Unblock(rank);
  switch (member.state) {
    case MemberState::kPresent:
      ranks_.erase(member.stream);
      --present_;
      lagging_ -= std::exchange(member.lags, false) ? 1 : 0;
      break;
    case MemberState::kLost:
      graces_.erase({member.grace_until, rank});
      if (member.given_up) --given_up_;
      member.given_up = false;
      break;
    case MemberState::kLeft:
      --left_;
      break;
    case MemberState::kAbsent:
      break;
  }
}

// ---- Frames and losses ----------------------------------------------------------------------------------------------

void Group::OnFrame(StreamId stream, const FrameReceived& frame, absl::Time now, Effects& effects) {
  const auto it = ranks_.find(stream);
  if (it == ranks_.end()) return;
  const Rank rank = it->second;
  BeginTurn();
  Unblock(rank);
  auto error = CheckRounds(frame);
  if (!error.has_value()) error = CheckLayers(frame.layers);
  if (error.has_value()) {
    effects.push_back(CloseStream{stream, std::move(error)});
    OnStreamClosed(stream, now, effects);
    return;
  }
  DeclareLayers(rank, frame.layers, frame.join.has_value() && frame.join->incarnation != 0, now, effects);
  for (const Contribution& contribution : frame.contributions) OnContribution(rank, contribution, now, effects);
  Block(rank, frame.blocked_on);
  if (frame.leave.has_value()) {
    Leave(rank, now, effects);
    effects.push_back(CloseStream{stream, std::nullopt});
  }
  FindDeadlock(now, effects);
}

void Group::OnStreamClosed(StreamId stream, absl::Time now, Effects& effects) {
  const auto it = ranks_.find(stream);
  if (it == ranks_.end()) return;
  const Rank rank = it->second;
  BeginTurn();
  Vacate(rank);
  MemberRecord& member = members_[rank];
  member.state = MemberState::kLost;
  member.grace_until = now + *config_.rejoin_grace;
  graces_.insert({member.grace_until, rank});
  if (present_ == 0) linger_until_ = now + limits_.group_linger;
  AnnounceMembership(std::nullopt, effects);
  OnTimePassed(now, effects);  // A grace of 0 is over already.
}

void Group::Leave(Rank rank, absl::Time now, Effects& effects) {
  Vacate(rank);
  members_[rank].state = MemberState::kLeft;
  ++left_;
  for (auto& [name, layer] : layers_) layer->Forget(rank);
  if (present_ == 0) linger_until_ = now + limits_.group_linger;
  AnnounceMembership(std::nullopt, effects);
  SettleAll(now, effects);
}

void Group::OnReaderLags(StreamId stream, bool lags) {
  const auto it = ranks_.find(stream);
  if (it == ranks_.end() || members_[it->second].lags == lags) return;
  members_[it->second].lags = lags;
  lagging_ += lags ? 1 : -1;
}

void Group::OnTimePassed(absl::Time now, Effects& effects) {
  BeginTurn();
  bool gave_up = false;
  while (!graces_.empty() && graces_.begin()->first <= now) {
    MemberRecord& member = members_[graces_.begin()->second];
    graces_.erase(graces_.begin());
    member.given_up = true;
    ++given_up_;
    gave_up = true;
  }
  if (gave_up) {
    SettleAll(now, effects);
  } else {
    SettleOn(now, effects);
  }
  while (turn_ != 0 && !alarms_.empty() && alarms_.begin()->first <= now && !(proceeds() && Held())) {
    const auto round = pending_.find(alarms_.begin()->second);
    if (round->second.deadline <= now) {
      Expire(round, now, effects);
    } else {
      TellLate(round, now, effects);
    }
  }
}

void Group::End(const Error& why, absl::Time now, Effects& effects) {
  while (!pending_.empty()) {
    const auto round = pending_.begin();
    Fail(round,
         MakeError(absl::StatusCode::kCancelled, kGroupEnded,
                   absl::StrCat("the group ended before the ", Describe(round->first), ": ", why.message)),
         now, effects);
  }
  for (const StreamId stream : Streams()) effects.push_back(CloseStream{stream, why});
  effects.push_back(GroupEnded{id_});
}

absl::Time Group::NextDeadline() const {
  absl::Time next = linger_until_;
  if (!graces_.empty()) next = std::min(next, graces_.begin()->first);
  if (!alarms_.empty() && !(proceeds() && Held())) next = std::min(next, alarms_.begin()->first);
  if (unsettled_.has_value() && !Held()) next = std::min(next, unsettled_->second);
  return next;
}

// ---- Layers ---------------------------------------------------------------------------------------------------------

std::optional<Error> Group::CheckRounds(const FrameReceived& frame) const {
  const size_t rounds = std::max(frame.contributions.size(), frame.blocked_on.size());
  if (rounds > limits_.max_rounds_in_frame) {
    return LimitError(rounds, "rounds in one frame", "max_rounds_in_frame", limits_.max_rounds_in_frame);
  }
  const auto malformed = [this](const RoundKey& key) -> std::optional<Error> {
    if (!key.layer.empty() && key.layer.size() <= limits_.max_name_bytes) return std::nullopt;
    return Malformed(
        absl::StrCat("a key names a layer by ", key.layer.size(), " bytes; a name has 1 to ", limits_.max_name_bytes));
  };
  for (const Contribution& contribution : frame.contributions) {
    if (auto error = malformed(contribution.key)) return error;
  }
  for (const RoundKey& key : frame.blocked_on) {
    if (auto error = malformed(key)) return error;
  }
  return std::nullopt;
}

std::optional<Error> Group::CheckLayers(const std::vector<LayerSpec>& specs) const {
  if (specs.size() > limits_.max_layers) return LimitError(specs.size(), "layers", "max_layers", limits_.max_layers);
  absl::btree_set<absl::string_view> added;
  for (const LayerSpec& spec : specs) {
    if (auto error = CheckSpec(spec, limits_)) return error;
    if (!layers_.contains(spec.name)) added.insert(spec.name);
  }
  if (layers_.size() + added.size() <= limits_.max_layers) return std::nullopt;
  return LimitError(layers_.size() + added.size(), "layers", "max_layers", limits_.max_layers);
}

void Group::DeclareLayers(Rank rank, const std::vector<LayerSpec>& specs, bool returning, absl::Time now,
                          Effects& effects) {
  for (const LayerSpec& spec : specs) {
    auto it = layers_.find(spec.name);
    if (it == layers_.end()) {
      it = layers_.emplace(spec.name, std::make_unique<Layer>(spec, limits_, &budget_)).first;
    }
    longest_result_ = std::max(longest_result_, LongestResult(spec));
    Declare(rank, spec, returning, *it->second, now, effects);
  }
}

void Group::Declare(Rank rank, const LayerSpec& spec, bool returning, Layer& layer, absl::Time now, Effects& effects) {
  layer.Declare(rank, spec, returning);
  if (auto conflict = layer.declarations().conflict()) {
    AnnounceConflict(layer, *conflict, effects);
    FailRounds(layer, *conflict, now, effects);
  }
}

void Group::AnnounceConflict(const Layer& layer, const Error& conflict, Effects& effects) const {
  std::vector<StreamId> streams;
  for (Rank rank = 0; rank < world_size_; ++rank) {
    if (members_[rank].state == MemberState::kPresent && layer.declarations().ranks().contains(rank)) {
      streams.push_back(members_[rank].stream);
    }
  }
  if (!streams.empty()) effects.push_back(SendLayerError{std::move(streams), layer.name(), conflict});
}

void Group::FailRounds(const Layer& layer, const Error& error, absl::Time now, Effects& effects) {
  const RoundKey first{layer.name(), 0, Phase::kForward};
  for (auto round = pending_.lower_bound(first); round != pending_.end() && round->first.layer == first.layer;) {
    const auto next = std::next(round);
    Fail(round, error, now, effects);
    round = next;
  }
}

// ---- What others see ------------------------------------------------------------------------------------------------

std::vector<StreamId> Group::Streams() const {
  std::vector<StreamId> streams;
  for (const MemberRecord& member : members_) {
    if (member.state == MemberState::kPresent) streams.push_back(member.stream);
  }
  return streams;
}

Membership Group::CurrentMembership() const {
  Membership membership;
  membership.world_size = world_size_;
  for (Rank rank = 0; rank < world_size_; ++rank) {
    if (members_[rank].state == MemberState::kPresent) membership.present_ranks.push_back(rank);
    if (members_[rank].state == MemberState::kLeft) membership.left_ranks.push_back(rank);
  }
  return membership;
}

void Group::AnnounceMembership(std::optional<Rank> except, Effects& effects) const {
  std::vector<StreamId> streams;
  for (Rank rank = 0; rank < world_size_; ++rank) {
    if (members_[rank].state == MemberState::kPresent && rank != except) streams.push_back(members_[rank].stream);
  }
  if (!streams.empty()) effects.push_back(SendMembership{std::move(streams), CurrentMembership()});
}

GroupSummary Group::Summary() const {
  GroupSummary summary;
  summary.id = id_;
  summary.generation = generation_;
  summary.run_id = run_id_;
  summary.world_size = world_size_;
  summary.present = present_;
  summary.layers = layers_.size();
  summary.rounds_in_flight = pending_.size();
  summary.rounds_completed = completed_;
  summary.rounds_failed = failed_;
  return summary;
}

GroupView Group::View(absl::Time now) const {
  GroupView view;
  view.summary = Summary();
  view.config = config_;
  for (Rank rank = 0; rank < world_size_; ++rank) {
    const MemberRecord& member = members_[rank];
    const size_t shown = std::min(member.blocked_on.size(), kMostShownKeys);
    view.members.push_back({rank, member.state, member.incarnation, member.description, member.contributions,
                            member.last_arrivals, member.joined_at,
                            std::vector<RoundKey>(member.blocked_on.begin(), member.blocked_on.begin() + shown),
                            member.blocked_on.size()});
  }
  std::vector<PendingRounds::const_iterator> rounds;
  rounds.reserve(pending_.size());
  for (auto round = pending_.begin(); round != pending_.end(); ++round) rounds.push_back(round);
  // The map's order, which is the keys', parts those that began together.
  const auto older = [](const auto& a, const auto& b) {
    return a->second.begun < b->second.begun || (a->second.begun == b->second.begun && a->first < b->first);
  };
  const size_t shown = std::min(rounds.size(), kMostShownRounds);
  std::partial_sort(rounds.begin(), rounds.begin() + shown, rounds.end(), older);
  for (size_t i = 0; i < shown; ++i) view.pending.push_back(ViewOf(rounds[i]->first, rounds[i]->second, now));
  return view;
}

PendingRoundView Group::ViewOf(const RoundKey& key, const PendingRound& round, absl::Time now) const {
  PendingRoundView view;
  view.key = key;
  for (const auto& [rank, payload] : round.payloads) {
    if (view.arrived_ranks.size() < kMostNamedRanks) view.arrived_ranks.push_back(rank);
  }
  view.arrived = round.payloads.size();
  view.missing_ranks = MissingRanks(key, round);
  view.missing = view.missing_ranks.size();
  view.missing_ranks.resize(std::min(view.missing, kMostNamedRanks));
  view.age = now - round.begun;
  view.time_left = round.deadline - now;
  return view;
}

std::vector<LayerSummary> Group::LayerSummaries() const {
  std::vector<LayerSummary> summaries;
  for (const auto& [name, layer] : layers_) summaries.push_back(layer->Summary());
  return summaries;
}

const Layer* Group::FindLayer(absl::string_view name) const {
  const auto it = layers_.find(name);
  return it == layers_.end() ? nullptr : it->second.get();
}

}  // namespace syncbn::core
