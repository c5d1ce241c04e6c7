// Moments at which a session connects, waits, gives up and ends.

#include <string>
#include <vector>

#include "client/cc/errors.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/cc/session/session_harness.h"

namespace syncbn::session {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;

std::string Reason(const absl::Status& status) { return DetailsOf(status).reason; }

absl::Status RankTaken(const std::string& holder) {
  return MakeStatus(absl::StatusCode::kAlreadyExists, absl::StrCat("rank 3 is held by ", holder),
                    {std::string(kRankTaken), "", {3}});
}

// The milliseconds between attempts to connect.
std::vector<int64_t> Pauses(const Harness& harness) {
  std::vector<int64_t> pauses;
  for (size_t i = 1; i < harness.connect_times.size(); ++i) {
    pauses.push_back(absl::ToInt64Milliseconds(harness.connect_times[i] - harness.connect_times[i - 1]));
  }
  return pauses;
}

TEST(ConnectTest, TheFirstFrameJoinsAndDeclares) {
  Options options;
  options.layers.resize(2);
  options.layers[0].name = "a";
  options.layers[0].channels = 4;
  options.layers[1].name = "b";
  options.layers[1].channels = 8;
  Harness harness(options);
  EXPECT_EQ(harness.session().NextTimer(), harness.now());
  harness.Advance(absl::ZeroDuration());
  ASSERT_THAT(harness.connects, SizeIs(1));
  EXPECT_EQ(harness.connects[0].target, "one:1");
  EXPECT_EQ(harness.connects[0].timeout, absl::Seconds(5));
  harness.Up();
  ASSERT_THAT(harness.frames, SizeIs(1));
  EXPECT_THAT(Words(harness.frames[0]), ElementsAre("join", "declare a:4", "declare b:8"));
  EXPECT_THAT(harness.frames[0].join->layers, SizeIs(2));
  EXPECT_EQ(harness.frames[0].join->run_id, 0u);
  harness.Joined();
  EXPECT_EQ(harness.session().state(), Session::State::kJoined);
  EXPECT_EQ(harness.session().NextTimer(), absl::InfiniteFuture());
  harness.Break();
  harness.Join();
  EXPECT_EQ(harness.frames[1].join->incarnation, 1u);
  EXPECT_EQ(harness.frames[1].join->run_id, 77u);
}

TEST(ConnectTest, AMasterWhoseRoundsEndBeforeTheyBeginIsRefused) {
  Harness harness;
  harness.Join(-absl::Seconds(3));
  ASSERT_TRUE(harness.ended.has_value());
  EXPECT_EQ(harness.ended->code(), absl::StatusCode::kInternal);
  EXPECT_EQ(harness.ended->message(), "the master at one:1 sent a round_timeout of -3s, less than 0");
  EXPECT_EQ(harness.session().NextTimer(), absl::InfiniteFuture());
}

TEST(ConnectTest, PausesDoubleUpToASecond) {
  Harness harness;
  for (int i = 0; i < 10; ++i) {
    harness.Advance(std::max(harness.session().NextTimer() - harness.now(), absl::ZeroDuration()));
    harness.Break();
  }
  EXPECT_THAT(Pauses(harness), ElementsAre(10, 20, 40, 80, 160, 320, 640, 1000, 1000));
}

TEST(ConnectTest, ThePauseComesAfterEachTargetHasFailed) {
  Harness harness;
  harness.targets = "one:1, two:2,three:3";
  for (int i = 0; i < 7; ++i) {
    harness.Advance(std::max(harness.session().NextTimer() - harness.now(), absl::ZeroDuration()));
    harness.Break();
  }
  EXPECT_THAT(Pauses(harness), ElementsAre(0, 0, 10, 0, 0, 20));
  std::vector<std::string> tried;
  for (const Connect& connect : harness.connects) tried.push_back(connect.target);
  EXPECT_THAT(tried, ElementsAre("one:1", "two:2", "three:3", "one:1", "two:2", "three:3", "one:1"));
  EXPECT_EQ(harness.connects[0].timeout, absl::Seconds(2));
  harness.Join();  // At "two:2", which is the first to be tried after a break.
  harness.Break();
  harness.Advance(absl::Seconds(1));
  EXPECT_EQ(harness.connects.back().target, "two:2");
}

TEST(ConnectTest, AMasterThatAcceptsJoinsAndCrashesIsNotHammered) {
  Harness harness;
  for (int i = 0; i < 5; ++i) {
    harness.Join();
    harness.Break();
  }
  EXPECT_THAT(Pauses(harness), ElementsAre(10, 20, 40, 80));
  harness.Join();
  harness.Sum("v");
  harness.SendAndWrite();
  harness.Answer("v", 0);
  harness.Break();
  harness.Join();
  EXPECT_EQ(Pauses(harness).back(), 10) << "an answer shows that the master works";
}

TEST(ConnectTest, GivesUpWhenTheTimeToJoinIsOver) {
  Options options;
  options.join_timeout = absl::Seconds(3);
  Harness harness(options);
  harness.Advance(absl::Seconds(1));
  harness.Break(absl::UnavailableError("Connection refused"));
  harness.Advance(absl::Seconds(1));
  EXPECT_FALSE(harness.ended.has_value());
  harness.Advance(absl::Seconds(1));
  ASSERT_TRUE(harness.ended.has_value());
  EXPECT_EQ(Reason(*harness.ended), "UNREACHABLE");
  EXPECT_EQ(harness.ended->message(), "no answer from the master at one:1 within 3s; last: Connection refused");
  EXPECT_EQ(harness.closes, 1) << "an attempt was under way";
}

TEST(ConnectTest, GivesUpOnAMasterThatDoesNotComeBack) {
  Harness harness;
  harness.Join();
  const ContributionPtr round = harness.Sum("v");
  harness.Advance(absl::Hours(1));
  harness.Break();
  const absl::Time broken = harness.now();
  while (!harness.ended.has_value()) {
    harness.Advance(absl::Milliseconds(500));
    if (!harness.ended.has_value() && harness.session().state() == Session::State::kConnecting) harness.Break();
  }
  EXPECT_EQ(harness.now() - broken, absl::Seconds(30));
  EXPECT_EQ(Reason(harness.completed.at(round.get()).status), "UNREACHABLE");
}

TEST(ConnectTest, AMasterThatNobodyFindsCountsAsAFailedAttempt) {
  Options options;
  options.join_timeout = absl::Milliseconds(100);
  Harness harness(options);
  harness.targets = "";
  harness.Advance(absl::Seconds(1));
  EXPECT_THAT(harness.connects, IsEmpty());
  ASSERT_TRUE(harness.ended.has_value());
  EXPECT_EQ(harness.ended->message(), "no target of a master was found within 100ms; last: no such service");
}

TEST(ConnectTest, AConnectionThatIsClosedAtOnceIsExplained) {
  for (const bool tls : {false, true}) {
    for (const bool joined : {false, true}) {
      Options options;
      options.tls = tls;
      Harness harness(options);
      if (joined) harness.Join();
      if (!joined) harness.Advance(absl::ZeroDuration());
      harness.Break(absl::UnavailableError("Socket closed"), Break::Cause::kClosedByPeer);
      harness.Advance(absl::Minutes(1));
      ASSERT_TRUE(harness.ended.has_value());
      const std::string text(harness.ended->message());
      if (joined) {
        EXPECT_THAT(text, Not(HasSubstr("TLS")));
      } else {
        EXPECT_THAT(text, HasSubstr(tls ? "or speak without TLS" : "may expect TLS"));
      }
    }
  }
}

TEST(ConnectTest, ARefusalByTlsIsFinalForTheOnlyTarget) {
  const absl::Status refusal = absl::UnavailableError("Handshake failed");
  Harness harness;
  harness.Advance(absl::ZeroDuration());
  harness.Break(refusal, Break::Cause::kRefusedByTls);
  ASSERT_TRUE(harness.ended.has_value());
  EXPECT_EQ(harness.ended->code(), absl::StatusCode::kUnauthenticated);
  EXPECT_THAT(std::string(harness.ended->message()), AllOf(HasSubstr("one:1"), HasSubstr("Handshake failed")));
  Harness several;
  several.targets = "one:1,two:2";
  several.Advance(absl::ZeroDuration());
  several.Break(refusal, Break::Cause::kRefusedByTls);
  EXPECT_FALSE(several.ended.has_value());
}

TEST(ConnectTest, ARankThatIsTakenIsWaitedForWithAWarning) {
  Options options;
  options.rank = 3;
  options.join_timeout = absl::Seconds(2);
  Harness harness(options);
  const auto attempt = [&](const std::string& holder) {
    harness.Advance(std::max(harness.session().NextTimer() - harness.now(), absl::ZeroDuration()));
    harness.Up();
    harness.Break(RankTaken(holder));
  };
  attempt("alice");
  attempt("alice");
  EXPECT_THAT(harness.notices, ElementsAre("rank 3 is taken, and this worker waits until it is free, for 2s: "
                                           "rank 3 is held by alice"));
  attempt("bob");
  EXPECT_THAT(harness.notices, SizeIs(2)) << "another holder is another warning";
  harness.Advance(absl::Seconds(2));
  ASSERT_TRUE(harness.ended.has_value());
  EXPECT_EQ(harness.ended->message(), "rank 3 is held by bob");
  EXPECT_EQ(Reason(*harness.ended), "RANK_TAKEN");
}

TEST(ConnectTest, AMasterWithTooManyGroupsIsAskedAgain) {
  const auto refusal = [](const std::string& limit) {
    return MakeStatus(absl::StatusCode::kResourceExhausted, absl::StrCat("too many: ", limit),
                      {"LIMIT_EXCEEDED", "", {}, limit});
  };
  Options options;
  options.join_timeout = absl::Seconds(2);
  Harness harness(options);
  for (int attempt = 0; attempt < 3; ++attempt) {
    harness.Advance(std::max(harness.session().NextTimer() - harness.now(), absl::ZeroDuration()));
    harness.Up();
    harness.Break(refusal(attempt == 1 ? "max_groups_per_address" : "max_groups"));
    EXPECT_FALSE(harness.ended.has_value());
  }
  harness.Advance(absl::Seconds(2));
  ASSERT_TRUE(harness.ended.has_value());
  EXPECT_EQ(*harness.ended, refusal("max_groups"));
  Harness other(options);
  other.Advance(absl::ZeroDuration());
  other.Up();
  other.Break(refusal("max_workers"));
  EXPECT_TRUE(other.ended.has_value()) << "another limit does not pass";
}

TEST(ConnectTest, AStatusWithAReasonIsFinalUnlessItPasses) {
  for (const char* reason : {"FENCED", "RUN_SUPERSEDED", "GROUP_CONFIG_MISMATCH", "LIMIT_EXCEEDED"}) {
    Harness harness;
    harness.Join();
    const absl::Status why = MakeStatus(absl::StatusCode::kAborted, "no", {reason, "", {}});
    harness.Break(why);
    ASSERT_TRUE(harness.ended.has_value()) << reason;
    EXPECT_EQ(*harness.ended, why);
  }
  Harness harness;
  harness.Join();
  harness.Break(MakeStatus(absl::StatusCode::kUnavailable, "later", {"SHUTTING_DOWN", "", {}}));
  EXPECT_FALSE(harness.ended.has_value());
}

TEST(ConnectTest, AStatusWithoutAReasonIsFinalOnlyAtTheFirstJoin) {
  const std::vector<absl::StatusCode> final = {absl::StatusCode::kInvalidArgument, absl::StatusCode::kUnimplemented,
                                               absl::StatusCode::kUnauthenticated, absl::StatusCode::kPermissionDenied};
  for (int code = 0; code <= 16; ++code) {
    const absl::Status why(static_cast<absl::StatusCode>(code), "?");
    Harness first, joined;
    first.Advance(absl::ZeroDuration());
    first.Break(why);
    EXPECT_EQ(first.ended.has_value(), std::count(final.begin(), final.end(), why.code()) > 0) << why;
    joined.Join();
    joined.Break(why);
    EXPECT_FALSE(joined.ended.has_value()) << why;
  }
  Harness joined;
  joined.Join();
  joined.Break(absl::ResourceExhaustedError("larger than max"), Break::Cause::kFrameTooLong);
  EXPECT_TRUE(joined.ended.has_value()) << "another stream would bring the same frame";
}

TEST(ConnectTest, AfterTheEndNothingHappensAnyMore) {
  Harness harness;
  harness.Join();
  const ContributionPtr first = harness.Sum("a"), second = harness.Sum("b"), third = harness.Sum("c");
  harness.Send();
  harness.Apply(harness.session().Close());
  EXPECT_THAT(harness.completion_order, ElementsAre(first.get(), second.get(), third.get()));
  EXPECT_EQ(Reason(harness.completed.at(first.get()).status), "CLOSED");
  EXPECT_EQ(Reason(*harness.ended), "CLOSED");
  EXPECT_EQ(harness.closes, 1);
  harness.Answer("a", 0);
  harness.Break();
  harness.Apply(harness.session().Close());
  harness.Advance(absl::Hours(1));
  EXPECT_THAT(harness.Send(), IsEmpty());
  EXPECT_THAT(harness.connects, SizeIs(1));
  EXPECT_EQ(harness.session().NextTimer(), absl::InfiniteFuture());
}

// ---- A master that stops without a word -----------------------------------------------------------------------------

TEST(SilentMasterTest, EndsTheSessionAfterItsOwnDeadlineAndAMargin) {
  for (const auto& [timeout, margin] : {std::pair(absl::Milliseconds(10), absl::Seconds(2)),
                                        {absl::Seconds(3), absl::Seconds(3)},
                                        {absl::Minutes(10), absl::Seconds(5)}}) {
    Harness harness;
    harness.Join(timeout);
    EXPECT_EQ(harness.session().NextCheck(), absl::InfiniteFuture()) << "nothing is unanswered";
    const ContributionPtr round = harness.Sum("v");
    harness.SendAndWrite();
    harness.Advance(timeout + margin - absl::Milliseconds(1));
    EXPECT_FALSE(harness.ended.has_value());
    harness.Advance(absl::Milliseconds(1));
    ASSERT_TRUE(harness.ended.has_value());
    EXPECT_EQ(Reason(*harness.ended), "UNREACHABLE");
    EXPECT_EQ(DetailsOf(*harness.ended).layer, "v");
    EXPECT_THAT(std::string(harness.ended->message()), HasSubstr("has not answered round 0 of layer \"v\""));
    EXPECT_EQ(harness.completed.at(round.get()).status, *harness.ended);
  }
}

TEST(SilentMasterTest, AnyFrameShowsThatItLivesButNotForEver) {
  Options options;
  options.join_timeout = absl::Seconds(1);
  Harness harness(options);
  harness.Join(absl::Seconds(10));
  harness.Sum("v");
  harness.SendAndWrite();
  const absl::Time sent = harness.now();
  while (!harness.ended.has_value() && harness.now() < sent + absl::Minutes(2)) {
    harness.Advance(absl::Seconds(1));
    if (harness.ended.has_value()) break;
    ServerFrame frame;
    frame.membership = Membership{2, {}};
    harness.Apply(harness.session().OnFrame(std::move(frame), harness.now()));
  }
  EXPECT_EQ(harness.now() - sent, absl::Seconds(2 * (10 + 1) + 5));
  EXPECT_EQ(harness.session().present_ranks(), 2u);
}

TEST(SilentMasterTest, AnAnswerMayWaitToBeReadAfterALongPause) {
  Harness harness;
  harness.Join(absl::Milliseconds(10));
  const ContributionPtr round = harness.Sum("v");
  harness.SendAndWrite();
  harness.Sleep(absl::Hours(2));
  EXPECT_FALSE(harness.ended.has_value()) << "nobody has looked";
  harness.Answer("v", 0);
  EXPECT_TRUE(harness.completed.at(round.get()).status.ok());
  harness.Sum("w");
  harness.SendAndWrite();
  harness.Sleep(absl::Hours(2));
  harness.Advance(absl::Seconds(3));
  EXPECT_TRUE(harness.ended.has_value()) << "now somebody has, for long enough";
}

TEST(SilentMasterTest, ARoundThatIsNotSentExpectsNoAnswer) {
  Harness harness;
  harness.Join(absl::Seconds(1));
  harness.Sum("v");
  harness.Sleep(absl::Hours(1));
  EXPECT_EQ(harness.session().NextCheck(), absl::InfiniteFuture());
}

// ---- Leaving --------------------------------------------------------------------------------------------------------

TEST(LeaveTest, WhatWasBegunIsSentBefore) {
  Harness harness;
  harness.Join();
  const ContributionPtr round = harness.Sum("v");
  harness.session().Leave("finished");
  EXPECT_THAT(harness.SendAndWrite(), ElementsAre("declare v:1", "v/0", "leave"));
  EXPECT_EQ(harness.frames.back().leave, "finished");
  EXPECT_THAT(harness.Send(), IsEmpty()) << "nothing may follow";
  harness.Break(absl::OkStatus());
  EXPECT_EQ(Reason(*harness.ended), "LEFT");
  EXPECT_EQ(Reason(harness.completed.at(round.get()).status), "LEFT");
}

TEST(LeaveTest, AnOutcomeMayComeBeforeTheEnd) {
  Harness harness;
  harness.Join();
  const ContributionPtr round = harness.Sum("v");
  harness.session().Leave("finished");
  harness.SendAndWrite();
  harness.Answer("v", 0);
  harness.Break(absl::OkStatus());
  EXPECT_TRUE(harness.completed.at(round.get()).status.ok());
}

const absl::Status& GoingAway() {
  static const auto* const status =
      new absl::Status(MakeStatus(absl::StatusCode::kUnavailable, "going away", {"SHUTTING_DOWN", "", {}}));
  return *status;
}

// The next master may need what it holds, and others would wait for it there until the deadline.
TEST(LeaveTest, AfterABreakOrAShutdownItLeavesAgain) {
  for (const absl::Status& why : {absl::UnavailableError("gone"), GoingAway()}) {
    Harness harness;
    harness.Join();
    harness.session().Leave("finished");
    EXPECT_THAT(harness.Send(), ElementsAre("leave"));
    harness.Break(why);
    EXPECT_FALSE(harness.ended.has_value()) << why;
    EXPECT_TRUE(harness.session().may_come_back()) << why;
    harness.Join();
    EXPECT_THAT(harness.Send(), ElementsAre("leave"));
    harness.Break(absl::OkStatus());
    EXPECT_EQ(Reason(*harness.ended), "LEFT");
  }
}

TEST(LeaveTest, MastersThatGoAwayAtOnceDoNotTakeIt) {
  Harness harness;
  harness.Join();
  harness.session().Leave("finished");
  harness.Send();
  harness.Break();
  for (int masters = 0; masters < 3; ++masters) {
    harness.Advance(std::max(harness.session().NextTimer() - harness.now(), absl::ZeroDuration()));
    harness.Up();
    harness.Break(GoingAway());
    EXPECT_TRUE(harness.session().may_come_back());
  }
  harness.Join();
  EXPECT_THAT(harness.Send(), ElementsAre("leave"));
}

TEST(LeaveTest, NobodyWaitsForAnotherMasterIfNoLeaveWasSent) {
  Harness harness;
  harness.Join();
  harness.Break(GoingAway());
  EXPECT_FALSE(harness.session().may_come_back());
  harness.session().Leave("finished");
  EXPECT_FALSE(harness.session().may_come_back());
}

TEST(LeaveTest, AnotherReasonEndsIt) {
  Harness harness;
  harness.Join();
  harness.session().Leave("finished");
  harness.Send();
  harness.Break(MakeStatus(absl::StatusCode::kAborted, "fenced", {"FENCED", "", {}}));
  EXPECT_EQ(Reason(*harness.ended), "LEFT");
}

TEST(LeaveTest, MayEndWithoutTheMaster) {
  Harness harness;
  harness.Join();
  harness.session().Leave("finished");
  harness.Apply(harness.session().FinishLeave());
  EXPECT_EQ(Reason(*harness.ended), "LEFT");
  EXPECT_EQ(harness.closes, 1);
}

}  // namespace
}  // namespace syncbn::session
