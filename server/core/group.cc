#include "server/core/group.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "plumbing/check.h"
#include "server/core/error.h"
#include "vocabulary/protocol_version.h"

namespace syncbn::core {
namespace {

// Returns what incarnations that an earlier master of the run gave out are smaller than: the time in microseconds.
uint64_t IncarnationFloor(absl::Time now) {
  return static_cast<uint64_t>(std::max<int64_t>(absl::ToUnixMicros(now), 0));
}

// Returns whether the frame that has the join does something else, too, which no worker does before it is let in.
bool SaysMoreThanJoin(const FrameReceived& frame) {
  return !frame.contributions.empty() || !frame.ended.empty() || frame.caught_up || frame.membership_read != 0;
}

}  // namespace

std::optional<Error> FillConfig(const GroupConfig& config, uint32_t world_size, const Limits& limits,
                                GroupConfig& filled) {
  filled = config;
  filled.round_timeout = config.round_timeout.value_or(limits.default_round_timeout);
  const bool waits = config.missing_policy == MissingPolicy::kWait;
  const absl::Duration grace =
      waits ? std::min(*filled.round_timeout / 2, limits.max_rejoin_grace) : limits.default_rejoin_grace;
  filled.rejoin_grace = config.rejoin_grace.value_or(grace);
  if (*filled.round_timeout < limits.min_round_timeout || *filled.round_timeout > limits.max_round_timeout) {
    return MalformedError(absl::StrCat("round_timeout ", absl::FormatDuration(*filled.round_timeout), " is not within ",
                                       absl::FormatDuration(limits.min_round_timeout), " and ",
                                       absl::FormatDuration(limits.max_round_timeout)));
  }
  if (*filled.rejoin_grace < absl::ZeroDuration() || *filled.rejoin_grace > limits.max_rejoin_grace) {
    return MalformedError(absl::StrCat("rejoin_grace ", absl::FormatDuration(*filled.rejoin_grace),
                                       " is not within 0 and ", absl::FormatDuration(limits.max_rejoin_grace)));
  }
  if (config.missing_policy != MissingPolicy::kProceed) {
    filled.min_workers = 0;
  } else if (config.min_workers < 1 || config.min_workers > world_size) {
    return MalformedError(
        absl::StrCat("min_workers = ", config.min_workers, " is not within 1 and the world size of ", world_size));
  }
  return std::nullopt;
}

Group::Group(const Join& join, const GroupConfig& filled, uint64_t run_id, uint64_t memory, const Limits& limits,
             absl::Time now)
    : id_(join.id),
      generation_(join.generation),
      run_id_(run_id),
      memory_(memory),
      resumed_(join.run_id != 0),
      token_(join.token),
      config_(filled),
      limits_(limits),
      members_(join.world_size, resumed_ ? IncarnationFloor(now) : 0),
      layers_(limits, filled.missing_policy),
      rounds_(id_, config_, limits, members_, layers_),
      linger_until_(now + limits.group_linger) {
  SYNCBN_CHECK(run_id != 0 && filled.round_timeout.has_value() && filled.rejoin_grace.has_value());
}

// ---- Joining --------------------------------------------------------------------------------------------------------

std::optional<Error> Group::OnJoin(StreamId stream, const Join& asked, const GroupConfig& filled, absl::Time now,
                                   Effects& effects) {
  rounds_.BeginTurn();
  Join join = asked;
  if (join.without_outcome && join.run_id != run_id_ && join.run_id != over_run_id_) {
    // Nothing has happened to it in its run, in which it had its incarnation. It is a new worker in this one.
    join.run_id = join.incarnation = 0;
  }
  auto error = CheckJoin(join, filled);
  if (!error.has_value()) error = layers_.CheckSpecs(join.layers);
  if (!error.has_value()) {
    error = layers_.CheckSet(join);
    if (error.has_value()) OnLayerSetRefused(join, *error, now, effects);
  }
  if (error.has_value()) {
    refused_joins_.Add(error->reason);
    return error;
  }
  const bool comes_back = join.run_id != 0;
  const bool with_history = comes_back && !join.without_outcome;
  if (comes_back && join.run_id != run_id_) AdoptRun(join.run_id, now, effects);
  resumed_ = resumed_ || comes_back;
  continues_ = continues_ || with_history;
  const bool others_left = AdoptLeft(join, now);
  const bool had_left = members_[join.rank].state == MemberState::kLeft;
  ++joins_;
  const bool reborn = Seat(stream, join, now, effects);
  SendJoinedTo(join.rank, effects);
  if (join.incarnation == 0) std::get<SendJoined>(effects.back()).newest_rounds = layers_.NewestRounds();
  // A new life does not repeat what its predecessor had contributed to an earlier master. It may have been here before:
  // if that one had left, rounds waited for it to come back when the new life's first stream broke.
  if (others_left || reborn || had_left) rounds_.BeginReview(now, effects);
  for (const LayerSpec& spec : join.layers) Declare(join.rank, spec, join.incarnation != 0, now, effects);
  layers_.FixSet(join);
  // Members tell the next master who has left, so they learn who is back.
  const bool complete = members_.present() == members_.world_size();
  if (others_left || had_left || complete) AnnounceMembership(join.rank, effects);
  return std::nullopt;
}

std::optional<Error> Group::CheckJoin(const Join& join, const GroupConfig& filled) const {
  const bool other_run = join.run_id != 0 && join.run_id != run_id_;
  // One that claims a rank of which a later life has been here is over.
  const bool adopts = join.incarnation != 0 && join.run_id != over_run_id_ && !HasHistory() &&
                      members_[join.rank].state == MemberState::kAbsent;
  if (other_run && !adopts) return WrongRunError(join, run_id_);
  if (join.world_size != members_.world_size()) {
    return ConfigMismatchError(join, "world_size", join.world_size, members_.world_size());
  }
  const std::vector<FieldDifference> differences = Differences(kGroupConfigFields, filled, config_);
  if (!differences.empty()) {
    const FieldDifference& first = differences.front();
    return ConfigMismatchError(join, first.name, first.mine, first.theirs);
  }
  return members_.CheckClaim(join, /*resumed=*/resumed_ || other_run);
}

void Group::SendJoinedTo(Rank rank, Effects& effects) const {
  const Member& member = members_[rank];
  effects.push_back(SendJoined{
      member.stream, kProtocolVersion, member.incarnation, run_id_, config_, CurrentMembership(), memory_, {}});
}

void Group::AdoptRun(uint64_t run_id, absl::Time now, Effects& effects) {
  run_id_ = run_id;
  members_.RaiseFloor(IncarnationFloor(now));
  for (Rank rank = 0; rank < members_.world_size(); ++rank) {
    if (members_[rank].state != MemberState::kPresent) continue;
    members_.Renumber(rank);
    SendJoinedTo(rank, effects);
  }
}

bool Group::AdoptLeft(const Join& join, absl::Time now) {
  // A worker that has been here before knows of leaves from this master.
  if (!resumed_ || join.incarnation == 0 || join.incarnation == members_[join.rank].incarnation) return false;
  bool any = false;
  for (const Rank rank : join.left_ranks) {
    if (rank < members_.world_size() && rank != join.rank) any = members_.AdoptLeft(rank) || any;
  }
  if (any && leavers_until_ == absl::InfinitePast()) {
    leavers_until_ = now + limits_.leaver_return;
    members_.SetLeaversMayReturn(true);
  }
  return any;
}

bool Group::Seat(StreamId stream, const Join& join, absl::Time now, Effects& effects) {
  const Members::Seated seated = members_.Seat(stream, join, now);
  linger_until_ = absl::InfiniteFuture();
  if (seated.replaced.has_value()) {
    const uint64_t incarnation = members_[join.rank].incarnation;
    effects.push_back(CloseStream{*seated.replaced, ReplacedStreamError(join.rank, incarnation)});
  }
  effects.push_back(Change(join.rank, stream));
  std::get<MemberChanged>(effects.back()).returned = !seated.reborn;
  if (!seated.reborn) return false;
  layers_.Forget(join.rank);
  // Its predecessor will not contribute any more. Unless it does what that would have done, rounds wait for it in vain.
  if (seated.predecessor_contributed && config_.missing_policy == MissingPolicy::kFail) {
    rounds_.FailAwaiting(join.rank, now, effects);
  }
  return true;
}

void Group::OnLayerSetRefused(const Join& join, const Error& error, absl::Time now, Effects& effects) {
  // The declarations of a rank's present or former member stand, if it has one.
  const bool vacant = members_.Vacant(join.rank);
  if (vacant) {
    // Report mismatching layers now rather than when their rounds time out.
    for (const LayerSpec& spec : join.layers) {
      Layer* const layer = layers_.Find(spec.name);
      if (layer == nullptr || layer->declarations().Known(spec)) continue;
      layer->Forget(join.rank);
      Declare(join.rank, spec, /*returning=*/false, now, effects);
    }
  }
  if (std::vector<StreamId> streams = members_.Streams(); !streams.empty()) {
    effects.push_back(SendLayerError{std::move(streams), "", error});
  }
  if (!vacant) return;
  members_.NoteLayerSetError(join.rank, error);
  rounds_.BeginReview(now, effects);
}

// ---- Frames ---------------------------------------------------------------------------------------------------------

void Group::OnFrame(StreamId stream, const FrameReceived& frame, absl::Time now, Effects& effects) {
  const std::optional<Rank> rank = members_.RankOf(stream);
  if (!rank.has_value()) return;
  rounds_.BeginTurn();
  members_.Unblock(*rank);
  if (!frame.join.has_value() || SaysMoreThanJoin(frame)) members_.TakePart(*rank);
  auto error = rounds_.CheckKeys(frame);
  if (!error.has_value()) error = layers_.CheckSpecs(frame.layers);
  if (error.has_value()) {
    effects.push_back(CloseStream{stream, std::move(error)});
    OnStreamClosed(stream, now, effects);
    return;
  }
  const bool returning = frame.join.has_value() && frame.join->incarnation != 0;
  for (const LayerSpec& spec : frame.layers) Declare(*rank, spec, returning, now, effects);
  for (const EndedReport& report : frame.ended) {
    if (error = rounds_.OnEnded(*rank, report, now, effects); !error.has_value()) continue;
    effects.push_back(CloseStream{stream, std::move(error)});
    OnStreamClosed(stream, now, effects);
    return;
  }
  for (const Contribution& contribution : frame.contributions) {
    rounds_.OnContribution(*rank, contribution, frame.left_ranks, now, effects);
  }
  if (frame.caught_up) {
    members_.EndReturn(*rank);
    rounds_.OnCaughtUp(*rank, frame.forgotten, now, effects);
  }
  if (frame.membership_read != 0) members_.NoteRead(*rank, std::min(frame.membership_read, membership_version_));
  rounds_.OnBlocked(*rank, frame.blocked_on);
  if (frame.leave.has_value()) Leave(*rank, now, effects);
  rounds_.FindDeadlock(now, effects);
  EndDepartures(now, effects);
}

void Group::Declare(Rank rank, const LayerSpec& spec, bool returning, absl::Time now, Effects& effects) {
  const Layer& layer = layers_.Declare(rank, spec, returning);
  if (auto conflict = layer.declarations().conflict()) {
    AnnounceConflict(layer, *conflict, effects);
    rounds_.FailLayer(layer.name(), *conflict, now, effects);
  }
}

void Group::AnnounceConflict(const Layer& layer, const Error& conflict, Effects& effects) const {
  std::vector<StreamId> streams;
  for (Rank rank = 0; rank < members_.world_size(); ++rank) {
    if (members_[rank].state == MemberState::kPresent && layer.declarations().ranks().contains(rank)) {
      streams.push_back(members_[rank].stream);
    }
  }
  if (!streams.empty()) effects.push_back(SendLayerError{std::move(streams), layer.name(), conflict});
}

// ---- Losses, leaves and time ----------------------------------------------------------------------------------------

void Group::OnStreamClosed(StreamId stream, absl::Time now, Effects& effects) {
  const std::optional<Rank> rank = members_.RankOf(stream);
  if (!rank.has_value()) return departures_.Remove(stream);
  if (members_[*rank].had_left) {
    rounds_.BeginTurn();
    members_.LeaveAgain(*rank);
    OnLeft(*rank, stream, now, effects);
  } else {
    members_.Lose(*rank, now + *config_.rejoin_grace);
    effects.push_back(Change(*rank, stream));
    OnMemberGone(now, effects);
  }
  OnTimePassed(now, effects);  // A grace of 0 is over already.
}

void Group::OnLeft(Rank rank, StreamId stream, absl::Time now, Effects& effects) {
  effects.push_back(Change(rank, stream));
  layers_.Forget(rank);
  // One that has read of the leave has read the outcomes of the rounds that it ends, too.
  rounds_.BeginReview(now, effects);
  OnMemberGone(now, effects);
}

void Group::Leave(Rank rank, absl::Time now, Effects& effects) {
  const StreamId stream = members_[rank].stream;
  members_.Leave(rank);
  OnLeft(rank, stream, now, effects);
  departures_.Add(stream, now + limits_.max_leave_delay);
  // The others have been told of the leave, behind all outcomes that its worker was told.
  version_to_read_ = membership_version_;
}

bool Group::OutcomesAreAwaited() const {
  if (members_.in_grace() != 0 || rounds_.under_review()) return true;
  if (memory_ == 0) return false;  // Then workers do not say what they repeat.
  return members_.returning() != 0 || (resumed_ && (members_.absent() != 0 || rounds_.AnyRestoredAwaited()));
}

void Group::EndDepartures(absl::Time now, Effects& effects) {
  Acknowledge(departures_.TakeDue(now), effects);
  if (departures_.empty()) return;
  if (OutcomesAreAwaited()) {
    version_to_read_ = 0;
    return;
  }
  if (version_to_read_ == 0) {
    AnnounceMembership(std::nullopt, effects);
    version_to_read_ = membership_version_;
  }
  if (members_.AllHaveRead(version_to_read_)) Acknowledge(departures_.TakeAll(), effects);
}

void Group::Acknowledge(const std::vector<StreamId>& leaves, Effects& effects) {
  for (const StreamId stream : leaves) effects.push_back(CloseStream{stream, std::nullopt});
}

void Group::OnMemberGone(absl::Time now, Effects& effects) {
  if (empty()) {
    const absl::Duration grace = waits() ? *config_.rejoin_grace : absl::ZeroDuration();
    linger_until_ = now + std::max(limits_.group_linger, grace);
  }
  AnnounceMembership(std::nullopt, effects);
}

void Group::AnnounceMembership(std::optional<Rank> except, Effects& effects) {
  ++membership_version_;
  std::vector<StreamId> streams = members_.Streams(except);
  if (!streams.empty()) effects.push_back(SendMembership{std::move(streams), CurrentMembership()});
}

Membership Group::CurrentMembership() const {
  Membership membership = members_.Snapshot();
  membership.version = membership_version_;
  return membership;
}

MemberChanged Group::Change(Rank rank, StreamId stream) const {
  const Member& member = members_[rank];
  return {id_,
          rank,
          stream,
          member.state,
          /*returned=*/false,
          member.incarnation,
          member.description,
          members_.present(),
          members_.world_size()};
}

void Group::OnReaderLags(StreamId stream, bool lags) {
  if (const std::optional<Rank> rank = members_.RankOf(stream)) members_.SetLags(*rank, lags);
}

void Group::OnTimePassed(absl::Time now, Effects& effects) {
  rounds_.BeginTurn();
  const bool leavers_are_gone = members_.LeaversMayReturn() && leavers_until_ <= now;
  if (leavers_are_gone) members_.SetLeaversMayReturn(false);
  if (members_.GiveUpOverdue(now) || leavers_are_gone) {
    rounds_.BeginReview(now, effects);
  } else {
    rounds_.ContinueReview(now, effects);
  }
  rounds_.OnTimePassed(now, effects);
  rounds_.FindDeadlock(now, effects);  // A review has kept it from being found.
  EndDepartures(now, effects);
}

absl::Time Group::NextDeadline() const {
  const absl::Time leavers = members_.LeaversMayReturn() ? leavers_until_ : absl::InfiniteFuture();
  return std::min({linger_until_, members_.NextGrace(), rounds_.NextDeadline(), departures_.NextDeadline(), leavers});
}

void Group::End(const Error& why, absl::Time now, Effects& effects) {
  rounds_.FailAll(why, now, effects);
  Acknowledge(departures_.TakeAll(), effects);
  ShutDown(why, effects);
}

void Group::ShutDown(const Error& why, Effects& effects) {
  for (const StreamId stream : members_.Streams()) effects.push_back(CloseStream{stream, why});
  // The next master may need what those hold that leave.
  for (const StreamId stream : departures_.TakeAll()) effects.push_back(CloseStream{stream, why});
  effects.push_back(GroupEnded{id_});
}

// ---- Views and invariants -------------------------------------------------------------------------------------------

GroupSummary Group::Summary() const {
  GroupSummary summary;
  summary.id = id_;
  summary.generation = generation_;
  summary.run_id = run_id_;
  summary.world_size = members_.world_size();
  summary.present = members_.present();
  summary.layers = layers_.size();
  summary.rounds_in_flight = rounds_.size();
  summary.rounds_completed = rounds_.completed();
  summary.rounds_failed = rounds_.failed();
  summary.oldest_round = rounds_.OldestBegun();
  return summary;
}

GroupView Group::View(absl::Time now, const GroupParts& parts) const {
  GroupView view;
  view.summary = Summary();
  view.config = config_;
  view.statistics = rounds_.statistics();
  view.joins = joins_;
  view.refused_joins = refused_joins_;
  view.lost = members_.lost();
  view.left = members_.left();
  view.pending_bytes = rounds_.pending_bytes();
  view.retained_bytes = layers_.retained_bytes();
  if (parts.members) view.members = MemberViews();
  if (parts.pending) view.pending = rounds_.Views(now);
  if (parts.recent) {
    const FlightRecorder& recorder = rounds_.recorder();
    view.recent = recorder.Rounds();
    view.failures.assign(recorder.failures().begin(), recorder.failures().end());
  }
  return view;
}

std::vector<MemberView> Group::MemberViews() const {
  std::vector<MemberView> views;
  for (Rank rank = 0; rank < members_.world_size(); ++rank) {
    const Member& member = members_[rank];
    const size_t shown = std::min(member.blocked_on.size(), kMostShownKeys);
    MemberView view;
    view.rank = rank;
    view.state = member.state;
    view.incarnation = member.incarnation;
    view.description = member.description;
    view.contributions = member.contributions;
    view.last_arrivals = member.last_arrivals;
    view.joined_at = member.joined_at;
    view.blocked_on.assign(member.blocked_on.begin(), member.blocked_on.begin() + shown);
    view.blocked_on_count = member.blocked_on.size();
    if (member.activity != nullptr) {
      view.last_contribution = LastContribution{member.activity->key(), member.activity->at};
      view.lateness = member.activity->lateness;
    }
    views.push_back(std::move(view));
  }
  return views;
}

GroupState Group::State() const { return {id_, generation_, run_id_, members_.world_size(), config_, {}}; }

void Group::CheckInvariants() const {
  members_.CheckInvariants();
  layers_.CheckInvariants();
  rounds_.CheckInvariants();
  SYNCBN_CHECK(version_to_read_ <= membership_version_, version_to_read_, " > ", membership_version_);
  SYNCBN_CHECK(empty() == (linger_until_ != absl::InfiniteFuture()), "group \"", id_.group, "\"");
}

}  // namespace syncbn::core
