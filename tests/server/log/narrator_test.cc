// The lines of the log, event by event.

#include "server/log/narrator.h"

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "plumbing/log.h"
#include "server/core/error.h"

namespace syncbn {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

class NarratorTest : public ::testing::Test {
 protected:
  NarratorTest() {
    SetLogRecordSink([this](const LogRecord& record) {
      lines_.push_back(absl::StrCat(record.level == LogLevel::kWarning ? "warning: " : "", record.text));
      fields_.clear();
      for (const LogField& field : record.fields) fields_.push_back(absl::StrCat(field.name, "=", field.value));
    });
  }
  ~NarratorTest() override { SetLogRecordSink(nullptr); }

  static core::MemberChanged Change(core::MemberState state, uint32_t present) {
    core::MemberChanged change;
    change.group = {"job", "group"};
    change.rank = 3;
    change.stream = 7;
    change.state = state;
    change.incarnation = 9;
    change.description = "host/12";
    change.present = present;
    change.world_size = 4;
    return change;
  }

  static core::RoundEnded Ended(std::optional<core::Error> error) {
    auto outcome = std::make_shared<core::RoundOutcome>();
    outcome->key = {"bn1", 5, core::Phase::kForward};
    outcome->error = std::move(error);
    core::RoundEnded ended;
    ended.group = {"job", "group"};
    ended.outcome = std::move(outcome);
    ended.duration = absl::Milliseconds(1500);
    return ended;
  }

  static core::Error AnError() {
    return core::MakeError(absl::StatusCode::kDeadlineExceeded, core::kRoundTimeout, "they did not come", {1, 2});
  }

  std::vector<std::string> lines_;
  std::vector<std::string> fields_;  // In the newest line.
  const absl::Time now_ = absl::FromUnixSeconds(1'700'000'000);
  Narrator narrator_{[](core::StreamId stream) { return stream == 7 ? "ipv4:10.0.0.1:99" : ""; }};
};

TEST_F(NarratorTest, AWorkerThatJoins) {
  narrator_.On(Change(core::MemberState::kPresent, 2), now_);
  EXPECT_THAT(lines_, ElementsAre("rank 3 of job \"job\", group \"group\" has joined from ipv4:10.0.0.1:99 (host/12); "
                                  "2 of 4 workers are connected"));
  EXPECT_THAT(fields_, ElementsAre("event=joined", "job=job", "group=group", "rank=3", "incarnation=9",
                                   "peer=ipv4:10.0.0.1:99"));
}

TEST_F(NarratorTest, AGroupThatIsComplete) {
  narrator_.On(Change(core::MemberState::kPresent, 4), now_);
  ASSERT_THAT(lines_, SizeIs(2));
  EXPECT_EQ(lines_[1], "job \"job\", group \"group\" is complete: all 4 workers are connected");
}

TEST_F(NarratorTest, AWorkerThatIsLostAndComesBackAndLeaves) {
  narrator_.On(Change(core::MemberState::kLost, 3), now_);
  core::MemberChanged back = Change(core::MemberState::kPresent, 3);
  back.returned = true;
  narrator_.On(back, now_);
  narrator_.On(Change(core::MemberState::kLeft, 2), now_);
  EXPECT_THAT(lines_, ElementsAre(AllOf(HasSubstr("rank 3"), HasSubstr("is lost")), HasSubstr("is back from"),
                                  HasSubstr("has left; 2 of 4")));
}

TEST_F(NarratorTest, ARefusedJoinIsToldOnceWithItsPeer) {
  const core::Error error = core::MakeError(absl::StatusCode::kAlreadyExists, core::kRankTaken, "another has it");
  narrator_.On(core::JoinRefused{{"job", std::string(1000, 'x')}, 3, 7, error}, now_);
  narrator_.OnStreamClosed(7, error, now_);
  ASSERT_THAT(lines_, SizeIs(1));
  EXPECT_THAT(lines_[0], AllOf(HasSubstr("warning: refused a join as rank 3"), HasSubstr("10.0.0.1"),
                               HasSubstr("RANK_TAKEN: another has it")));
  EXPECT_LT(lines_[0].size(), 400u);
}

TEST_F(NarratorTest, ARoundThatFailsAndNoneThatCompletes) {
  narrator_.On(Ended(std::nullopt), now_);
  EXPECT_THAT(lines_, IsEmpty());
  narrator_.On(Ended(AnError()), now_);
  ASSERT_THAT(lines_, SizeIs(1));
  EXPECT_THAT(lines_[0], AllOf(HasSubstr("layer \"bn1\", forward 5, 1.5s after its first contribution"),
                               HasSubstr("ROUND_TIMEOUT: they did not come")));
  EXPECT_THAT(fields_, ::testing::IsSupersetOf({"event=round_failed", "layer=bn1", "phase=forward", "sequence=5",
                                                "reason=ROUND_TIMEOUT", "ranks=1,2", "age=1.5s"}));
}

TEST_F(NarratorTest, AFloodIsHeldBackByReason) {
  for (int i = 0; i < 100; ++i) narrator_.On(Ended(AnError()), now_);
  EXPECT_THAT(lines_, SizeIs(Throttle::kBurst));
  narrator_.OnStreamClosed(7, core::MalformedError("bad"), now_);
  EXPECT_THAT(lines_, SizeIs(Throttle::kBurst + 1));
  narrator_.On(Ended(AnError()), now_ + absl::Seconds(11));
  EXPECT_THAT(lines_.back(), HasSubstr("(and 95 more of this kind)"));
}

TEST_F(NarratorTest, EveryWorkerOfALargeJobIsTold) {
  for (int i = 0; i < Throttle::kLongBurst; ++i) narrator_.On(Change(core::MemberState::kPresent, 2), now_);
  EXPECT_THAT(lines_, SizeIs(Throttle::kLongBurst));
}

TEST_F(NarratorTest, ALateRoundAndAReaderThatIsCutOff) {
  core::SendLateRounds late;
  late.group = {"job", "group"};
  late.rounds.push_back({{"bn1", 5, core::Phase::kSum}, absl::Seconds(10), {1, 2}, 70});
  narrator_.On(late, now_);
  EXPECT_THAT(lines_.back(), HasSubstr("sum 5 has waited for 10s, for ranks 1, 2 and 68 more"));
  narrator_.OnReaderCutOff(8, 123, now_);
  EXPECT_THAT(lines_.back(), AllOf(HasSubstr("a peer that has gone"), HasSubstr("123 bytes")));
}

TEST_F(NarratorTest, AShutdownIsNotToldForEachStream) {
  narrator_.OnStreamClosed(7, core::ShuttingDownError(), now_);
  EXPECT_THAT(lines_, IsEmpty());
}

}  // namespace
}  // namespace syncbn
