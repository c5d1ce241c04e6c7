// Joins, admissions, presence and declarations.

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "tests/simulation/model.h"

namespace syncbn::simulation {
namespace {

using core::Rank;
using core::RoundKey;
using core::StreamId;

}  // namespace

void Model::Check(const core::SendJoined& joined, absl::Time now) {
  if (frame_ != nullptr && frame_->join.has_value() && SeatOf(joined.stream).has_value()) {
    // Its group goes on with the run of the one that joins.
    if (joined.run_id != frame_->join->run_id) Violate(absl::StrCat("stream ", joined.stream, " is told another run"));
    Member& member = members_[*SeatOf(joined.stream)];
    uint64_t& greatest = incarnations_[{joined.run_id, *SeatOf(joined.stream)}];
    if (joined.incarnation <= std::max(greatest, member.incarnation)) Violate("an incarnation of the run comes again");
    greatest = member.incarnation = joined.incarnation;
    return;
  }
  readings_[joined.stream].before_memberships[joined.membership.version] = readings_[joined.stream].told;
  if (joined.stream != sender_.stream || frame_ == nullptr || !frame_->join.has_value() || !Open(joined.stream)) {
    return Violate(absl::StrCat("stream ", joined.stream, " is told joined, and has not asked"));
  }
  const core::Join join = AsNew(joining_.at(joined.stream));
  CheckRunOf(joined, join);
  if (Intrudes(join)) Violate(absl::StrCat("rank ", join.rank, " is seated with other layers"));
  refused_.erase(join.rank);
  Member& member = members_[join.rank];
  if (member.stream != 0) Violate(absl::StrCat("rank ", join.rank, " holds two seats"));
  if (joined.newest_rounds != (join.incarnation == 0 ? history_.NewestRounds() : std::vector<RoundKey>())) {
    Violate(absl::StrCat("rank ", join.rank, " is told otherwise than its group stands"));
  }
  uint64_t& greatest = incarnations_[{run_id_, join.rank}];
  if (join.incarnation == 0 ? joined.incarnation <= greatest
                            : joined.incarnation != join.incarnation || joined.incarnation < member.incarnation) {
    Violate(absl::StrCat("incarnation ", joined.incarnation, " of rank ", join.rank, " is seated; it asked for ",
                         join.incarnation, ", and ", std::max(greatest, member.incarnation), " has been there"));
  }
  greatest = std::max(greatest, joined.incarnation);
  const bool known = join.incarnation == member.incarnation && member.incarnation != 0;
  const bool catching_up = known ? member.catching_up : join.incarnation != 0;
  if (resumed_ && join.incarnation != 0 && !known) {
    for (const Rank rank : join.left_ranks) {
      if (rank == join.rank || members_[rank].incarnation != 0 || members_[rank].left) continue;
      members_[rank].left = members_[rank].left_before = true;
      if (!leavers_until_.has_value()) leavers_until_ = now + SimulatedLimits().leaver_return;
      refused_.erase(rank);
    }
  }
  const bool had_left = member.left || member.had_left;
  const bool had_left_before = member.had_left ? member.had_left_before : member.left_before;
  member = Member();
  member.had_left = had_left;
  member.had_left_before = had_left_before;
  member.catching_up = catching_up;
  member.returning = join.incarnation != 0;
  member.stream = joined.stream;
  member.incarnation = joined.incarnation;
  TakeFrame(join.rank, now);
}

void Model::CheckRunOf(const core::SendJoined& joined, const core::Join& join) {
  const bool with_history = join.run_id != 0 && !join.without_outcome;
  if (run_id_ == 0) run_id_ = joined.run_id;
  if (join.run_id != 0 ? joined.run_id != join.run_id : joined.run_id != run_id_) Violate("a join into another run");
  if (joined.run_id != run_id_) {
    if (continues_ || completions_ != 0 || join.run_id == over_run_id_) Violate("a run gives way to another");
    ++tally_.adopted;
    run_id_ = joined.run_id;
  }
  resumed_ = resumed_ || join.run_id != 0;
  continues_ = continues_ || with_history;
}

void Model::Check(const core::SendMembership& change, absl::Time) {
  std::vector<Rank> present;
  std::vector<Rank> left;
  for (Rank rank = 0; rank < settings_.world_size; ++rank) {
    if (Present(rank)) present.push_back(rank);
    if (Left(rank)) left.push_back(rank);
  }
  if (change.membership.present_ranks != present || change.membership.left_ranks != left) {
    Violate("the membership that is announced is not the present one");
  }
  for (const StreamId stream : change.streams) {
    if (!Open(stream)) Violate(absl::StrCat("closed stream ", stream, " is told the membership"));
    Reading& reading = readings_[stream];
    reading.before_memberships[change.membership.version] = reading.told;
  }
}

void Model::Check(const core::CloseStream& close, absl::Time now) {
  const auto rank = SeatOf(close.stream);
  if (!closed_.insert(close.stream).second) return;
  if (const auto departure = departures_.find(close.stream); departure != departures_.end()) {
    const bool left_to_the_next =
        shutting_down_ && close.error.has_value() && close.error->reason == std::string("SHUTTING_DOWN");
    if (close.error.has_value() && !left_to_the_next) Violate("a worker that leaves is told an error");
    if (!left_to_the_next) CheckDeparture(departure->second, now);
    departures_.erase(departure);
    return;
  }
  if (!rank.has_value()) return CheckRefusedJoin(close);
  const std::string reason = close.error.has_value() ? close.error->reason : "";
  Member& member = members_[*rank];
  if (!reason.empty()) {
    member.stream = 0;
    member.blocked_on.clear();
  }
  if (reason.empty()) {
    if (close.stream != sender_.stream || !sender_.leaves) Violate("a stream is closed without a reason or a leave");
    NoteDeparture(now);
    CheckDeparture(departures_.at(close.stream), now);
    departures_.erase(close.stream);
  } else if (reason == "FENCED") {
    const auto join = joining_.find(sender_.stream);
    if (join == joining_.end() || frame_ == nullptr || !frame_->join.has_value() || join->second.rank != *rank) {
      Violate("a stream is fenced, and nobody took its place");
    } else if (join->second.incarnation != member.incarnation) {
      Violate(absl::StrCat("rank ", *rank, " loses its seat while its stream is alive"));
    }
    member.lost_at = now;
    ++tally_.fenced;
  } else if (reason == "OUTCOME_CHANGED" && diverged_now_ && close.stream == sender_.stream) {
    member.lost_at = now;
  } else if (reason != "SHUTTING_DOWN" || !shutting_down_) {
    Violate(absl::StrCat("the stream of rank ", *rank, " is closed with ", reason));
  }
}

void Model::NoteRead() {
  if (frame_->membership_read == 0) return;
  Reading& reading = readings_[sender_.stream];
  reading.confirms = true;
  const auto before = reading.before_memberships.find(frame_->membership_read);
  if (before != reading.before_memberships.end()) reading.read = std::max(reading.read, before->second);
}

void Model::NoteDeparture(absl::Time now) {
  Member& member = members_[sender_.rank];
  member.left = true;
  member.stream = 0;
  member.blocked_on.clear();
  Departure& departure = departures_[sender_.stream];
  departure.since = now;
  for (const auto& [rank, other] : members_) {
    // A worker that leaves is not told the effects of its leave.
    const auto& before = readings_[other.stream].before_memberships;
    if (other.stream != 0 && !before.empty()) departure.told[other.stream] = before.rbegin()->second;
  }
}

void Model::CheckDeparture(const Departure& departure, absl::Time now) {
  // A group that a shutdown ends goes on at the next master.
  if (group_ends_now_ && !shutting_down_) return;
  if (now >= departure.since + SimulatedLimits().max_leave_delay) return;
  for (const auto& [rank, member] : members_) {
    if (Left(rank)) continue;
    const bool lost = member.stream == 0 && member.lost_at.has_value() && !GivenUp(rank, now);
    if (lost || (member.stream != 0 && member.returning)) {
      Violate(absl::StrCat("a leave is acknowledged, and rank ", rank, " may have lost an outcome with its stream"));
    }
    const auto told = departure.told.find(member.stream);
    if (told == departure.told.end()) continue;
    const Reading& reading = readings_[member.stream];
    if (!reading.confirms || reading.read >= told->second) continue;
    Violate(absl::StrCat("a leave is acknowledged, and rank ", rank, " has read ", reading.read, " of ", told->second,
                         " outcomes"));
  }
}

void Model::CheckRefusedJoin(const core::CloseStream& close) {
  const auto join = joining_.find(close.stream);
  const std::string reason = close.error.has_value() ? close.error->reason : "";
  if (join == joining_.end() || close.stream != sender_.stream) return Violate("an unknown stream is closed");
  const std::string due = WhyRefused(join->second);
  if (reason == "FENCED") ++tally_.fenced;
  if (reason == "RANK_TAKEN") ++tally_.taken;
  if (reason != (due.empty() && Intrudes(join->second) ? "LAYER_SET_MISMATCH" : due) || reason.empty()) {
    Violate(absl::StrCat("the join of rank ", join->second.rank, " is refused with ", reason));
  }
}

core::Join Model::AsNew(core::Join join) const {
  const bool other = join.run_id != 0 && join.run_id != run_id_ && run_id_ != 0 && join.run_id != over_run_id_;
  if (other && join.without_outcome) join.run_id = join.incarnation = 0;
  return join;
}

std::string Model::WhyRefused(const core::Join& asked) const {
  const core::Join join = AsNew(asked);
  const auto member = members_.find(join.rank);
  if (shutting_down_) return "SHUTTING_DOWN";
  const bool history = continues_ || completions_ != 0;
  const bool absent = member == members_.end() || (member->second.incarnation == 0 && !member->second.left);
  const bool adopts = join.incarnation != 0 && join.run_id != over_run_id_ && !history && absent;
  if (join.run_id != 0 && join.run_id != run_id_ && !adopts) return "RUN_SUPERSEDED";
  if (member == members_.end() || join.incarnation == member->second.incarnation) return "";
  if (join.incarnation != 0 && join.incarnation < member->second.incarnation) return "FENCED";
  return member->second.stream != 0 ? "RANK_TAKEN" : "";
}

void Model::Check(const core::SendLayerError& error, absl::Time) {
  const bool intruded = frame_ != nullptr && frame_->join.has_value() && Intrudes(*frame_->join);
  if (error.layer.empty() ? !intruded : !MayDisagree(error.layer)) Violate("a layer error, though all layers agree");
  for (const StreamId stream : error.streams) {
    if (!Open(stream) || !SeatOf(stream).has_value()) Violate("a layer error goes to a stream that is closed");
  }
}

void Model::Check(const core::MemberChanged& change, absl::Time) {
  if (change.rank >= change.world_size || change.present > change.world_size) {
    Violate("a member changes that cannot be");
  }
}

void Model::Check(const core::JoinRefused& refused, absl::Time) {
  if (Open(refused.stream) && SeatOf(refused.stream).has_value()) Violate("a join is refused that was admitted");
}

void Model::Check(const core::GroupEnded&, absl::Time now) {
  if (!shutting_down_) {
    for (const auto& [rank, member] : members_) {
      if (member.stream != 0) Violate("a group ends while someone is present");
      const bool awaited = waits() && member.lost_at.has_value() && !member.left && !GivenUp(rank, now);
      if (awaited) Violate("a group ends while someone's successor is waited for");
    }
    // One that has died with an earlier master is not known here.
    const bool all_known = std::all_of(members_.begin(), members_.end(), [](const auto& entry) {
      return entry.second.left || entry.second.incarnation != 0;
    });
    const bool began_anew = frame_ != nullptr && frame_->join.has_value();
    if (waits() && resumed_ && began_anew && (members_.size() < settings_.world_size || !all_known)) {
      Violate("a run ends while the successor of one that died with the master before is waited for");
    }
    if (InFlight() != 0) Violate("a group ends before its rounds");
  }
  over_run_id_ = run_id_;
  run_id_ = 0;
  resumed_ = continues_ = false;
  completions_ = 0;
  used_beyond_ = told_beyond_ = 0;
  sent_beyond_ = 0;
  reported_.clear();
  history_ = History(settings_.world_size);
  refused_.clear();
  members_.clear();
  departures_.clear();
  leavers_until_.reset();
  pending_.clear();
  running_.clear();
  completed_.clear();
}

bool Model::MayDisagree(const std::string& layer) const {
  std::set<uint32_t> declared;
  for (const auto& [rank, member] : members_) {
    const auto channels = member.channels.find(layer);
    if (channels != member.channels.end() && !Left(rank)) declared.insert(channels->second);
  }
  return declared.size() > 1 && completed_.count(layer) == 0;
}

std::optional<Rank> Model::SeatOf(StreamId stream) const {
  for (const auto& [rank, member] : members_) {
    if (member.stream == stream) return rank;
  }
  return std::nullopt;
}

bool Model::Present(Rank rank) const {
  const auto member = members_.find(rank);
  if (member == members_.end() || member->second.stream == 0) return false;
  return !(sender_.leaves && member->second.stream == sender_.stream);
}

bool Model::Left(Rank rank) const {
  const auto member = members_.find(rank);
  if (member == members_.end()) return false;
  return member->second.left || (sender_.leaves && member->second.stream == sender_.stream);
}

bool Model::GivenUp(Rank rank, absl::Time now) const {
  const auto member = members_.find(rank);
  if (member == members_.end() || member->second.stream != 0 || member->second.left) return false;
  return member->second.lost_at.has_value() && now >= *member->second.lost_at + *settings_.config.rejoin_grace;
}

}  // namespace syncbn::simulation
