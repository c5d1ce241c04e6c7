#include "tests/simulation/model.h"

#include <algorithm>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"

namespace syncbn::simulation {
namespace {

using core::Rank;
using core::RoundKey;
using core::StreamId;

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
  settled_now_.clear();
  deadlock_now_ = diverged_now_ = all_caught_up_now_ = false;
  lost_now_.clear();
  deadlock_number_.reset();
}

void Model::Violate(const std::string& what) {
  if (!violation_.has_value()) violation_ = what;
}

void Model::BeforeFrame(StreamId stream, const Frame& frame, absl::Time now) {
  Begin();
  sender_.stream = stream;
  frame_ = &frame;
  NoteSent(frame);
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
  departures_.erase(stream);
  if (!rank.has_value()) return;
  Member& member = members_[*rank];
  member.stream = 0;
  member.blocked_on.clear();
  if (std::exchange(member.had_left, false)) {
    member.left = true;
    member.left_before = member.had_left_before;
    ++tally_.left_again;
  } else {
    member.lost_at = now;
  }
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
  if (!frame_->join.has_value()) members_[rank].had_left = false;
  for (const core::LayerSpec& spec : frame_->layers) members_[rank].channels[spec.name] = spec.channels;
  for (const Part& part : frame_->parts) {
    if (part.report == nullptr || TakeReport(rank, *part.report)) continue;
    diverged_now_ = true;
    ++tally_.diverged;
    return;
  }
  for (const Part& part : frame_->parts) {
    history_.NoteHolder(rank, part.key);
    if (part.report == nullptr) {
      Take(rank, part, now);
    } else if (!part.report->error.has_value()) {
      TakeRepeat(rank, part, now);
    }
  }
  NoteRead();
  if (frame_->caught_up) members_[rank].returning = false;
  if (frame_->caught_up && std::exchange(members_[rank].catching_up, false)) {
    for (const RoundKey& key : frame_->forgotten) history_.NoteForgotten(rank, key);
    all_caught_up_now_ = EveryoneHasCaughtUp() && !waits();
  }
  members_[rank].blocked_on = frame_->blocked_on;
}

void Model::Take(Rank rank, const Part& part, absl::Time now) {
  if (history_.FindEnded(part.key) != nullptr) {
    must_answer_.push_back(part.key);
    return;
  }
  if (history_.FindRestored(part.key) != nullptr) return TakeRestored(rank, part, now);
  const uint64_t incarnation = members_[rank].incarnation;
  auto round = pending_.find(part.key);
  if (round == pending_.end()) {
    Pending fresh;
    fresh.begun = now;
    if (part.key.phase == core::Phase::kBackward) {
      const ForwardRound forward = history_.FindForward(part.key).value_or(ForwardRound());
      fresh.expected = forward.contributors;
      fresh.forward_count = forward.count;
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
  Added& added = added_[part.key] = {std::nullopt, round->second.straddles, round->second.left};
  if (before != round->second.parts.end()) added.replaced = before->second;
  round->second.parts[rank] = Hold(rank, part);
  NoteStraddling(rank, &round->second);
}

void Model::After(const core::Effects& effects, const core::Coordinator& coordinator, absl::Time now) {
  now_ = now;
  group_ends_now_ = std::any_of(effects.begin(), effects.end(), [](const core::Effect& effect) {
    return std::holds_alternative<core::GroupEnded>(effect);
  });
  for (const core::Effect& effect : effects) {
    std::visit([&](const auto& e) { Check(e, now); }, effect);
  }
  CheckOutcomes();
  CheckTold();
  if (sender_.seated && sender_.leaves && Open(sender_.stream)) NoteDeparture(now);
  if (all_caught_up_now_) DropIdle(std::nullopt);
  if (coordinator.NextDeadline() > now) CheckWaiting(now);  // Else it has not done all that is due.
  size_t in_flight = 0;
  for (const core::GroupSummary& group : coordinator.ListGroups()) in_flight += group.rounds_in_flight;
  if (in_flight != InFlight()) {
    Violate(absl::StrCat(in_flight, " rounds are in flight, and ", InFlight(), " should be"));
  }
}

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
    const std::vector<Rank> missing = Missing(round);
    const bool taken_along = !TakenAlong(round).empty();
    if (round.restored) {
      for (const Rank rank : missing) {
        if (!MayRepeat(rank, now - absl::Nanoseconds(1))) {
          Violate(absl::StrCat(Name(key), " waits for rank ", rank, ", which cannot repeat its contribution"));
        }
      }
    }
    size_t awaited = 0;
    size_t lost = 0;
    for (const Rank rank : missing) {
      if (Left(rank)) continue;
      // The worker that a restored round waits for may still come, whoever has claimed its rank in between.
      const bool in_vain_for = refused_.count(rank) != 0 && !proceeds() && !round.restored;
      if (in_vain_for) Violate(absl::StrCat(Name(key), " waits for one that was refused"));
      // On the stroke of the grace or the deadline, its alarm may be the next event.
      (GivenUp(rank, now - absl::Nanoseconds(1)) ? lost : awaited) += 1;
    }
    for (const Rank rank : missing) {
      if (round.restored || !history_.MayHaveForgotten(rank, key)) continue;
      Violate(absl::StrCat(Name(key), " waits for rank ", rank, ", which may have forgotten its end"));
    }
    // One that has taken its part along may come back.
    const bool hopes = taken_along && LeaversMayReturn(now);
    const bool in_vain = (awaited == 0 && !hopes) || (lost != 0 && !proceeds()) ||
                         (proceeds() && !taken_along && round.parts.size() + awaited < Least(round));
    if (in_vain && !round.restored) {
      Violate(absl::StrCat(Name(key), " waits for nobody who could come"));
    }
    if (now > round.begun + *settings_.config.round_timeout) Violate(absl::StrCat(Name(key), " outlives its deadline"));
    const absl::Duration late = std::min(SimulatedLimits().late_round_after, *settings_.config.round_timeout);
    if (!round.told_late && now > round.begun + late) Violate(absl::StrCat(Name(key), " waits, and nobody is told"));
    for (const auto& [rank, held] : round.parts) {
      if (held.bad) Violate(absl::StrCat(Name(key), " waits with bad numbers"));
      if (!std::count(round.expected.begin(), round.expected.end(), rank)) {
        Violate(absl::StrCat(Name(key), " takes numbers of rank ", rank, ", which is no contributor"));
      }
    }
  }
  if (Deadlocked()) Violate("everyone is blocked, and nobody is told");
  for (const auto& [stream, departure] : departures_) {
    if (now > departure.since + SimulatedLimits().max_leave_delay) Violate("a leave is not acknowledged in time");
  }
}

void Model::CheckStatistics(const core::Coordinator& coordinator) {
  for (const core::GroupSummary& group : coordinator.ListGroups()) {
    for (const core::LayerSpec& spec : settings_.layers) {
      const auto view = coordinator.GetLayer(group.id, spec.name);
      if (!view.ok() || running_[spec.name].Agrees(*view)) continue;
      Violate(absl::StrCat("the running statistics of ", spec.name, " are not those of its rounds"));
    }
  }
}

void Model::CheckEmpty(const core::Coordinator& coordinator) {
  if (!coordinator.ListGroups().empty()) Violate("an abandoned group is kept");
  if (coordinator.NextDeadline() != absl::InfiniteFuture()) Violate("an empty coordinator waits for something");
}

}  // namespace syncbn::simulation
