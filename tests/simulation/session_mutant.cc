#include "tests/simulation/session_mutant.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <variant>

#include "client/cc/errors.h"

namespace syncbn::simulation {
namespace {

using session::ClientFrame;
using session::Complete;
using session::Effects;
using session::Session;

session::Options Distorted(session::Options options, SessionBug bug) {
  if (bug == SessionBug::kNeverGivesUp) options.join_timeout = absl::InfiniteDuration();
  if (bug == SessionBug::kShortLog) options.log.rounds = 1;
  return options;
}

bool Repeats(const session::ContributionPtr& part) { return part->repeats() != nullptr; }

}  // namespace

SessionMutant::SessionMutant(session::Options options, absl::Time now, SessionBug bug)
    : bug_(bug), session_(Distorted(std::move(options), bug), now) {}

absl::Time SessionMutant::NextTimer() const {
  const bool hasty = bug_ == SessionBug::kNoBackoff && session_.state() == Session::State::kWaiting;
  return hasty ? absl::InfinitePast() : session_.NextTimer();
}

Effects SessionMutant::OnTime(absl::Time now) {
  const bool waits = session_.state() == Session::State::kWaiting;
  if (bug_ == SessionBug::kNoBackoff && waits) now = std::max(now, session_.NextTimer());
  if (bug_ == SessionBug::kBlindTrust) session_.OnAttended(now - absl::Minutes(1), now);
  Effects effects = session_.OnTime(now);
  if (bug_ == SessionBug::kHaste && effects.empty()) effects = session_.CheckMaster(now + absl::Milliseconds(1'900));
  return Distort(std::move(effects));
}

Effects SessionMutant::OnFrame(session::ServerFrame frame, bool stale, absl::Time now) {
  if (stale && bug_ != SessionBug::kStaleFrame) return {};
  if (bug_ == SessionBug::kIgnoredMemory && frame.joined.has_value()) frame.joined->memory = 1;
  return Distort(session_.OnFrame(std::move(frame), now));
}

Effects SessionMutant::OnStreamBroken(session::Break why, absl::Time now) {
  if (bug_ == SessionBug::kForgottenResend) lost_ = sent_;
  const bool left = std::exchange(leave_written_, false);
  if (bug_ == SessionBug::kTakenForGranted && left && DetailsOf(why.status).reason == "SHUTTING_DOWN") {
    why.status = absl::OkStatus();
  }
  return Distort(session_.OnStreamBroken(std::move(why), now));
}

absl::Status SessionMutant::Begin(RoundKey key, size_t length, Session::MakeContribution make) {
  if (bug_ == SessionBug::kRepeatedSequence && key.sequence == kNextSequence) {
    const auto last = last_sequence_.find(key.layer);
    if (last != last_sequence_.end()) key.sequence = last->second;
  }
  const std::string layer = key.layer;
  return session_.Begin(std::move(key), length, [&](RoundKey resolved, size_t begin, size_t elements) {
    last_sequence_[layer] = resolved.sequence;
    begun_.push_back(make(std::move(resolved), begin, elements));
    return begun_.back();
  });
}

Effects SessionMutant::Send(absl::Time now) {
  Effects effects = Distort(session_.Send(now));
  if (bug_ == SessionBug::kSendAfterLeave && leave_written_ && !session_.writing()) {
    effects.push_back(session::Write{ClientFrame()});
  }
  return effects;
}

Effects SessionMutant::Distort(Effects effects) {
  if (bug_ == SessionBug::kNone) return effects;
  std::optional<session::Effect> again;
  bool drop = false;
  for (session::Effect& effect : effects) {
    if (auto* write = std::get_if<session::Write>(&effect)) Distort(write->frame);
    if (auto* connect = std::get_if<session::Connect>(&effect)) {
      if (bug_ == SessionBug::kSecondStream) again = *connect;
    }
    auto* complete = std::get_if<Complete>(&effect);
    if (complete == nullptr) continue;
    answered_ = complete->contribution;
    if (bug_ == SessionBug::kDroppedResult && &effect == &effects.back()) drop = true;
    if (bug_ == SessionBug::kCompletedTwice) again = *complete;
    if (bug_ == SessionBug::kChangedResult && !complete->result.first.empty()) {
      double& first = complete->result.first[0];
      first = std::nextafter(first, std::numeric_limits<double>::infinity());
    }
  }
  if (drop) effects.pop_back();
  if (again.has_value()) effects.push_back(*std::move(again));
  return effects;
}

void SessionMutant::Distort(ClientFrame& frame) {
  auto& parts = frame.contributions;
  if (frame.join.has_value()) {
    if (bug_ == SessionBug::kForgottenSelf) frame.join = session::Join{0, 0, frame.join->layers, {}, false};
    if (bug_ == SessionBug::kForgottenLeaves) frame.join->left_ranks.clear();
    return;
  }
  leave_written_ = leave_written_ || frame.leave.has_value();
  switch (bug_) {
    case SessionBug::kForgottenResend:
      parts.erase(
          std::remove_if(parts.begin(), parts.end(), [this](const auto& part) { return lost_.count(part) != 0; }),
          parts.end());
      sent_.insert(parts.begin(), parts.end());
      break;
    case SessionBug::kResentAnswer:
      AddResentAnswer(frame);
      break;
    case SessionBug::kReorderedRounds:
      std::reverse(parts.begin(), parts.end());
      break;
    case SessionBug::kLateDeclaration:
      std::swap(frame.layers, late_);
      break;
    case SessionBug::kUnboundedChunks:
      for (const auto& part : parts) begun_.erase(std::remove(begun_.begin(), begun_.end(), part), begun_.end());
      if (!parts.empty()) parts.insert(parts.end(), begun_.begin(), begun_.end());
      begun_.clear();
      break;
    case SessionBug::kForgottenRepeat:
      parts.erase(std::remove_if(parts.begin(), parts.end(), Repeats), parts.end());
      break;
    case SessionBug::kLateRepeat:
      if (frame.caught_up) {
        late_repeats_.assign(parts.begin(), parts.end());
        parts.erase(std::remove_if(parts.begin(), parts.end(), Repeats), parts.end());
      } else {
        parts.insert(parts.end(), late_repeats_.begin(), late_repeats_.end());
        late_repeats_.clear();
      }
      break;
    case SessionBug::kUnknownLeaves:
      frame.left_ranks.clear();
      break;
    case SessionBug::kInventedLeaves:
      if (frame.left_ranks.empty() && !parts.empty()) frame.left_ranks.push_back(0);
      break;
    case SessionBug::kUnreadLeaves:
      ++frame.membership_read;
      break;
    case SessionBug::kKeptBackward:
      frame.forgotten.erase(std::remove_if(frame.forgotten.begin(), frame.forgotten.end(),
                                           [](const RoundKey& key) { return key.phase == Phase::kBackward; }),
                            frame.forgotten.end());
      break;
    case SessionBug::kEarlyLeave:
      if (left_) parts.clear();
      break;
    default:
      break;
  }
}

void SessionMutant::AddResentAnswer(ClientFrame& frame) {
  if (answered_ == nullptr) return;
  const auto& answered = static_cast<const SimulatedContribution&>(*answered_);
  auto numbers = std::make_shared<testing::Numbers>(*answered.numbers);
  for (double& number : numbers->first) number += 1.0;
  frame.contributions.push_back(
      std::make_shared<SimulatedContribution>(answered.key(), answered.bytes(), std::move(numbers)));
  answered_ = nullptr;
}

}  // namespace syncbn::simulation
