#include "tests/simulation/model.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "tests/testing/moments_oracle.h"

namespace syncbn::simulation {
namespace {

using core::Rank;
using core::RoundKey;
using core::StreamId;

bool SameBits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](double x, double y) {
           return (x == y && std::signbit(x) == std::signbit(y)) || (std::isnan(x) && std::isnan(y));
         });
}

bool SameNumbers(const testing::Numbers& a, const testing::Numbers& b) {
  return a.count == b.count && a.role == b.role && SameBits(a.first, b.first) && SameBits(a.second, b.second);
}

// Reasons that are told to the sender alone.
bool IsRefusal(const std::string& reason) {
  return reason == "ROUND_EXPIRED" || reason == "FORWARD_ROUND_UNKNOWN" || reason == "NOT_A_CONTRIBUTOR" ||
         reason == "PAYLOAD_CHANGED" || reason == "LIMIT_EXCEEDED";
}

bool Near(double actual, long double expected, long double scale) {
  if (std::isnan(expected)) return std::isnan(actual);
  if (std::isinf(expected)) return actual == expected;
  return std::fabs(actual - expected) <= 1e-10L * scale + 1e-18L;  // False for a NaN.
}

}  // namespace

void Model::Begin() {
  sender_ = Sender();
  frame_ = nullptr;
  added_.clear();
  outcomes_.clear();
  to_tell_.clear();
  told_.clear();
  must_answer_.clear();
  ended_now_.clear();
  deadlock_now_ = diverged_now_ = all_caught_up_now_ = false;
  lost_now_.clear();
}

void Model::Violate(const std::string& what) {
  if (!violation_.has_value()) violation_ = what;
}

// ---- What the coordinator is told -----------------------------------------------------------------------------------

void Model::BeforeFrame(StreamId stream, const Frame& frame, absl::Time now) {
  Begin();
  sender_.stream = stream;
  frame_ = &frame;
  if (frame.join.has_value()) {
    joining_[stream] = *frame.join;  // The rest of the frame counts once it is seated.
    const Rank rank = frame.join->rank;
    if (Intrudes(*frame.join) && WhyRefused(*frame.join).empty() && members_[rank].stream == 0 && !Left(rank)) {
      refused_.insert(rank);
    }
  } else if (const auto rank = SeatOf(stream)) {
    TakeFrame(*rank, now);
  }
}

void Model::BeforeClose(StreamId stream, absl::Time now) {
  Begin();
  const auto rank = SeatOf(stream);
  closed_.insert(stream);
  if (!rank.has_value()) return;
  Member& member = members_[*rank];
  member.stream = 0;
  member.lost_at = now;
  member.blocked_on.clear();
}

void Model::BeforeShutdown() {
  Begin();
  shutting_down_ = true;
}

void Model::BeforeTime(absl::Time now) {
  Begin();
  DropIdle(now);
}

void Model::TakeFrame(Rank rank, absl::Time now) {
  sender_.rank = rank;
  sender_.seated = true;
  sender_.leaves = frame_->leave;
  for (const core::LayerSpec& spec : frame_->layers) members_[rank].channels[spec.name] = spec.channels;
  for (const Part& part : frame_->parts) {
    if (part.report == nullptr || TakeReport(rank, *part.report)) continue;
    diverged_now_ = true;
    ++tally_.diverged;
    return;
  }
  for (const Part& part : frame_->parts) {
    const auto holders = holders_.find(part.key);
    if (holders != holders_.end()) holders->second.insert(rank);
    if (part.report == nullptr) {
      Take(rank, part, now);
    } else if (!part.report->error.has_value()) {
      TakeRepeat(rank, part, now);
    }
  }
  if (frame_->caught_up && std::exchange(members_[rank].catching_up, false)) {
    for (const RoundKey& key : frame_->forgotten) NoteForgotten(rank, key);
    all_caught_up_now_ = EveryoneHasCaughtUp() && !waits();
  }
  members_[rank].blocked_on = frame_->blocked_on;
}

// ---- Rounds of an earlier master ------------------------------------------------------------------------------------

std::vector<Rank> Model::RosterOf(const core::EndedReport& report) const {
  std::vector<Rank> expected;
  int64_t count = 0;
  bool required = false;
  if (report.key.phase == core::Phase::kBackward) {
    if (!FindForward(report.key, &expected, &count, &required)) return {};
  } else {
    for (Rank rank = 0; rank < settings_.world_size; ++rank) expected.push_back(rank);
  }
  std::vector<Rank> roster;
  for (const Rank rank : expected) {
    if (!std::count(report.missing_ranks.begin(), report.missing_ranks.end(), rank)) roster.push_back(rank);
  }
  return roster;
}

bool Model::FindForward(const RoundKey& key, std::vector<Rank>* expected, int64_t* count, bool* required) const {
  const RoundKey forward{key.layer, key.sequence, core::Phase::kForward};
  expected->clear();
  if (const auto restored = restored_.find(forward); restored != restored_.end()) {
    const core::EndedReport& report = restored->second.report;
    for (const Rank rank : restored->second.roster) {
      const auto& abstaining = report.abstaining_ranks;
      if (!std::count(abstaining.begin(), abstaining.end(), rank)) expected->push_back(rank);
    }
    *count = report.count;
    *required = report.backward_required;
    return true;
  }
  const auto ended = ended_.find(forward);
  if (ended == ended_.end() || ended->second.outcome->error.has_value()) return false;
  for (const auto& [contributor, held] : ended->second.parts) {
    if (held.numbers->role != core::BackwardRole::kNone) expected->push_back(contributor);
  }
  *count = ended->second.outcome->count;
  *required = ended->second.outcome->backward_required;
  return true;
}

bool Model::TakeReport(Rank rank, const core::EndedReport& report) {
  if (!members_[rank].catching_up) return true;
  if (const auto ended = ended_.find(report.key); ended != ended_.end()) {
    const core::RoundOutcome& outcome = *ended->second.outcome;
    if (outcome.error.has_value() || report.error.has_value()) {
      return outcome.error.has_value() == report.error.has_value();
    }
    return outcome.digest == report.digest;
  }
  if (const auto known = restored_.find(report.key); known != restored_.end()) {
    return !report.error.has_value() && known->second.report.digest == report.digest;
  }
  const auto pending = pending_.find(report.key);
  if (report.error.has_value()) {
    if (pending != pending_.end()) return true;  // It fails with this error, and is said to end.
    auto outcome = std::make_shared<core::RoundOutcome>();
    outcome->key = report.key;
    outcome->error = report.error;
    ended_[report.key] = Ended{std::move(outcome), {}};
    return true;
  }
  const std::vector<Rank> roster = RosterOf(report);
  if (roster.empty()) {
    NoteForgotten(rank, report.key);
    return true;
  }
  restored_[report.key] = {report, roster};
  if (report.key.phase == core::Phase::kForward) holders_[report.key].insert(rank);
  completed_.insert(report.key.layer);
  if (pending == pending_.end()) return true;
  Pending& round = pending->second;
  round.restored = true;
  round.expected = roster;
  for (auto part = round.parts.begin(); part != round.parts.end();) {
    if (std::count(roster.begin(), roster.end(), part->first)) {
      ++part;
      continue;
    }
    round.latecomers.insert(part->first);
    part = round.parts.erase(part);
  }
  return true;
}

void Model::TakeRepeat(Rank rank, const Part& part, absl::Time now) {
  const auto restored = restored_.find(part.key);
  if (!members_[rank].catching_up || restored == restored_.end()) return;
  const std::vector<Rank>& roster = restored->second.roster;
  if (!std::count(roster.begin(), roster.end(), rank)) return;
  Pending& round = PendingRestored(part.key, now);
  if (!round.parts.emplace(rank, Held{members_[rank].incarnation, part.numbers}).second) return;
  round.repeats.insert(rank);
}

Model::Pending& Model::PendingRestored(const RoundKey& key, absl::Time now) {
  const auto [round, begins] = pending_.emplace(key, Pending());
  if (!begins) return round->second;
  round->second.begun = now;
  round->second.restored = true;
  if (key.phase == core::Phase::kBackward) {
    bool required = false;
    FindForward(key, &round->second.expected, &round->second.forward_count, &required);
  }
  round->second.expected = restored_.at(key).roster;
  return round->second;
}

void Model::TakeRestored(Rank rank, const Part& part, absl::Time now) {
  if (part.key.phase == core::Phase::kBackward) {
    std::vector<Rank> contributors;
    int64_t count = 0;
    bool required = false;
    const bool known = FindForward(part.key, &contributors, &count, &required);
    if (known && !std::count(contributors.begin(), contributors.end(), rank)) return must_answer_.push_back(part.key);
  }
  const Restored& restored = restored_.at(part.key);
  const bool counts = std::count(restored.roster.begin(), restored.roster.end(), rank) != 0;
  // The round has completed, so these are not the numbers that it completed with.
  if (counts && Bad(part, settings_.LayerOf(part.key))) return must_answer_.push_back(part.key);
  Pending& round = PendingRestored(part.key, now);
  if (round.idle()) round.begun = now;
  if (!counts) {
    round.latecomers.insert(rank);
    return;
  }
  const auto before = round.parts.find(rank);
  if (before == round.parts.end()) {
    added_[part.key] = std::nullopt;
    round.parts[rank] = Held{members_[rank].incarnation, part.numbers};
  } else if (SameNumbers(*before->second.numbers, *part.numbers)) {
    round.repeats.erase(rank);
  } else {
    must_answer_.push_back(part.key);
  }
}

bool Model::MayRepeat(Rank rank, absl::Time now) const {
  const bool joins_anew = frame_ != nullptr && frame_->join.has_value() && frame_->join->rank == rank &&
                          AsNew(*frame_->join).incarnation == 0 && WhyRefused(*frame_->join).empty();
  if (joins_anew) return waits();
  const auto member = members_.find(rank);
  if (member == members_.end() || (member->second.incarnation == 0 && !member->second.left)) return true;
  if (member->second.left || Left(rank)) return false;
  // By the policy WAIT it may have taken a predecessor's place, and be at an earlier step.
  return (member->second.catching_up || waits()) && !GivenUp(rank, now);
}

std::vector<RoundKey> Model::NewestRounds() const {
  std::map<std::pair<std::string, core::Phase>, uint64_t> newest;
  const auto note = [&newest](const RoundKey& key) {
    uint64_t& sequence = newest.emplace(std::make_pair(key.layer, key.phase), key.sequence).first->second;
    sequence = std::max(sequence, key.sequence);
  };
  for (const auto& [key, ended] : ended_) {
    if (!ended.outcome->error.has_value()) note(key);
  }
  for (const auto& [key, restored] : restored_) note(key);
  std::vector<RoundKey> rounds;
  for (const auto& [of, sequence] : newest) rounds.push_back({of.first, sequence, of.second});
  return rounds;
}

bool Model::EveryoneHasCaughtUp() const {
  for (Rank rank = 0; rank < settings_.world_size; ++rank) {
    const auto member = members_.find(rank);
    if (member == members_.end()) return false;
    if (member->second.left) continue;
    if (member->second.stream == 0 || member->second.catching_up) return false;
  }
  return true;
}

void Model::DropIdle(std::optional<absl::Time> now) {
  for (auto round = pending_.begin(); round != pending_.end();) {
    const bool due = !now.has_value() || *now >= round->second.begun + *settings_.config.round_timeout;
    round = round->second.idle() && due ? pending_.erase(round) : std::next(round);
  }
}

void Model::NoteForgotten(Rank rank, const RoundKey& key) {
  uint64_t& greatest = forgotten_[{key.layer, key.phase}][rank];
  greatest = std::max(greatest, key.sequence);
}

bool Model::MayHaveForgotten(Rank rank, const RoundKey& key) const {
  const auto forgotten = forgotten_.find({key.layer, key.phase});
  if (forgotten == forgotten_.end()) return false;
  const auto greatest = forgotten->second.find(rank);
  if (greatest == forgotten->second.end() || key.sequence > greatest->second) return false;
  if (key.phase != core::Phase::kBackward) return true;
  const auto holders = holders_.find({key.layer, key.sequence, core::Phase::kForward});
  if (holders == holders_.end() || holders->second.count(rank) != 0) return false;
  std::vector<Rank> contributors;
  int64_t count = 0;
  bool required = false;
  return FindForward(key, &contributors, &count, &required) &&
         std::count(contributors.begin(), contributors.end(), rank) != 0;
}

bool Model::Forgotten(const RoundKey& key) const {
  for (Rank rank = 0; rank < settings_.world_size; ++rank) {
    if (MayHaveForgotten(rank, key)) return true;
  }
  return false;
}

size_t Model::InFlight() const {
  return static_cast<size_t>(
      std::count_if(pending_.begin(), pending_.end(), [](const auto& round) { return !round.second.idle(); }));
}

void Model::Take(Rank rank, const Part& part, absl::Time now) {
  if (ended_.count(part.key) != 0) {
    must_answer_.push_back(part.key);
    return;
  }
  if (restored_.count(part.key) != 0) return TakeRestored(rank, part, now);
  const uint64_t incarnation = members_[rank].incarnation;
  auto round = pending_.find(part.key);
  if (round == pending_.end()) {
    Pending fresh;
    fresh.begun = now;
    if (part.key.phase == core::Phase::kBackward) {
      bool required = false;
      FindForward(part.key, &fresh.expected, &fresh.forward_count, &required);
    } else {
      for (Rank r = 0; r < settings_.world_size; ++r) fresh.expected.push_back(r);
    }
    round = pending_.emplace(part.key, std::move(fresh)).first;
  }
  const auto before = round->second.parts.find(rank);
  if (before != round->second.parts.end()) {
    if (SameNumbers(*before->second.numbers, *part.numbers)) {
      before->second.incarnation = incarnation;
      return NoteStraddling(rank, &round->second);
    }
    if (before->second.incarnation == incarnation) {
      must_answer_.push_back(part.key);
      return;
    }
  }
  added_[part.key] = before == round->second.parts.end() ? std::nullopt : std::optional<Held>(before->second);
  round->second.parts[rank] = Held{incarnation, part.numbers};
  NoteStraddling(rank, &round->second);
}

void Model::NoteStraddling(Rank rank, Pending* round) const {
  if (!members_.at(rank).catching_up) return;
  round->straddles = true;
  round->left.insert(frame_->left_ranks.begin(), frame_->left_ranks.end());
}

std::vector<Rank> Model::TakenAlong(const Pending& round) const {
  std::vector<Rank> ranks;
  for (const Rank rank : Missing(round)) {
    const auto member = members_.find(rank);
    if (member == members_.end() || !member->second.left_before) continue;
    if (round.straddles && round.left.count(rank) == 0) ranks.push_back(rank);
  }
  return ranks;
}

// ---- What it answers ------------------------------------------------------------------------------------------------

void Model::After(const core::Effects& effects, const core::Coordinator& coordinator, absl::Time now) {
  for (const core::Effect& effect : effects) {
    std::visit([&](const auto& e) { Check(e, now); }, effect);
  }
  CheckOutcomes();
  CheckTold();
  if (all_caught_up_now_) DropIdle(std::nullopt);
  if (coordinator.NextDeadline() > now) CheckWaiting(now);  // Else it has not done all that is due.
  size_t in_flight = 0;
  for (const core::GroupSummary& group : coordinator.ListGroups()) in_flight += group.rounds_in_flight;
  if (in_flight != InFlight()) {
    Violate(absl::StrCat(in_flight, " rounds are in flight, and ", InFlight(), " should be"));
  }
}

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
  if (joined.stream != sender_.stream || frame_ == nullptr || !frame_->join.has_value() || !Open(joined.stream)) {
    return Violate(absl::StrCat("stream ", joined.stream, " is told joined, and has not asked"));
  }
  const core::Join join = AsNew(joining_.at(joined.stream));
  CheckRunOf(joined, join);
  if (Intrudes(join)) Violate(absl::StrCat("rank ", join.rank, " is seated with other layers"));
  refused_.erase(join.rank);
  Member& member = members_[join.rank];
  if (member.stream != 0) Violate(absl::StrCat("rank ", join.rank, " holds two seats"));
  if (joined.newest_rounds != (join.incarnation == 0 ? NewestRounds() : std::vector<RoundKey>())) {
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
      refused_.erase(rank);
    }
  }
  member = Member();
  member.catching_up = catching_up;
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
  }
}

void Model::Check(const core::CloseStream& close, absl::Time now) {
  const auto rank = SeatOf(close.stream);
  if (!closed_.insert(close.stream).second) return;
  if (!rank.has_value()) return CheckRefusedJoin(close);
  const std::string reason = close.error.has_value() ? close.error->reason : "";
  Member& member = members_[*rank];
  member.stream = 0;
  member.blocked_on.clear();
  if (reason.empty()) {
    if (close.stream != sender_.stream || !sender_.leaves) Violate("a stream is closed without a reason or a leave");
    member.left = true;
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

void Model::Check(const core::SendLateRounds& late, absl::Time now) {
  for (const core::LateRound& told : late.rounds) {
    const auto found = pending_.find(told.key);
    if (found == pending_.end() || found->second.told_late) {
      return Violate(absl::StrCat(Name(told.key), " is late, and has ended, or has been told"));
    }
    Pending& round = found->second;
    round.told_late = true;
    ++tally_.late;
    std::vector<Rank> missing = Missing(round);
    missing.erase(std::remove_if(missing.begin(), missing.end(), [this](Rank rank) { return Left(rank); }),
                  missing.end());
    std::vector<StreamId> streams;
    for (const auto& [rank, held] : round.parts) {
      if (Present(rank) && round.repeats.count(rank) == 0) streams.push_back(members_[rank].stream);
    }
    for (const Rank rank : round.latecomers) {
      if (Present(rank)) streams.push_back(members_[rank].stream);
    }
    if (told.age != now - round.begun || told.age < SimulatedLimits().late_round_after ||
        told.missing_ranks != missing || told.missing != missing.size() || late.streams != streams) {
      Violate(absl::StrCat(Name(told.key), " is late in other ways than is told"));
    }
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
    if (InFlight() != 0) Violate("a group ends before its rounds");
  }
  over_run_id_ = run_id_;
  run_id_ = 0;
  resumed_ = continues_ = false;
  completions_ = 0;
  restored_.clear();
  forgotten_.clear();
  holders_.clear();
  refused_.clear();
  members_.clear();
  pending_.clear();
  ended_.clear();
  running_.clear();
  completed_.clear();
}

void Model::Check(const core::SendResults& results, absl::Time) {
  for (const StreamId stream : results.streams) {
    if (!Open(stream) || !SeatOf(stream).has_value()) {
      return Violate(absl::StrCat("results go to stream ", stream, ", which is closed"));
    }
  }
  for (const auto& outcome : results.outcomes) {
    if (outcome->refused && (restored_.count(outcome->key) == 0 || IsRefusal(outcome->error->reason))) {
      if (results.streams.size() != 1) Violate("a refusal goes to several workers");
      CheckRefusal(results.streams[0], *outcome);
    } else {
      outcomes_.push_back({&results, outcome.get()});
    }
  }
}

// Results that go to the same streams share a frame, so one may come before the news that its round has ended.
void Model::CheckOutcomes() {
  for (const auto& [results, outcome] : outcomes_) {
    if (const auto lost = lost_now_.find(outcome->key); lost != lost_now_.end()) {
      if (!testing::SameOutcome(*lost->second, *outcome)) Violate("a lost outcome is told in another way");
      for (const StreamId stream : results->streams) told_.insert({stream, outcome->key});
      continue;
    }
    const auto ended = ended_.find(outcome->key);
    if (ended == ended_.end() || !testing::SameOutcome(*ended->second.outcome, *outcome)) {
      return Violate(absl::StrCat("an outcome of ", Name(outcome->key), " that is not the one it ended with"));
    }
    if (ended_now_.count(outcome->key) == 0) ++tally_.replayed;
    for (const StreamId stream : results->streams) told_.insert({stream, outcome->key});
  }
}

void Model::CheckRefusal(StreamId stream, const core::RoundOutcome& outcome) {
  const std::string reason = outcome.error->reason;
  ++tally_.refused[reason];
  const Part* sent = nullptr;
  if (frame_ != nullptr && stream == sender_.stream) {
    for (const Part& part : frame_->parts) {
      if (part.key == outcome.key) sent = &part;
    }
  }
  if (sent == nullptr) return Violate(absl::StrCat(reason, " of ", Name(outcome.key), " for one who has not sent it"));
  if (added_.count(outcome.key) != 0) {
    const auto round = pending_.find(outcome.key);
    if (round == pending_.end()) {
      // The frame's declarations had ended the round before its contribution came.
      const std::optional<Held>& replaced = added_[outcome.key];
      if (!replaced.has_value()) return Violate(absl::StrCat(reason, " of ", Name(outcome.key), " after its end"));
      ended_[outcome.key].parts[sender_.rank] = *replaced;
    } else {
      round->second.parts.erase(sender_.rank);
      if (round->second.parts.empty()) pending_.erase(round);
    }
    added_.erase(outcome.key);
  }
  told_.insert({stream, outcome.key});
  if (!RefusalIsDue(sender_.rank, *sent, reason)) {
    Violate(absl::StrCat(reason, " of ", Name(outcome.key), " for rank ", sender_.rank, " is not due"));
  }
}

bool Model::RefusalIsDue(Rank rank, const Part& part, const std::string& reason) const {
  const auto ended = ended_.find(part.key);
  std::vector<Rank> contributors;
  int64_t count = 0;
  bool required = false;
  const bool forward_completed = FindForward(part.key, &contributors, &count, &required);
  if (reason == "OUTCOME_LOST") return Forgotten(part.key);
  if (reason == "PAYLOAD_CHANGED") {
    if (restored_.count(part.key) != 0 && Bad(part, settings_.LayerOf(part.key))) return true;
    const auto round = pending_.find(part.key);
    if (ended == ended_.end() && round == pending_.end()) return false;
    const HeldParts& parts = ended != ended_.end() ? ended->second.parts : round->second.parts;
    const auto before = parts.find(rank);
    return before != parts.end() && !SameNumbers(*before->second.numbers, *part.numbers);
  }
  if (part.key.phase != core::Phase::kBackward) return false;
  if (reason == "FORWARD_ROUND_UNKNOWN") return !forward_completed;
  if (reason != "NOT_A_CONTRIBUTOR" || !forward_completed) return false;
  return !std::count(contributors.begin(), contributors.end(), rank) || !required;
}

// ---- How rounds end -------------------------------------------------------------------------------------------------

void Model::Check(const core::RoundEnded& ended, absl::Time now) {
  const core::RoundOutcome& outcome = *ended.outcome;
  const auto found = pending_.find(outcome.key);
  if (found == pending_.end()) {
    return Violate(absl::StrCat(Name(outcome.key), ended_.count(outcome.key) != 0 ? " ends twice" : " has not begun"));
  }
  Pending& round = found->second;
  // A frame's declarations count before its contributions, which then come to a round that they have ended.
  const bool disputed = outcome.error.has_value() && outcome.error->reason == std::string("LAYER_SPEC_MISMATCH");
  if (disputed && ended.contributors + 1 == round.parts.size() && added_.erase(outcome.key) != 0) {
    round.parts.erase(sender_.rank);
    must_answer_.push_back(outcome.key);
  }
  if (ended.contributors != round.parts.size() && !round.restored)
    Violate(absl::StrCat(Name(outcome.key), " miscounts contributors"));
  const bool miscounted = ended.duration != now - round.begun && !round.restored;
  if (miscounted || ended.duration > *settings_.config.round_timeout) {
    Violate(absl::StrCat(Name(outcome.key), " lasted ", absl::FormatDuration(now - round.begun)));
  }
  if (outcome.error.has_value()) {
    ++tally_.failed[outcome.error->reason];
    CheckFailure(outcome, round, now);
  } else {
    ++tally_.completed;
    ++completions_;
    if (round.restored && !round.idle()) ++tally_.restored;
    completed_.insert(outcome.key.layer);
    if (outcome.key.sequence >= settings_.redeclared_at.value_or(UINT64_MAX)) ++tally_.redeclared;
    CheckCompletion(outcome, round, now);
  }
  for (const auto& [rank, held] : round.parts) {
    if (Present(rank) && round.repeats.count(rank) == 0) to_tell_.push_back({members_[rank].stream, outcome.key});
  }
  for (const Rank rank : round.latecomers) {
    if (Present(rank)) to_tell_.push_back({members_[rank].stream, outcome.key});
  }
  if (round.restored && outcome.error.has_value()) {
    lost_now_[outcome.key] = ended.outcome.get();
    if (!outcome.refused) Violate(absl::StrCat(Name(outcome.key), " ends again in another way"));
  } else {
    ended_now_.insert(outcome.key);
    ended_[outcome.key] = Ended{ended.outcome, round.parts};
    restored_.erase(outcome.key);
  }
  // The report of a frame may end a round before the repeat that comes with it, which then waits alone.
  const auto repeat = round.parts.find(sender_.rank);
  const bool after = round.restored && outcome.error.has_value() && frame_ != nullptr && sender_.seated &&
                     ended.contributors < round.parts.size() && round.repeats.count(sender_.rank) != 0;
  const std::optional<Held> left_over = after ? std::optional<Held>(repeat->second) : std::nullopt;
  pending_.erase(found);
  if (!left_over.has_value()) return;
  Pending& again = PendingRestored(outcome.key, now);
  again.parts.emplace(sender_.rank, *left_over);
  again.repeats.insert(sender_.rank);
}

void Model::CheckFailure(const core::RoundOutcome& outcome, const Pending& round, absl::Time now) {
  const core::Error& error = *outcome.error;
  const std::string reason = error.reason;
  const std::vector<Rank> missing = Missing(round);
  // A member has said that it had failed with this error.
  if (frame_ != nullptr && std::any_of(frame_->parts.begin(), frame_->parts.end(), [&](const Part& part) {
        return part.key == outcome.key && part.report != nullptr && part.report->error.has_value();
      })) {
    return;
  }
  std::vector<Rank> awaited;
  std::vector<Rank> lost;
  for (const Rank rank : missing) {
    if (Left(rank)) continue;
    awaited.push_back(rank);
    if (GivenUp(rank, now)) lost.push_back(rank);
  }
  const bool late = now >= round.begun + *settings_.config.round_timeout;
  bool due = false;
  if (reason == "OUTCOME_LOST") {
    deadlock_now_ = deadlock_now_ || Deadlocked();
    const bool forgotten = error.ranks.size() == 1 && MayHaveForgotten(error.ranks[0], outcome.key);
    const bool over = late || lost.size() == awaited.size();
    const bool taken_along = over && !error.ranks.empty() && error.ranks == TakenAlong(round);
    due = forgotten || (round.restored && !error.ranks.empty()) || taken_along;
    for (const Rank rank : error.ranks) {
      if (!forgotten && !late && !deadlock_now_ && MayRepeat(rank, now)) due = false;
    }
    // Some change their numbers, or give others than their predecessors. CheckOutcome of the world knows where none
    // does.
    if (round.restored && error.ranks.empty()) due = true;
  } else if (reason == "ROUND_TIMEOUT") {
    due = !proceeds() && late && error.ranks == awaited;
  } else if (reason == "TOO_FEW_WORKERS") {
    const size_t possible = round.parts.size() + (late ? 0 : awaited.size() - lost.size());
    due = proceeds() && possible < Least(round);
  } else if (reason == "WORKER_LOST") {
    const bool restart = frame_ != nullptr && frame_->join.has_value();
    const std::vector<Rank> reborn = {restart ? frame_->join->rank : settings_.world_size};
    due = !proceeds() && !error.ranks.empty() &&
          (error.ranks == lost ||
           (!waits() && error.ranks == reborn && std::count(missing.begin(), missing.end(), reborn[0])));
  } else if (reason == "LAYER_SET_MISMATCH") {
    const bool refused = error.ranks.size() == 1 && refused_.count(error.ranks[0]) != 0;
    due = !proceeds() && refused && std::count(awaited.begin(), awaited.end(), error.ranks[0]) != 0;
  } else if (reason == "LAYER_SPEC_MISMATCH") {
    due = MayDisagree(outcome.key.layer);
  } else if (reason == "DEADLOCK") {
    deadlock_now_ = deadlock_now_ || Deadlocked();
    due = deadlock_now_ && error.ranks == missing;
  } else if (reason == "NOT_FINITE" || reason == "INVALID_CONTRIBUTION") {
    const auto part = error.ranks.size() == 1 ? round.parts.find(error.ranks[0]) : round.parts.end();
    due = part != round.parts.end() && Bad({outcome.key, part->second.numbers}, settings_.LayerOf(outcome.key));
  } else if (reason == "GROUP_ENDED") {
    due = std::none_of(members_.begin(), members_.end(), [](const auto& entry) { return entry.second.stream != 0; });
  }
  if (!due) {
    Violate(absl::StrCat(Name(outcome.key), " fails with ", reason, " (ranks ", absl::StrJoin(error.ranks, ","),
                         "), which is not due"));
  }
}

void Model::CheckCompletion(const core::RoundOutcome& outcome, const Pending& round, absl::Time now) {
  const std::vector<Rank> missing = Missing(round);
  if (round.restored) {
    const core::EndedReport& report = restored_.at(outcome.key).report;
    if (outcome.digest != report.digest || outcome.missing_ranks != report.missing_ranks) {
      Violate(absl::StrCat(Name(outcome.key), " completes otherwise than under the master before"));
    }
    if (!missing.empty()) return;  // The books do not have what was dropped.
  } else if (outcome.missing_ranks != missing) {
    Violate(absl::StrCat(Name(outcome.key), " names the wrong missing ranks"));
  }
  const bool late = now >= round.begun + *settings_.config.round_timeout;
  for (const Rank rank : missing) {
    if (Left(rank) || (proceeds() && (late || GivenUp(rank, now)))) continue;
    Violate(absl::StrCat(Name(outcome.key), " completes without rank ", rank));
  }
  for (const Rank rank : missing) {
    if (round.restored || !MayHaveForgotten(rank, outcome.key)) continue;
    Violate(absl::StrCat(Name(outcome.key), " completes without rank ", rank, ", which may have forgotten its end"));
  }
  if (!round.restored && !TakenAlong(round).empty()) {
    Violate(absl::StrCat(Name(outcome.key), " completes without ranks that may have contributed before"));
  }
  if (proceeds() && !round.restored && round.parts.size() < Least(round))
    Violate(absl::StrCat(Name(outcome.key), " has too few workers"));
  if (!missing.empty()) ++tally_.partial;
  if (round.straddles && !round.restored &&
      std::any_of(missing.begin(), missing.end(), [this](Rank rank) { return members_[rank].left_before; })) {
    ++tally_.outlived;
  }
  bool required = false;
  for (const auto& [rank, held] : round.parts) {
    if (Bad({outcome.key, held.numbers}, settings_.LayerOf(outcome.key))) {
      return Violate(absl::StrCat(Name(outcome.key), " completes with bad numbers"));
    }
    required = required || held.numbers->role == core::BackwardRole::kRequired;
  }
  if (outcome.key.phase == core::Phase::kForward && outcome.backward_required != required) {
    Violate(absl::StrCat(Name(outcome.key), " is wrong about its backward round"));
  }
  const Merged merged = Merge(outcome.key, round.parts, round.forward_count);
  CheckNumbers(outcome, merged);
  if (outcome.key.phase == core::Phase::kForward) UpdateRunning(outcome.key, merged);
}

void Model::CheckNumbers(const core::RoundOutcome& outcome, const Merged& merged) {
  if (outcome.count != merged.count || outcome.first.size() != merged.first.size() ||
      outcome.second.size() != merged.second.size()) {
    return Violate(absl::StrCat(Name(outcome.key), " is merged to another size"));
  }
  const auto check = [&](const char* which, const auto& actual, const auto& expected, const auto& scale) {
    for (size_t c = 0; c < expected.size(); ++c) {
      if (Near(actual[c], expected[c], scale[c])) continue;
      Violate(absl::StrFormat("%s is merged wrongly: %s number %d is %.17g, not %.20Lg", Name(outcome.key), which, c,
                              actual[c], expected[c]));
    }
  };
  check("first", outcome.first, merged.first, merged.first_scale);
  check("second", outcome.second, merged.second, merged.second_scale);
}

Model::Merged Model::Merge(const RoundKey& key, const HeldParts& parts, int64_t forward_count) const {
  const uint32_t channels = settings_.LayerOf(key).channels;
  Merged merged;
  merged.count = key.phase == core::Phase::kBackward ? forward_count : 0;
  for (uint32_t c = 0; c < channels; ++c) {
    if (key.phase == core::Phase::kForward) {
      std::vector<testing::ExactMoments> moments;
      long double scale = 0.0L;
      for (const auto& [rank, held] : parts) {
        const testing::Numbers& numbers = *held.numbers;
        if (numbers.count == 0) continue;
        moments.push_back({numbers.count, numbers.first[c], numbers.second[c]});
        scale = std::max(scale, std::fabs(static_cast<long double>(numbers.first[c])));
      }
      const testing::ExactMoments pooled = testing::Pool(moments);
      const long double var = pooled.count == 0 ? 0.0L : pooled.m2 / pooled.count;
      merged.count = pooled.count;
      merged.first.push_back(pooled.mean);
      merged.second.push_back(var);
      merged.first_scale.push_back(scale);
      // The mean of the first ranks is rounded by 1e-16 of itself, and the deviation of the next rank from it by as
      // much: 1e-6 of the scale would do.
      merged.second_scale.push_back(var + 1e-5L * scale * std::sqrt(var));
      continue;
    }
    long double sums[2] = {0.0L, 0.0L};
    long double scales[2] = {0.0L, 0.0L};
    for (const auto& [rank, held] : parts) {
      const std::vector<double>* vectors[2] = {&held.numbers->first, &held.numbers->second};
      for (int i = 0; i < 2; ++i) {
        if (vectors[i]->empty()) continue;
        sums[i] += (*vectors[i])[c];
        scales[i] += std::fabs(static_cast<long double>((*vectors[i])[c]));
      }
    }
    merged.first.push_back(sums[0]);
    merged.first_scale.push_back(scales[0]);
    if (key.phase == core::Phase::kSum) continue;
    merged.second.push_back(sums[1]);
    merged.second_scale.push_back(scales[1]);
  }
  return merged;
}

void Model::UpdateRunning(const RoundKey& key, const Merged& merged) {
  Running& running = running_[key.layer];
  const bool later = key.sequence >= settings_.redeclared_at.value_or(UINT64_MAX);
  running.mixed = running.mixed || (running.any_later && !later);
  running.any_later = running.any_later || later;
  if (merged.count == 0) return;
  const core::LayerSpec& spec = settings_.LayerOf(key);
  // Begun anew with another number of channels; what comes late from before does not count.
  if (!running.mean.empty() && running.mean.size() != spec.channels) {
    running.mixed = running.mixed || running.later;
    running = Running{{}, {}, 0, false, running.mixed, running.any_later};
  }
  running.later = later;
  running.mean.resize(spec.channels, 0.0L);
  running.var.resize(spec.channels, 1.0L);
  ++running.updates;
  const long double weight = spec.momentum.has_value() ? *spec.momentum : 1.0L / running.updates;
  for (uint32_t c = 0; c < spec.channels; ++c) {
    running.mean[c] += weight * (merged.first[c] - running.mean[c]);
    if (merged.count == 1 && !spec.biased_running_variance) continue;
    const long double n = merged.count;
    const long double var = spec.biased_running_variance ? merged.second[c] : merged.second[c] * n / (n - 1);
    running.var[c] += weight * (var - running.var[c]);
  }
}

// ---- After an event -------------------------------------------------------------------------------------------------

void Model::CheckTold() {
  for (const auto& [stream, key] : to_tell_) {
    if (told_.count({stream, key}) == 0) Violate(absl::StrCat("stream ", stream, " is not told of ", Name(key)));
  }
  for (const RoundKey& key : must_answer_) {
    if (told_.count({sender_.stream, key}) == 0) Violate(absl::StrCat("a replay of ", Name(key), " is not answered"));
  }
}

void Model::CheckWaiting(absl::Time now) {
  for (const auto& [key, round] : pending_) {
    if (round.idle()) continue;
    if (round.restored) {
      for (const Rank rank : Missing(round)) {
        if (!MayRepeat(rank, now - absl::Nanoseconds(1))) {
          Violate(absl::StrCat(Name(key), " waits for rank ", rank, ", which cannot repeat its contribution"));
        }
      }
    }
    size_t awaited = 0;
    size_t lost = 0;
    for (const Rank rank : Missing(round)) {
      if (Left(rank)) continue;
      // The worker that a restored round waits for may still come, whoever has claimed its rank in between.
      const bool in_vain_for = refused_.count(rank) != 0 && !proceeds() && !round.restored;
      if (in_vain_for) Violate(absl::StrCat(Name(key), " waits for one that was refused"));
      // On the stroke of the grace or the deadline, its alarm may be the next event.
      (GivenUp(rank, now - absl::Nanoseconds(1)) ? lost : awaited) += 1;
    }
    for (const Rank rank : Missing(round)) {
      if (round.restored || !MayHaveForgotten(rank, key)) continue;
      Violate(absl::StrCat(Name(key), " waits for rank ", rank, ", which may have forgotten its end"));
    }
    const bool in_vain = awaited == 0 || (lost != 0 && !proceeds()) ||
                         (proceeds() && TakenAlong(round).empty() && round.parts.size() + awaited < Least(round));
    if (in_vain && !round.restored) {
      Violate(absl::StrCat(Name(key), " waits for nobody who could come"));
    }
    if (now > round.begun + *settings_.config.round_timeout) Violate(absl::StrCat(Name(key), " outlives its deadline"));
    const absl::Duration late = std::min(SimulatedLimits().late_round_after, *settings_.config.round_timeout);
    if (!round.told_late && now > round.begun + late) Violate(absl::StrCat(Name(key), " waits, and nobody is told"));
    for (const auto& [rank, held] : round.parts) {
      if (Bad({key, held.numbers}, settings_.LayerOf(key))) Violate(absl::StrCat(Name(key), " waits with bad numbers"));
      if (!std::count(round.expected.begin(), round.expected.end(), rank)) {
        Violate(absl::StrCat(Name(key), " takes numbers of rank ", rank, ", which is no contributor"));
      }
    }
  }
  if (Deadlocked()) Violate("everyone is blocked, and nobody is told");
}

void Model::CheckStatistics(const core::Coordinator& coordinator) {
  for (const core::GroupSummary& group : coordinator.ListGroups()) {
    for (const core::LayerSpec& spec : settings_.layers) {
      if (const auto view = coordinator.GetLayer(group.id, spec.name); view.ok()) CheckRunning(spec.name, *view);
    }
  }
}

void Model::CheckRunning(const std::string& layer, const core::LayerView& view) {
  const Running& running = running_[layer];
  if (running.mixed) return;
  // Nothing is shown of statistics that are of another size than the layer has come to have.
  const bool shown = running.mean.empty() || view.running.mean.size() == running.mean.size();
  if (!shown && view.running.updates == 0) return;
  bool right = shown && view.running.updates == running.updates;
  for (size_t c = 0; right && c < running.mean.size(); ++c) {
    right = Near(view.running.mean[c], running.mean[c], 1.0L + std::fabs(running.mean[c])) &&
            Near(view.running.var[c], running.var[c], 1.0L + std::fabs(running.var[c]));
  }
  if (!right) Violate(absl::StrCat("the running statistics of ", layer, " are not those of its rounds"));
}

void Model::CheckEmpty(const core::Coordinator& coordinator) {
  if (!coordinator.ListGroups().empty()) Violate("an abandoned group is kept");
  if (coordinator.NextDeadline() != absl::InfiniteFuture()) Violate("an empty coordinator waits for something");
}

// ---- The books ------------------------------------------------------------------------------------------------------

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

bool Model::Blocked(Rank rank) const {
  const std::vector<RoundKey>& keys = members_.at(rank).blocked_on;
  return !keys.empty() && std::all_of(keys.begin(), keys.end(), [&](const RoundKey& key) {
    const auto round = pending_.find(key);
    return round != pending_.end() &&
           (round->second.parts.count(rank) != 0 || round->second.latecomers.count(rank) != 0);
  });
}

bool Model::Deadlocked() const {
  size_t blocked = 0;
  for (Rank rank = 0; rank < settings_.world_size; ++rank) {
    if (Left(rank)) continue;
    if (!Present(rank) || !Blocked(rank) || members_.at(rank).catching_up) return false;
    ++blocked;
  }
  return blocked != 0;
}

size_t Model::Least(const Pending& round) const {
  return proceeds() ? std::min<size_t>(settings_.config.min_workers, round.expected.size()) : 0;
}

std::vector<Rank> Model::Missing(const Pending& round) const {
  std::vector<Rank> missing;
  for (const Rank rank : round.expected) {
    if (round.parts.count(rank) == 0) missing.push_back(rank);
  }
  return missing;
}

bool Model::Bad(const Part& part, const core::LayerSpec& spec) {
  const testing::Numbers& numbers = *part.numbers;
  const bool may_be_empty =
      part.key.phase == core::Phase::kBackward || (part.key.phase == core::Phase::kForward && numbers.count == 0);
  const size_t second = part.key.phase == core::Phase::kSum ? 0 : spec.channels;
  const auto fits = [&](const std::vector<double>& vector, size_t length) {
    return vector.size() == length || (vector.empty() && may_be_empty);
  };
  if (!fits(numbers.first, spec.channels) || !fits(numbers.second, second) || numbers.count < 0) return true;
  if (part.key.phase != core::Phase::kForward) return false;  // They take any value.
  for (const double value : numbers.first) {
    if (!std::isfinite(value)) return true;
  }
  for (const double value : numbers.second) {
    if (!std::isfinite(value) || value < 0.0) return true;
  }
  return false;
}

}  // namespace syncbn::simulation
