// A session on a virtual clock, whose effects are sorted by kind.

#ifndef SYNCBN_TESTS_CLIENT_CC_SESSION_SESSION_HARNESS_H_
#define SYNCBN_TESTS_CLIENT_CC_SESSION_SESSION_HARNESS_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "client/cc/session/session.h"
#include "gtest/gtest.h"

namespace syncbn::session {

// Describes a frame in words for a test: "declare v:3", "v/0", "blocked v/0", "leave".
inline std::vector<std::string> Words(const ClientFrame& frame) {
  const auto name = [](const RoundKey& key) {
    return absl::StrCat(key.layer, "/", key.sequence, key.phase == Phase::kBackward ? "b" : "");
  };
  std::vector<std::string> words;
  if (frame.join.has_value()) words.push_back("join");
  for (const auto& layer : frame.layers) words.push_back(absl::StrCat("declare ", layer->name, ":", layer->channels));
  for (const ContributionPtr& contribution : frame.contributions) {
    const EndedRound* const repeats = contribution->repeats();
    words.push_back(absl::StrCat(repeats == nullptr    ? ""
                                 : repeats->error.ok() ? "repeat "
                                                       : "report ",
                                 name(contribution->key())));
  }
  if (frame.caught_up) words.push_back("caught up");
  if (frame.blocked_on != nullptr) words.push_back(absl::StrCat("blocked ", name(frame.blocked_on->key())));
  if (frame.leave.has_value()) words.push_back("leave");
  return words;
}

class Harness {
 public:
  explicit Harness(Options options = Options()) : session_(std::move(options), now_) {}

  Session& session() { return session_; }
  absl::Time now() const { return now_; }

  // ---- Time

  // Lets time pass, and runs every timer when it is due. Timers that connect find a master at `targets`.
  void Advance(absl::Duration duration) {
    const absl::Time until = now_ + duration;
    for (int timers = 0; session_.NextTimer() <= until && session_.state() != Session::State::kEnded; ++timers) {
      ASSERT_LT(timers, 100'000) << "a timer that is due does nothing";
      now_ = std::max(now_, session_.NextTimer());
      session_.OnAttended(now_, now_);
      Apply(session_.OnTime(now_));
      Apply(session_.Send(now_));
    }
    now_ = until;
  }
  // Lets time pass in which nobody drives the session.
  void Sleep(absl::Duration duration) {
    const absl::Time planned = now_;
    now_ += duration;
    session_.OnAttended(planned, now_);
    Apply(session_.OnTime(now_));
  }
  std::string targets = "one:1";
  uint64_t memory = 0;         // The master's,
  std::vector<uint32_t> left;  // and the ranks that have left, when it lets the worker in.
  std::vector<RoundKey> newest_rounds;

  // ---- The master

  void Up() { Apply(session_.OnStreamUp()); }
  void Joined(absl::Duration round_timeout = absl::Minutes(10)) {
    Written();
    ServerFrame frame;
    frame.joined = syncbn::session::Joined{1, 77, round_timeout, Membership{1, left}, memory, newest_rounds};
    Apply(session_.OnFrame(std::move(frame), now_));
  }
  // Connects and joins, from the start or after a break.
  void Join(absl::Duration round_timeout = absl::Minutes(10)) {
    Advance(std::max(session_.NextTimer() - now_, absl::ZeroDuration()));
    Up();
    Joined(round_timeout);
  }
  void Written() { session_.OnWritten(); }
  void Break(absl::Status why = absl::UnavailableError("gone"), Break::Cause cause = Break::Cause::kOther) {
    Apply(session_.OnStreamBroken({std::move(why), cause}, now_));
  }
  void Answer(const RoundKey& key, std::vector<double> first = {1.0}, std::vector<double> second = {}) {
    Outcome outcome;
    outcome.key = key;
    outcome.payload = key.phase;
    outcome.result.first = std::move(first);
    outcome.result.second = std::move(second);
    Answer(std::move(outcome));
  }
  void Answer(Outcome outcome) {
    ServerFrame frame;
    frame.outcomes.push_back(std::move(outcome));
    Apply(session_.OnFrame(std::move(frame), now_));
  }
  void Answer(const std::string& sum, uint64_t sequence) { Answer(RoundKey{sum, sequence, Phase::kSum}); }

  // ---- The program

  // Begins a round of vectors of this length, of so many bytes on the wire. Returns its last contribution.
  ContributionPtr Begin(RoundKey key, size_t length, size_t bytes = 100) {
    ContributionPtr begun;
    const absl::Status status = session_.Begin(std::move(key), length, [&](RoundKey resolved, size_t, size_t) {
      auto contribution = std::make_shared<Contribution>(std::move(resolved), bytes);
      begun = contribution;
      return contribution;
    });
    last_status = status;
    return begun;
  }
  ContributionPtr Sum(const std::string& name, size_t length = 1, uint64_t sequence = kNextSequence) {
    return Begin({name, sequence, Phase::kSum}, length);
  }
  absl::Status last_status;

  // Sends what is due. Returns its words, and none if nothing is sent.
  std::vector<std::string> Send() {
    const size_t before = frames.size();
    Apply(session_.Send(now_));
    if (frames.size() == before) return {};
    return Words(frames.back());
  }
  // Sends, and lets the frame be written.
  std::vector<std::string> SendAndWrite() {
    std::vector<std::string> words = Send();
    Written();
    return words;
  }

  void Apply(Effects effects) {
    for (Effect& effect : effects) {
      std::visit([this](auto& kind) { Note(kind); }, effect);
    }
  }

  // ---- What the session has said

  std::vector<ClientFrame> frames;
  std::vector<Connect> connects;
  std::vector<absl::Time> connect_times;
  std::vector<std::string> notices;
  std::map<const Contribution*, Complete> completed;
  std::vector<const Contribution*> completion_order;
  int closes = 0;
  std::optional<absl::Status> ended;

 private:
  void Note(FindMaster&) {
    absl::StatusOr<std::string> found = targets;
    if (targets.empty()) found = absl::NotFoundError("no such service");
    Apply(session_.OnMasterFound(found, now_));
  }
  void Note(Connect& connect) {
    EXPECT_FALSE(ended.has_value());
    connects.push_back(connect);
    connect_times.push_back(now_);
  }
  void Note(Write& write) {
    EXPECT_FALSE(ended.has_value());
    frames.push_back(std::move(write.frame));
  }
  void Note(CloseStream&) { ++closes; }
  void Note(Complete& complete) {
    const Contribution* const contribution = complete.contribution.get();
    completion_order.push_back(contribution);
    EXPECT_TRUE(completed.emplace(contribution, std::move(complete)).second) << "a round ended twice";
  }
  void Note(JoinedGroup&) {}
  void Note(Notice& notice) { notices.push_back(notice.text); }
  void Note(Ended& end) {
    EXPECT_FALSE(ended.has_value());
    ended = end.why;
  }

  absl::Time now_ = absl::FromUnixSeconds(1'700'000'000);
  Session session_;
};

}  // namespace syncbn::session

#endif  // SYNCBN_TESTS_CLIENT_CC_SESSION_SESSION_HARNESS_H_
