#include "client/cc/session/session.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/cc/errors.h"
#include "plumbing/check.h"

namespace syncbn::session {
namespace {

// Frames up to this length are read whatever they hold; longer ones only if the pending rounds can fill them.
constexpr size_t kOrdinaryFrameBytes = size_t{32} << 20;
// The bytes that a round's outcome takes beyond its vectors: names, ranks, an error's text.
constexpr size_t kOutcomeBytes = size_t{64} << 10;
// A pause in looking at the stream after which answers may still wait to be read.
constexpr absl::Duration kLongPause = absl::Seconds(1);

// Returns true for a status that no master of ours gives a first join: the other side is something else, or does not
// want this worker. Once joined, a worker takes the same for a failure of something between: a proxy that has lost its
// backend, say.
bool IsHopelessAtFirst(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kUnimplemented:
    case absl::StatusCode::kUnauthenticated:
    case absl::StatusCode::kPermissionDenied:
      return true;
    default:
      return false;
  }
}

// Returns true if a later attempt need not meet the same.
bool IsPassing(const ErrorDetails& details) { return details.reason == "SHUTTING_DOWN" || IsRefusedForNow(details); }

// Returns the ranks that are in both lists, which are ascending.
std::shared_ptr<const std::vector<uint32_t>> Common(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b) {
  auto common = std::make_shared<std::vector<uint32_t>>();
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(*common));
  return common;
}

}  // namespace

Session::Session(Options options, absl::Time now)
    : options_(std::move(options)),
      attempts_(options_.rank, options_.join_timeout, options_.tls, now),
      log_(options_.log) {
  for (const LayerOptions& layer : options_.layers) declarations_.Declare(layer);
}

// ---- Timers ---------------------------------------------------------------------------------------------------------

absl::Time Session::NextTimer() const {
  absl::Time next = NextCheck();
  if (state_ == State::kWaiting) next = std::min(next, attempts_.retry_at());
  if (state_ == State::kConnecting || state_ == State::kWaiting) next = std::min(next, attempts_.give_up_at());
  if (state_ == State::kJoined && !writing_ && IsBlocked() && told_ != blocked_on_) {
    next = std::min(next, say_blocked_at_);
  }
  return next;
}

Effects Session::OnTime(absl::Time now) {
  const bool joining = state_ == State::kConnecting || state_ == State::kWaiting;
  if (joining && now >= attempts_.give_up_at()) return End(attempts_.GiveUpError());
  if (state_ != State::kWaiting || now < attempts_.retry_at()) return CheckMaster(now);
  state_ = State::kConnecting;
  return {FindMaster{}};
}

// ---- The stream -----------------------------------------------------------------------------------------------------

Effects Session::OnMasterFound(const absl::StatusOr<std::string>& targets, absl::Time now) {
  if (state_ == State::kEnded) return {};
  SYNCBN_CHECK(state_ == State::kConnecting && !stream_open_, "a master was found that nobody had asked for");
  absl::Status status = targets.ok() ? attempts_.SetTargets(*targets) : targets.status();
  Effects effects;
  if (status.ok()) {
    stream_open_ = true;
    effects.push_back(Connect{attempts_.targets().current(), attempts_.connect_timeout()});
  } else {
    Retry({std::move(status)}, now, &effects);
  }
  return effects;
}

Effects Session::OnStreamUp() {
  if (state_ == State::kEnded) return {};
  SYNCBN_CHECK(state_ == State::kConnecting && stream_open_, "a stream came up that was not being opened");
  ClientFrame frame;
  // The master may turn out to have lost its memory.
  declarations_.BeginStream(HeldInOrder(std::nullopt), &frame.layers);
  frame.join = Join{incarnation_, run_id_, {}, *left_ranks_, run_id_ != 0 && !had_outcome_};
  for (const LayerOptions& layer : options_.layers) {
    frame.join->layers.push_back(OptionsOf(declarations_.Find(layer.name)->said));
  }
  writing_ = true;
  Effects effects;
  effects.push_back(Write{std::move(frame)});
  return effects;
}

Effects Session::OnStreamBroken(Break why, absl::Time now) {
  stream_open_ = false;
  writing_ = false;
  if (state_ == State::kEnded) return {};
  const ErrorDetails details = DetailsOf(why.status);
  // A master that has died or goes away while the leave is on its way has not acknowledged it. The next one may need
  // what this worker holds, and would wait for it.
  const bool goes_away = details.reason == "SHUTTING_DOWN";
  if (leave_sent_ && (why.status.ok() || (!details.reason.empty() && !goes_away))) return End(LeftError());
  leave_sent_ = false;
  const bool leaves_next = goes_away && leaving_.has_value() && (state_ == State::kJoined || !dismissed_);
  const bool first = run_id_ == 0;
  if (state_ == State::kJoined || !details.reason.empty()) {
    dismissed_ = !details.reason.empty() && !leaves_next;
  }
  if (details.reason.empty()) {
    const TargetTurn& targets = attempts_.targets();
    if (first && why.cause == Break::Cause::kRefusedByTls && !targets.has_several()) {
      return End(absl::UnauthenticatedError(
          absl::StrCat("TLS with the master at ", targets.current(), " has failed: ", why.status.message())));
    }
    const bool hopeless = first && IsHopelessAtFirst(why.status.code());
    if (hopeless || why.cause == Break::Cause::kFrameTooLong) return End(std::move(why.status));
  } else if (!IsPassing(details)) {
    return End(std::move(why.status));
  }
  Effects effects;
  Retry(std::move(why), now, &effects);
  return effects;
}

void Session::Retry(Break why, absl::Time now, Effects* effects) {
  if (state_ == State::kJoined) {
    attempts_.BrokeAfterJoin(std::move(why), now);
  } else {
    attempts_.Failed(std::move(why), now);
  }
  state_ = State::kWaiting;
  if (auto notice = attempts_.RankTakenNotice()) effects->push_back(Notice{*std::move(notice)});
}

Effects Session::OnFrame(ServerFrame frame, absl::Time now) {
  if (state_ == State::kEnded) return {};
  heard_at_ = now;
  if (frame.joined.has_value() && frame.joined->round_timeout < absl::ZeroDuration()) {
    return End(
        absl::InternalError(absl::StrCat("the master at ", attempts_.targets().current(), " sent a round_timeout of ",
                                         absl::FormatDuration(frame.joined->round_timeout), ", less than 0")));
  }
  Effects effects;
  if (frame.joined.has_value()) {
    if (run_id_ == 0) newest_rounds_ = std::move(frame.joined->newest_rounds);
    if (state_ == State::kConnecting) OnJoined(*frame.joined, now);
    // A joined worker is told so again if its group goes on with an earlier run.
    incarnation_ = frame.joined->incarnation;
    run_id_ = frame.joined->run_id;
    NoteMembership(std::move(frame.joined->membership));
    effects.push_back(JoinedGroup{incarnation_, run_id_});
  }
  if (frame.membership.has_value()) NoteMembership(*std::move(frame.membership));
  if (!frame.late_rounds.empty()) effects.push_back(LateNotice(frame.late_rounds));
  for (Outcome& outcome : frame.outcomes) OnOutcome(std::move(outcome), &effects);
  return effects;
}

void Session::OnJoined(const Joined& joined, absl::Time now) {
  state_ = State::kJoined;
  attempts_.Joined(now);
  round_timeout_ = joined.round_timeout;
  memory_ = joined.memory;
  catching_up_ = run_id_ != 0 && memory_ != 0;
  // Frames on the way when the last stream broke may or may not have arrived: the master knows. The chunks of a long
  // vector go in the same order everywhere: else workers could wait for each other's. A master that has lost its memory
  // gets answered rounds again as well, in their place: forward rounds before the backward rounds that belong to them.
  unsent_ = catching_up_ ? HeldInOrder(memory_) : PendingInOrder();
  to_resend_ = 0;
  for (const ContributionRef& contribution : unsent_) {
    SetUnderWay(*contribution, false);
    contribution->left_earlier_ = contribution->sent_ ? contribution->left_ranks_ : nullptr;
    contribution->repeated_ = contribution->ended_;
    contribution->resent_ = catching_up_ && contribution->sent_;
    to_resend_ += contribution->resent_ ? 1 : 0;
  }
  told_ = nullptr;
  retract_ = false;
  membership_said_ = 0;
}

void Session::NoteMembership(Membership membership) {
  present_ranks_ = membership.present_ranks;
  membership_read_ = membership.version;
  if (membership.left_ranks == *left_ranks_) return;
  left_ranks_ = std::make_shared<const std::vector<uint32_t>>(std::move(membership.left_ranks));
  for (const ContributionRef& contribution : pending_) {
    // A master that had told the outcome to one that has left would have told it here, on this stream, before. So a
    // rank that only comes back to leave again counts as before.
    if (contribution->left_earlier_ != nullptr) {
      contribution->left_ranks_ = Common(*contribution->left_earlier_, *left_ranks_);
    } else {
      contribution->left_ranks_ = left_ranks_;
    }
  }
}

Notice Session::LateNotice(const std::vector<LateRound>& rounds) const {
  // The first stands for those that came with it: they wait for the same workers, or for what these have not reached.
  const LateRound& late = rounds.front();
  const size_t named = late.missing_ranks.size();
  const size_t others = late.missing - std::min<size_t>(late.missing, named);
  return Notice{absl::StrCat("round ", late.key.sequence, " of layer \"", late.key.layer, "\" has waited ",
                             absl::FormatDuration(absl::Trunc(late.age, absl::Milliseconds(100))), " for rank",
                             named == 1 && others == 0 ? " " : "s ", absl::StrJoin(late.missing_ranks, ", "),
                             others > 0 ? absl::StrCat(" and ", others, " more") : "",
                             rounds.size() > 1 ? absl::StrCat("; rounds that wait as well: ", rounds.size() - 1) : "",
                             "; it goes on until round_timeout (", absl::FormatDuration(round_timeout_), ")")};
}

absl::Status Session::CheckFrameLength(size_t bytes) const {
  if (bytes <= kOrdinaryFrameBytes) return absl::OkStatus();
  size_t longest = kOrdinaryFrameBytes;
  for (const ContributionRef& contribution : pending_) {
    longest += kOutcomeBytes + 2 * sizeof(double) * contribution->length_;
  }
  if (bytes <= longest) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("the master sent a frame of ", bytes,
                                          " bytes; all that this worker waits for takes ", longest, " at most"));
}

// ---- The end --------------------------------------------------------------------------------------------------------

Effects Session::End(absl::Status why) {
  if (state_ == State::kEnded) return {};
  SYNCBN_CHECK(!why.ok(), "a session ends without a reason");
  state_ = State::kEnded;
  end_ = std::move(why);
  Effects effects;
  for (const ContributionRef& contribution : PendingInOrder()) {
    contribution->ended_ = true;
    effects.push_back(Complete{contribution, end_, {}});
  }
  pending_.clear();
  unsent_.clear();
  log_.Clear();
  blocked_on_ = told_ = nullptr;
  if (stream_open_) effects.push_back(CloseStream{});
  effects.push_back(Ended{end_});
  return effects;
}

void Session::Leave(absl::string_view reason) {
  leaving_ = std::string(reason);
  blocked_on_ = nullptr;
}

// ---- A master that has stopped without closing its connections ------------------------------------------------------

void Session::OnAttended(absl::Time planned, absl::Time now) {
  if (now - planned > kLongPause) attended_since_ = now;
}

void Session::ExpectAnswer(Contribution& contribution, absl::Time now) {
  if (!std::exchange(contribution.sent_, true)) contribution.first_sent_at_ = now;
  contribution.sent_at_ = now;
  check_at_ = std::min(check_at_, AnswerDue(contribution));
}

absl::Time Session::AnswerDue(const Contribution& contribution) const {
  // The time that an answer may take beyond the round's timeout.
  constexpr absl::Duration kLeastMargin = absl::Seconds(2);
  constexpr absl::Duration kMostMargin = absl::Seconds(5);
  // Any frame shows that the master lives, and after a restart of the master the round begins anew. Neither may go on
  // for ever.
  const absl::Time due = std::min(std::max(contribution.sent_at_, heard_at_) + round_timeout_,
                                  contribution.first_sent_at_ + 2 * (round_timeout_ + options_.join_timeout));
  return std::max(due, attended_since_) + std::min(std::max(round_timeout_, kLeastMargin), kMostMargin);
}

Effects Session::CheckMaster(absl::Time now) {
  if (now < NextCheck()) return {};
  check_at_ = absl::InfiniteFuture();
  const Contribution* overdue = nullptr;  // The oldest of them.
  for (const ContributionRef& contribution : pending_) {
    if (!contribution->sent_) continue;
    const absl::Time due = AnswerDue(*contribution);
    check_at_ = std::min(check_at_, due);
    if (now >= due && (overdue == nullptr || contribution->order_ < overdue->order_)) overdue = contribution.get();
  }
  if (overdue == nullptr) return {};
  const RoundKey& key = overdue->key();
  return End(MakeStatus(absl::StatusCode::kUnavailable,
                        absl::StrCat("the master at ", attempts_.targets().current(), " has not answered round ",
                                     key.sequence, " of layer \"", key.layer, "\" for ",
                                     absl::FormatDuration(now - overdue->first_sent_at_), ", and round_timeout is ",
                                     absl::FormatDuration(round_timeout_), ": it has stopped, or cannot be reached"),
                        {"UNREACHABLE", key.layer, {}}));
}

}  // namespace syncbn::session
