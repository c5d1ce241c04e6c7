#include "tests/simulation/checked_session.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/cc/errors.h"

namespace syncbn::simulation {
namespace {

using session::Effects;

// Bounds that proto/PROTOCOL.md and the client's documentation promise.
constexpr absl::Duration kFirstPause = absl::Milliseconds(10);
constexpr absl::Duration kLongestPause = absl::Seconds(1);
constexpr absl::Duration kConnectTimeout = absl::Seconds(5);
constexpr absl::Duration kLongStall = absl::Seconds(1);
constexpr absl::Duration kSayBlocked = absl::Milliseconds(20);
constexpr absl::Duration kSayBlockedIfUnsure = absl::Milliseconds(200);
constexpr absl::Duration kLeaveTimeout = absl::Seconds(2);
constexpr absl::Duration kLeastMargin = absl::Seconds(2);  // Beyond round_timeout, for a master's answer.
constexpr size_t kChunksUnderWay = 4;
constexpr size_t kMostHeldBytes = size_t{32} << 20;

session::Options MakeOptions(const Settings& settings, core::Rank rank) {
  session::Options options;
  options.rank = rank;
  options.join_timeout = settings.join_timeout;
  options.chunks = {kChunkElements, kChunkElements, /*under_way=*/0};
  if (!settings.complete_set) return options;
  for (const core::LayerSpec& spec : settings.layers) options.layers.push_back(spec);
  return options;
}

bool SameBits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

// A later attempt to join may succeed after these.
bool IsPassing(const std::string& reason) {
  return reason.empty() || reason == "SHUTTING_DOWN" || reason == "RANK_TAKEN";
}

}  // namespace

bool SameResult(const RoundResult& a, const RoundResult& b) {
  return a.count == b.count && a.backward_required == b.backward_required && a.missing_ranks == b.missing_ranks &&
         SameBits(a.first, b.first) && SameBits(a.second, b.second);
}

CheckedSession::CheckedSession(const Settings& settings, core::Rank rank, uint64_t first_sequence, absl::Time now,
                               SessionBug bug, Tally* tally)
    : settings_(settings),
      tally_(*tally),
      session_(MakeOptions(settings, rank), now, bug),
      pause_(kFirstPause),
      connect_at_(now),
      give_up_at_(now + settings.join_timeout),
      first_sequence_(first_sequence) {
  if (settings.complete_set) {
    for (const core::LayerSpec& spec : settings.layers) declared_[spec.name] = spec.channels;
  }
  if (!session_.ResumeAt(first_sequence).ok()) Violate("a session does not resume");
}

void CheckedSession::Violate(const std::string& what) {
  if (!violation_.has_value()) violation_ = absl::StrCat("session: ", what);
}

// ---- What happens ---------------------------------------------------------------------------------------------------

Effects CheckedSession::OnTime(absl::Time now) {
  const bool search = !open_ && !asked_ && now >= connect_at_ && now < give_up_at_;
  const bool give_up = !joined_ && now >= give_up_at_;
  const bool give_up_master = joined_ && AnswerIsDue(now);
  const bool was_ended = ended_;
  Effects effects = session_.OnTime(now);
  const Done done = Check(effects, now);
  if (was_ended) return effects;
  if (give_up && !done.ended.has_value()) Violate("it looks for a master beyond join_timeout");
  if (give_up_master && !done.ended.has_value()) Violate("it waits for a master that has been silent for too long");
  if (search && !done.searched) Violate("its pause is over, and it does not connect");
  return effects;
}

Effects CheckedSession::OnMasterFound(const absl::StatusOr<std::string>& targets, absl::Time now) {
  if (!targets.ok()) {
    asked_ = false;
    NoteBreak(/*joined=*/false, now);
    ++tally_.not_found;
  }
  searched_ = searched_ || targets.ok();
  Effects effects = session_.OnMasterFound(targets, now);
  Check(effects, now);
  if (targets.ok() && !open_ && !ended_) Violate("it was told where the master is, and does not connect");
  return effects;
}

Effects CheckedSession::OnStreamUp(absl::Time now) {
  up_ = true;
  Effects effects = session_.OnStreamUp();
  if (!Check(effects, now).wrote && !ended_) Violate("a stream is up, and it does not join");
  return effects;
}

Effects CheckedSession::OnFrame(const session::ServerFrame& frame, bool stale, absl::Time now) {
  if (!stale && !ended_) {
    frame_ = &frame;
    heard_at_ = now;
  }
  Effects effects = session_.OnFrame(frame, stale, now);
  Check(effects, now);
  if (frame_ == nullptr) return effects;
  frame_ = nullptr;
  if (frame.joined.has_value() && !joined_) Violate("it was let in, and does not notice");
  for (const session::Outcome& outcome : frame.outcomes) {
    for (const Round& round : rounds_) {
      if (round.contribution->key() == outcome.key) Violate(absl::StrCat(Name(outcome.key), " is lost"));
    }
  }
  if (frame.joined.has_value()) membership_ = frame.joined->membership.version;
  if (frame.membership.has_value()) membership_ = frame.membership->version;
  std::optional<size_t> present;
  if (frame.joined.has_value()) {
    present = frame.joined->membership.present_ranks;
    NoteLeft(frame.joined->membership.left_ranks);
  }
  if (frame.membership.has_value()) {
    present = frame.membership->present_ranks;
    NoteLeft(frame.membership->left_ranks);
  }
  if (present.has_value() && session_.present_ranks() != *present) Violate("it is wrong about who is present");
  return effects;
}

void CheckedSession::OnWritten() {
  writing_ = false;
  session_.OnWritten();
}

Effects CheckedSession::OnStreamBroken(const session::Break& why, absl::Time now) {
  // A master that goes away acknowledges no leave by that.
  const std::string reason = DetailsOf(why.status).reason;
  const bool left = leave_written_ && (why.status.ok() || (!reason.empty() && reason != "SHUTTING_DOWN"));
  const bool over = !IsPassing(reason);
  NoteBreak(joined_, now);
  open_ = up_ = join_written_ = joined_ = writing_ = must_retract_ = leave_written_ = false;
  said_.clear();
  all_said_ = false;
  membership_ = membership_said_ = 0;
  said_blocked_on_ = nullptr;
  for (Round& round : rounds_) {
    round.on_stream = false;
    if (round.first_sent.has_value()) round.left_earlier = round.left;
  }
  for (Answered& answered : answered_rounds_) answered.round.on_stream = false;
  must_catch_up_ = false;
  Effects effects = session_.OnStreamBroken(why, now);
  const Done done = Check(effects, now, why.status);
  if ((left || over) && !done.ended.has_value()) Violate("the master has dismissed it, and it goes on");
  const bool takes_leave = done.ended.has_value() && DetailsOf(*done.ended).reason == "LEFT";
  if (takes_leave && !left) Violate("nobody has acknowledged its leave, and it ends");
  return effects;
}

void CheckedSession::OnAttended(absl::Time planned, absl::Time now) {
  if (now - planned > kLongStall) attended_since_ = now;
  session_.OnAttended(planned, now);
}

// ---- What the program wants -----------------------------------------------------------------------------------------

void CheckedSession::Declare(const LayerOptions& layer) {
  if (!session_.Declare(layer).ok()) return Violate(absl::StrCat("layer ", layer.name, " cannot be declared"));
  declared_[layer.name] = layer.channels;
  all_said_ = false;
}

void CheckedSession::ResumeAfter(const absl::Status& error) {
  const uint64_t sequence = DetailsOf(error).resume_at.value_or(0);
  first_sequence_ = std::max(first_sequence_, sequence);
  for (auto& [counter, next] : next_sequence_) next = std::max(next, sequence);
  session_.ResumeAfter(error);
}

std::vector<ContributionRef> CheckedSession::Begin(const RoundKey& key, const NumbersPtr& numbers) {
  const bool sum = key.phase == syncbn::Phase::kSum;
  const size_t length = numbers->first.size();
  const std::string counter = absl::StrCat(key.layer, "/", static_cast<int>(key.phase));
  uint64_t& next = next_sequence_.emplace(counter, first_sequence_).first->second;
  const uint64_t sequence = key.sequence == kNextSequence ? next : key.sequence;
  next = std::max(next, sequence + 1);
  std::vector<ContributionRef> begun;
  const auto make = [&](RoundKey resolved, size_t begin, size_t elements) {
    if (resolved.sequence != sequence) Violate(absl::StrCat(Name(resolved), " is not of the next sequence"));
    NumbersPtr part = numbers;
    if (elements != length) {
      auto slice = std::make_shared<testing::Numbers>();
      const auto from = numbers->first.begin() + static_cast<ptrdiff_t>(begin);
      slice->first.assign(from, from + static_cast<ptrdiff_t>(elements));
      part = std::move(slice);
    }
    if (sum) declared_[resolved.layer] = static_cast<uint32_t>(elements);
    all_said_ = all_said_ && !sum;
    Round round;
    round.order = ++begun_;
    round.left = left_ranks_;
    round.channels = key.phase == syncbn::Phase::kBackward ? 0 : declared_[resolved.layer];
    if (elements != length) round.vector = absl::StrCat(key.layer, "/", sequence);
    round.contribution =
        std::make_shared<SimulatedContribution>(std::move(resolved), settings_.contribution_bytes, std::move(part));
    begun.push_back(round.contribution);
    rounds_.push_back(std::move(round));
    return begun.back();
  };
  blocked_on_ = nullptr;  // A program that begins a round does not wait.
  const absl::Status status = session_.Begin(key, length, make);
  if (!status.ok()) Violate(absl::StrCat("a round cannot begin: ", status.message()));
  return begun;
}

Effects CheckedSession::Send(absl::Time now) {
  Effects effects = session_.Send(now);
  const Done done = Check(effects, now);
  if (!done.wrote && joined_ && !writing_) CheckAllSent(now);
  return effects;
}

void CheckedSession::Blocked(const ContributionRef& contribution, bool sure, absl::Time now) {
  if (blocked_on_ != contribution) say_blocked_by_ = now + (sure ? kSayBlocked : kSayBlockedIfUnsure);
  blocked_on_ = contribution;
  session_.Blocked(contribution, sure, now);
}

void CheckedSession::Unblocked(bool retract) {
  const bool believed = said_blocked_on_ != nullptr && said_blocked_on_ == blocked_on_;
  if (retract && believed && Find(said_blocked_on_.get()) != nullptr) must_retract_ = true;
  blocked_on_ = nullptr;
  session_.Unblocked(retract);
}

void CheckedSession::Leave(absl::Time now) {
  leaving_ = true;
  left_at_ = now;
  blocked_on_ = nullptr;
  session_.Leave();
}

Effects CheckedSession::FinishLeave(absl::Time now) {
  Effects effects = session_.FinishLeave();
  if (!Check(effects, now).ended.has_value()) Violate("it does not end when it has left");
  return effects;
}

absl::Time CheckedSession::LeaveDue() const { return leaving_ ? left_at_ + kLeaveTimeout : absl::InfiniteFuture(); }

// ---- What it does ---------------------------------------------------------------------------------------------------

CheckedSession::Done CheckedSession::Check(const Effects& effects, absl::Time now, const absl::Status& cause) {
  if (ended_ && !effects.empty()) Violate("it goes on after its end");
  cause_ = cause;
  Done done;
  for (const session::Effect& effect : effects) {
    done.wrote = done.wrote || std::holds_alternative<session::Write>(effect);
    done.searched = done.searched || std::holds_alternative<session::FindMaster>(effect);
    if (const auto* end = std::get_if<session::Ended>(&effect)) done.ended = end->why;
  }
  silent_ = done.ended.has_value() && joined_ && AnswerIsDue(now);
  for (const session::Effect& effect : effects) {
    const auto* complete = std::get_if<session::Complete>(&effect);
    if (complete != nullptr && frame_ == nullptr && done.ended != complete->status) {
      Violate(absl::StrCat(Name(complete->contribution->key()), " ends without an outcome"));
    }
    std::visit([&](const auto& e) { Check(e, now); }, effect);
  }
  return done;
}

void CheckedSession::Check(const session::FindMaster&, absl::Time now) {
  if (open_ || asked_) Violate("it looks for a master, and has one");
  if (now < connect_at_) Violate(absl::StrCat("it connects ", absl::FormatDuration(connect_at_ - now), " too early"));
  asked_ = true;
}

void CheckedSession::Check(const session::Connect& connect, absl::Time) {
  if (open_ || !asked_) Violate("it opens a stream beside another");
  if (connect.target != settings_.targets[target_ % settings_.targets.size()]) {
    Violate(absl::StrCat("it is not the turn of target ", connect.target));
  }
  if (connect.timeout <= absl::ZeroDuration() || connect.timeout > kConnectTimeout) Violate("a connection takes long");
  asked_ = false;
  open_ = true;
}

void CheckedSession::Check(const session::CloseStream&, absl::Time) {
  if (!open_) Violate("it closes a stream, and has none");
}

void CheckedSession::Check(const session::JoinedGroup& joined, absl::Time now) {
  if (frame_ == nullptr || !frame_->joined.has_value() || !join_written_) {
    return Violate("it has joined, and was not let in");
  }
  if (joined.incarnation != frame_->joined->incarnation || joined.run_id != frame_->joined->run_id) {
    Violate("it takes itself for another");
  }
  const bool came_back = run_id_ != 0;
  incarnation_ = joined.incarnation;
  run_id_ = joined.run_id;
  if (joined_) return;  // Its group goes on with an earlier run.
  memory_ = frame_->joined->memory;
  must_catch_up_ = came_back && memory_ != 0;
  joined_ = true;
  joined_at_ = now;
  failures_ = 0;
  answered_ = false;
}

void CheckedSession::Check(const session::Notice& notice, absl::Time) {
  if (notice.text.empty()) Violate("it notes nothing");
}

void CheckedSession::Check(const session::Complete& complete, absl::Time) {
  const Round* const round = Find(complete.contribution.get());
  const RoundKey& key = complete.contribution->key();
  if (round == nullptr) return Violate(absl::StrCat(Name(key), " ends twice, or has not begun"));
  const Round ended = *round;
  rounds_.erase(rounds_.begin() + (round - rounds_.data()));
  answered_ = true;
  if (frame_ == nullptr) {
    ++tally_.unanswered;
    return;
  }
  const auto outcome = std::find_if(frame_->outcomes.begin(), frame_->outcomes.end(),
                                    [&key](const session::Outcome& candidate) { return candidate.key == key; });
  if (outcome == frame_->outcomes.end()) return Violate(absl::StrCat(Name(key), " ends without an outcome"));
  // A program that has sent too many elements cannot use the result of those that have sent as many as they should.
  const size_t sent = static_cast<const SimulatedContribution&>(*complete.contribution).numbers->first.size();
  if (outcome->status == complete.status && !outcome->refused) answered_rounds_.push_back({ended, memory_});
  const bool misfit = key.phase == syncbn::Phase::kBackward && sent != 0 && sent != outcome->result.first.size();
  if (misfit && outcome->status.ok() && complete.status.code() == absl::StatusCode::kInternal) return;
  if (outcome->status != complete.status || !SameResult(outcome->result, complete.result)) {
    Violate(absl::StrCat("the outcome of ", Name(key), " is not the master's: ", complete.status.ToString()));
  }
}

void CheckedSession::Check(const session::Ended& ended, absl::Time now) {
  const std::string reason = DetailsOf(ended.why).reason;
  bool due = false;
  if (reason == "LEFT") {
    due = leaving_;
  } else if (reason == "UNREACHABLE") {
    due = joined_ ? silent_ : now >= give_up_at_;
    if (joined_) ++tally_.silent;
  } else if (reason == "RANK_TAKEN") {
    due = !joined_ && now >= give_up_at_;
  } else {
    due = !IsPassing(reason) && ended.why == cause_;
  }
  ++tally_.ended[reason];
  if (!due) Violate(absl::StrCat("it ends, which is not due: ", ended.why.ToString()));
  if (!rounds_.empty()) Violate("it ends before its rounds");
  ended_ = true;
  joined_ = false;
}

// ---- What it writes -------------------------------------------------------------------------------------------------

void CheckedSession::Check(const session::Write& write, absl::Time now) {
  const session::ClientFrame& frame = write.frame;
  if (!up_) Violate("it writes, and there is no stream");
  if (writing_) Violate("it writes two frames at a time");
  if (leave_written_) Violate("it writes after it has left");
  if (frame.join.has_value() == join_written_) Violate("a stream begins without a join, or has two");
  for (const auto& layer : frame.layers) {
    said_[layer->name] = layer->channels;
    all_said_ = false;
  }
  if (frame.join.has_value()) {
    CheckJoin(frame);
  } else if (!joined_) {
    Violate("it writes before it is let in");
  }
  CheckLeft(frame);
  for (const session::ContributionPtr& part : frame.contributions) {
    if (part->repeats() != nullptr) {
      CheckRepeat(part);
    } else {
      CheckPart(part, now);
    }
  }
  if (frame.caught_up) CheckCaughtUp(frame);
  if (frame.blocked_on != nullptr) CheckBlocked(frame.blocked_on);
  if (frame.membership_read != (membership_ == membership_said_ ? 0 : membership_)) {
    Violate(
        absl::StrCat("it says that it has read membership ", frame.membership_read, "; the newest is ", membership_));
  }
  membership_said_ = membership_;
  if (must_retract_) ++tally_.retracted;
  must_retract_ = false;
  said_blocked_on_ = frame.blocked_on;
  writing_ = join_written_ = true;
  if (!frame.leave.has_value()) return;
  leave_written_ = true;
  for (const Round& round : rounds_) {
    if (!round.on_stream) Violate(absl::StrCat("it leaves before it has sent ", Name(round.contribution->key())));
  }
  if (!leaving_) Violate("it leaves, and nobody wants it to");
}

void CheckedSession::CheckJoin(const session::ClientFrame& frame) {
  if (frame.join->incarnation != incarnation_ || frame.join->run_id != run_id_) Violate("it joins as another");
  if (frame.join->layers.size() != (settings_.complete_set ? settings_.layers.size() : 0)) {
    Violate("it joins with other layers");
  }
  if (!frame.contributions.empty() || frame.blocked_on != nullptr || frame.leave.has_value()) {
    Violate("its join says more than it knows the master wants to hear");
  }
  if (frame.join->left_ranks != left_ranks_) Violate("it is wrong about who has left");
  last_written_.clear();
  if (run_id_ != 0) ++tally_.rejoins;
}

void CheckedSession::CheckLeft(const session::ClientFrame& frame) {
  if (!must_catch_up_ && !frame.left_ranks.empty()) Violate("it tells who has left, and nobody wants to know");
  for (const session::ContributionPtr& part : frame.contributions) {
    const Round* const round = Find(part.get());
    if (!must_catch_up_ || part->repeats() != nullptr || round == nullptr || round->left == frame.left_ranks) continue;
    Violate(absl::StrCat("it says that ranks ", absl::StrJoin(frame.left_ranks, ","), " had left before the end of ",
                         Name(part->key()), "; those that had are ", absl::StrJoin(round->left, ",")));
  }
}

void CheckedSession::CheckPart(const session::ContributionPtr& part, absl::Time now) {
  Round* const round = Find(part.get());
  const RoundKey& key = part->key();
  if (round == nullptr) return Violate(absl::StrCat("it sends ", Name(key), ", which has ended or has not begun"));
  if (!round->vector.empty()) CheckChunk(*round);
  CheckPlace(*round);
  if (round->first_sent.has_value()) ++tally_.resent;
  if (!round->first_sent.has_value()) round->first_sent = now;
  round->sent = now;
}

void CheckedSession::CheckPlace(Round& round) {
  const RoundKey& key = round.contribution->key();
  if (round.on_stream) Violate(absl::StrCat("it sends ", Name(key), " twice"));
  uint64_t& last = last_written_[round.vector];
  if (round.order < last) Violate(absl::StrCat("it sends ", Name(key), " out of order"));
  last = round.order;
  if (round.channels != 0 && said_[key.layer] != round.channels) {
    Violate(absl::StrCat("it sends ", Name(key), " with ", round.channels, " channels, and the master knows of ",
                         said_[key.layer]));
  }
  round.on_stream = true;
}

void CheckedSession::CheckRepeat(const session::ContributionPtr& part) {
  ++tally_.repeated;
  for (Answered& answered : answered_rounds_) {
    if (answered.round.contribution != part) continue;
    if (answered.memory == memory_) Violate(absl::StrCat("it repeats ", Name(part->key()), ", which the master knows"));
    return CheckPlace(answered.round);
  }
  Violate(absl::StrCat("it repeats ", Name(part->key()), ", of which it has no outcome"));
}

void CheckedSession::CheckCaughtUp(const session::ClientFrame& frame) {
  if (!must_catch_up_) Violate("it has caught up, and had nothing to catch up with");
  must_catch_up_ = false;
  for (const Round& round : rounds_) {
    if (round.first_sent.has_value() && !round.on_stream) {
      Violate(absl::StrCat("it has caught up without ", Name(round.contribution->key())));
    }
  }
  for (const Answered& answered : answered_rounds_) {
    if (answered.memory == memory_ || answered.round.on_stream) continue;
    const RoundKey& key = answered.round.contribution->key();
    ++tally_.forgotten;
    // No schedule has as many rounds as are kept of a layer, but the bytes of a few may be too many.
    if (settings_.contribution_bytes < kMostHeldBytes / 200) Violate(absl::StrCat("it has forgotten ", Name(key)));
    const bool told = std::any_of(frame.forgotten.begin(), frame.forgotten.end(), [&key](const RoundKey& forgotten) {
      return forgotten.layer == key.layer && forgotten.phase == key.phase && forgotten.sequence >= key.sequence;
    });
    if (!told) Violate(absl::StrCat("it does not tell that it has forgotten ", Name(key)));
  }
}

void CheckedSession::CheckChunk(const Round& round) {
  const bool full = ChunksUnderWay(nullptr) >= kChunksUnderWay;
  if (full && !leaving_ && ChunksUnderWay(&round.vector) != 0) {
    Violate(absl::StrCat("it sends ", Name(round.contribution->key()), " while ", ChunksUnderWay(nullptr),
                         " chunks are unanswered"));
  }
  ++tally_.chunks;
}

void CheckedSession::CheckBlocked(const session::ContributionPtr& on) {
  const Round* const round = Find(on.get());
  if (on != blocked_on_ || round == nullptr || !round->on_stream) {
    Violate(absl::StrCat("it is blocked on ", Name(on->key()), ", says the session, and it is not"));
  }
  ++tally_.blocked;
}

void CheckedSession::CheckAllSent(absl::Time now) {
  bool all = true;
  for (const Round& round : rounds_) {
    if (round.on_stream) continue;
    all = false;
    const bool held = !leaving_ && ChunksUnderWay(nullptr) >= kChunksUnderWay && ChunksUnderWay(&round.vector) != 0;
    if (held && !round.vector.empty()) {
      ++tally_.held_back;
    } else {
      Violate(absl::StrCat(Name(round.contribution->key()), " is not sent"));
    }
  }
  for (const auto& [layer, channels] : declared_) {
    if (all_said_) break;
    const auto said = said_.find(layer);
    if (said == said_.end() || said->second != channels) Violate(absl::StrCat("layer ", layer, " is not declared"));
  }
  all_said_ = true;
  if (must_catch_up_) Violate("it has sent all, and does not say so");
  if (leaving_ && !leave_written_) Violate("it does not leave");
  if (!left_ranks_.empty() && !leave_written_ && membership_ != membership_said_) {
    Violate("it has read of a leave, and does not say so");
  }
  if (must_retract_) Violate("it is not blocked any more, and the master is not told");
  const bool blocked = blocked_on_ != nullptr && Find(blocked_on_.get()) != nullptr;
  if (all && blocked && now >= say_blocked_by_ && said_blocked_on_ != blocked_on_) {
    Violate("it is blocked, and the master is not told");
  }
}

// ---- Attempts to connect --------------------------------------------------------------------------------------------

void CheckedSession::NoteBreak(bool joined, absl::Time now) {
  if (joined) {
    give_up_at_ = now + settings_.join_timeout;
    if (answered_ || now - joined_at_ > kLongestPause) pause_ = kFirstPause;
    return PauseBefore(now);
  }
  if (!searched_) return PauseBefore(now);
  ++target_;
  ++failures_;
  if (failures_ % settings_.targets.size() == 0) {
    PauseBefore(now);
  } else {
    connect_at_ = now;
  }
}

void CheckedSession::PauseBefore(absl::Time now) {
  connect_at_ = now + pause_;
  pause_ = std::min(2 * pause_, kLongestPause);
}

// ---- A silent master ------------------------------------------------------------------------------------------------

absl::Time CheckedSession::AnswerDue(const Round& round) const {
  const absl::Duration timeout = *settings_.config.round_timeout;
  const absl::Duration margin = std::min(std::max(timeout, kLeastMargin), absl::Seconds(5));
  const absl::Time last_sign = std::max(round.sent, heard_at_);
  const absl::Time at_the_latest = *round.first_sent + 2 * (timeout + settings_.join_timeout);
  return std::max(std::min(last_sign + timeout, at_the_latest), attended_since_) + margin;
}

bool CheckedSession::AnswerIsDue(absl::Time now) const {
  return std::any_of(rounds_.begin(), rounds_.end(), [&](const Round& round) {
    return round.first_sent.has_value() && now - *round.first_sent >= kLeastMargin && now >= AnswerDue(round);
  });
}

// ---- Who has left ---------------------------------------------------------------------------------------------------

bool CheckedSession::KnowsLeft(core::Rank rank) const {
  const auto has_left = [rank](const std::vector<uint32_t>& left) {
    return std::find(left.begin(), left.end(), rank) != left.end();
  };
  return has_left(left_ranks_) &&
         std::all_of(rounds_.begin(), rounds_.end(), [&](const Round& round) { return has_left(round.left); });
}

// News reaches this worker in order on one stream: an outcome comes before the leave of a worker that has had it.
void CheckedSession::NoteLeft(const std::vector<uint32_t>& left_ranks) {
  left_ranks_ = left_ranks;
  for (Round& round : rounds_) {
    round.left = round.left_earlier.value_or(left_ranks);
    const auto back = [&](uint32_t rank) { return !std::count(left_ranks.begin(), left_ranks.end(), rank); };
    round.left.erase(std::remove_if(round.left.begin(), round.left.end(), back), round.left.end());
  }
}

// ---- The books ------------------------------------------------------------------------------------------------------

CheckedSession::Round* CheckedSession::Find(const session::Contribution* contribution) {
  for (Round& round : rounds_) {
    if (round.contribution.get() == contribution) return &round;
  }
  return nullptr;
}

size_t CheckedSession::ChunksUnderWay(const std::string* vector) const {
  return static_cast<size_t>(std::count_if(rounds_.begin(), rounds_.end(), [vector](const Round& round) {
    return round.on_stream && !round.vector.empty() && (vector == nullptr || round.vector == *vector);
  }));
}

}  // namespace syncbn::simulation
