// Runs schedules by the ten thousand, and shows that planted bugs are found.
//
// --seed=N, or SYNCBN_SIM_SEED=N, begins with the schedule of that seed, and --schedules=N runs so many of them; the
// schedule of a seed is the same everywhere. --follow prints each event as it happens, which shows those before an
// assertion that fails.

#include "tests/simulation/simulation.h"

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "gtest/gtest.h"

namespace syncbn::simulation {
namespace {

uint64_t first_seed = 20'240'501;
uint64_t schedules = 100'000;
bool follow = false;
constexpr int kBlocks = 10;
constexpr uint64_t kEnoughToFindABug = 5000;
constexpr uint64_t kEnoughToReachTheRare = 50'000;

std::string Replay(uint64_t seed) {
  std::string text;
  for (const std::string& line : RunSchedule(seed, {}, Log::kKeep).log) text += line + "\n";
  return text;
}

std::atomic<uint64_t> running_seed = 0;

// Says which schedule an assertion has failed in. The abort is this program's own, between two of its statements.
void OnAbort(int) {
  std::fprintf(stderr, "aborted; run again with --schedules=1 --follow --seed=%llu\n",
               static_cast<unsigned long long>(running_seed.load()));
}

// One block of the schedules, so that they can be spread over shards.
class SchedulesTest : public ::testing::TestWithParam<int> {};

TEST_P(SchedulesTest, KeepEveryPromise) {
  const uint64_t each = (schedules + kBlocks - 1) / kBlocks;
  const uint64_t begin = first_seed + GetParam() * each;
  std::printf("schedules of the seeds %llu to %llu\n", static_cast<unsigned long long>(begin),
              static_cast<unsigned long long>(begin + each - 1));
  std::signal(SIGABRT, OnAbort);
  Report sum;
  for (uint64_t seed = begin; seed < begin + each; ++seed) {
    running_seed = seed;
    const Report report = RunSchedule(seed, {}, follow ? Log::kPrint : Log::kNone);
    ASSERT_FALSE(report.violation.has_value())
        << *report.violation << "\nrun again with --schedules=1 --seed=" << seed << "\n"
        << Replay(seed);
    sum.tally.Add(report.tally);
    sum.events += report.events;
    sum.master_restarts += report.master_restarts;
    sum.worker_restarts += report.worker_restarts;
    sum.broken_streams += report.broken_streams;
  }
  std::printf(
      "%llu events, %llu restarts of masters, %llu of workers, %llu broken streams; rounds: %llu completed (%llu "
      "without all), %llu replayed, %llu restored; contributions: %llu repeated, %llu forgotten; %llu runs adopted, "
      "%llu diverged, %llu succeeded; %llu fenced, %llu seats taken\n",
      static_cast<unsigned long long>(sum.events), static_cast<unsigned long long>(sum.master_restarts),
      static_cast<unsigned long long>(sum.worker_restarts), static_cast<unsigned long long>(sum.broken_streams),
      static_cast<unsigned long long>(sum.tally.completed), static_cast<unsigned long long>(sum.tally.partial),
      static_cast<unsigned long long>(sum.tally.replayed), static_cast<unsigned long long>(sum.tally.restored),
      static_cast<unsigned long long>(sum.tally.repeated), static_cast<unsigned long long>(sum.tally.forgotten),
      static_cast<unsigned long long>(sum.tally.adopted), static_cast<unsigned long long>(sum.tally.diverged),
      static_cast<unsigned long long>(sum.tally.succeeded), static_cast<unsigned long long>(sum.tally.fenced),
      static_cast<unsigned long long>(sum.tally.taken));
  for (const auto& [reason, times] : sum.tally.failed) {
    std::printf("  failed with %s: %llu\n", reason.c_str(), static_cast<unsigned long long>(times));
  }
  for (const auto& [reason, times] : sum.tally.refused) {
    std::printf("  refused with %s: %llu\n", reason.c_str(), static_cast<unsigned long long>(times));
  }
  for (const auto& [reason, times] : sum.tally.ended) {
    std::printf("  sessions ended with %s: %llu\n", reason.c_str(), static_cast<unsigned long long>(times));
  }
  if (each < 5'000) return;
  // A simulation that no longer reaches these proves nothing about them.
  EXPECT_GT(sum.master_restarts, 0u);
  EXPECT_GT(sum.tally.partial, 0u);
  EXPECT_GT(sum.tally.replayed, 0u);
  EXPECT_GT(sum.tally.redeclared, 0u);
  EXPECT_GT(sum.tally.fenced, 0u);
  EXPECT_GT(sum.tally.late, 0u);
  EXPECT_GT(sum.tally.taken, 0u);
  EXPECT_GT(sum.tally.rejoins, 0u);
  EXPECT_GT(sum.tally.resent, 0u);
  EXPECT_GT(sum.tally.repeated, 0u);
  EXPECT_GT(sum.tally.forgotten, 0u);
  EXPECT_GT(sum.tally.restored, 0u);
  EXPECT_GT(sum.tally.adopted, 0u);
  EXPECT_GT(sum.tally.outlived, 0u);
  EXPECT_GT(sum.tally.left_again, 0u);
  EXPECT_GT(sum.tally.succeeded, 0u);
  EXPECT_GT(sum.tally.raised, 0u);
  EXPECT_GT(sum.tally.resumed, 0u);
  EXPECT_GT(sum.tally.untold, 0u);
  EXPECT_GT(sum.tally.unanswered, 0u);
  EXPECT_GT(sum.tally.held_back, 0u);
  EXPECT_GT(sum.tally.blocked, 0u);
  EXPECT_GT(sum.tally.retracted, 0u);
  EXPECT_GT(sum.tally.not_found, 0u);
  EXPECT_GT(sum.tally.silent, 0u);
  for (const char* reason : {"LEFT", "UNREACHABLE", "RANK_TAKEN", "RUN_SUPERSEDED", "FENCED"}) {
    EXPECT_GT(sum.tally.ended[reason], 0u) << reason;
  }
  for (const char* reason : {"ROUND_TIMEOUT", "WORKER_LOST", "DEADLOCK", "TOO_FEW_WORKERS", "INVALID_CONTRIBUTION",
                             "NOT_FINITE", "LAYER_SET_MISMATCH", "OUTCOME_LOST"}) {
    EXPECT_GT(sum.tally.failed[reason], 0u) << reason;
  }
  for (const char* reason : {"PAYLOAD_CHANGED", "NOT_A_CONTRIBUTOR"}) {
    EXPECT_GT(sum.tally.refused[reason], 0u) << reason;
  }
}

INSTANTIATE_TEST_SUITE_P(Block, SchedulesTest, ::testing::Range(0, kBlocks));

// Runs schedules until one comes to something that only a few in ten thousand do, too few to expect it of each block.
void ExpectReached(bool (*reached)(const Tally& tally)) {
  if (schedules < kEnoughToReachTheRare) GTEST_SKIP() << "only " << schedules << " schedules are asked for";
  uint64_t seed = first_seed;
  while (!reached(RunSchedule(seed).tally)) ASSERT_LT(++seed, first_seed + kEnoughToReachTheRare);
  std::printf("the schedule of the seed %llu\n", static_cast<unsigned long long>(seed));
}

TEST(RareTest, BackwardRoundsOfNoForwardRoundAreReached) {
  ExpectReached([](const Tally& tally) { return tally.refused.count("FORWARD_ROUND_UNKNOWN") != 0; });
}

TEST(RareTest, WorkersThatKnowAnotherOutcomeAreReached) {
  ExpectReached([](const Tally& tally) { return tally.diverged != 0; });
}

TEST(ScheduleTest, IsTheSameEachTime) {
  for (uint64_t seed = 1; seed < 20; ++seed) EXPECT_EQ(Replay(seed), Replay(seed));
}

struct PlantedBug {
  const char* name;
  Bugs bugs;
};

class PlantedBugTest : public ::testing::TestWithParam<PlantedBug> {};

TEST_P(PlantedBugTest, IsFound) {
  for (uint64_t seed = first_seed; seed < first_seed + kEnoughToFindABug; ++seed) {
    if (const auto violation = RunSchedule(seed, GetParam().bugs).violation) {
      std::printf("found by the %lluth schedule: %s\n", static_cast<unsigned long long>(seed - first_seed + 1),
                  violation->c_str());
      return;
    }
  }
  FAIL() << "not found in " << kEnoughToFindABug << " schedules";
}

PlantedBug OfMaster(const char* name, Bug bug) { return {name, {bug, SessionBug::kNone}}; }
PlantedBug OfSession(const char* name, SessionBug bug) { return {name, {Bug::kNone, bug}}; }

INSTANTIATE_TEST_SUITE_P(
    Master, PlantedBugTest,
    ::testing::Values(OfMaster("NoFencing", Bug::kNoFencing), OfMaster("StaleStream", Bug::kStaleStream),
                      OfMaster("ChangedReplay", Bug::kChangedReplay), OfMaster("DoubleCount", Bug::kDoubleCount),
                      OfMaster("LostOutcome", Bug::kLostOutcome), OfMaster("SendAfterClose", Bug::kSendAfterClose),
                      OfMaster("IgnoredDeadline", Bug::kIgnoredDeadline), OfMaster("EarlyLeave", Bug::kEarlyLeave),
                      OfMaster("WrongVariance", Bug::kWrongVariance), OfMaster("SplitOutcome", Bug::kSplitOutcome),
                      OfMaster("AcceptedNan", Bug::kAcceptedNan), OfMaster("AnyLayers", Bug::kAnyLayers),
                      OfMaster("SilentLate", Bug::kSilentLate), OfMaster("LostDeclaration", Bug::kLostDeclaration),
                      OfMaster("StolenSeat", Bug::kStolenSeat), OfMaster("SameMemory", Bug::kSameMemory),
                      OfMaster("ChangedRoster", Bug::kChangedRoster), OfMaster("EarlyCatchUp", Bug::kEarlyCatchUp),
                      OfMaster("AskingRepeats", Bug::kAskingRepeats),
                      OfMaster("ForgottenLeaves", Bug::kForgottenLeaves),
                      OfMaster("UnknownLeaves", Bug::kUnknownLeaves), OfMaster("Impatience", Bug::kImpatience),
                      OfMaster("HastyLeave", Bug::kHastyLeave), OfMaster("ForgottenSteps", Bug::kForgottenSteps),
                      OfMaster("WrongPlace", Bug::kWrongPlace), OfMaster("SmallerStep", Bug::kSmallerStep),
                      OfMaster("SplitNumber", Bug::kSplitNumber), OfMaster("UsedNumber", Bug::kUsedNumber),
                      OfMaster("UntoldNumber", Bug::kUntoldNumber), OfMaster("NeedlessNumber", Bug::kNeedlessNumber),
                      OfMaster("LateJoin", Bug::kLateJoin), OfMaster("LightShutdown", Bug::kLightShutdown),
                      OfMaster("OpenEar", Bug::kOpenEar)),
    [](const auto& info) { return info.param.name; });

INSTANTIATE_TEST_SUITE_P(
    Session, PlantedBugTest,
    ::testing::Values(
        OfSession("ForgottenResend", SessionBug::kForgottenResend),
        OfSession("ResentAnswer", SessionBug::kResentAnswer),
        OfSession("RepeatedSequence", SessionBug::kRepeatedSequence),
        OfSession("ReorderedRounds", SessionBug::kReorderedRounds),
        OfSession("IgnoredRetraction", SessionBug::kIgnoredRetraction),
        OfSession("SilentBlock", SessionBug::kSilentBlock), OfSession("NeverGivesUp", SessionBug::kNeverGivesUp),
        OfSession("NoBackoff", SessionBug::kNoBackoff), OfSession("BlindTrust", SessionBug::kBlindTrust),
        OfSession("Haste", SessionBug::kHaste), OfSession("DroppedResult", SessionBug::kDroppedResult),
        OfSession("CompletedTwice", SessionBug::kCompletedTwice),
        OfSession("ChangedResult", SessionBug::kChangedResult),
        OfSession("LateDeclaration", SessionBug::kLateDeclaration),
        OfSession("UnboundedChunks", SessionBug::kUnboundedChunks), OfSession("EarlyLeave", SessionBug::kEarlyLeave),
        OfSession("SendAfterLeave", SessionBug::kSendAfterLeave), OfSession("StaleFrame", SessionBug::kStaleFrame),
        OfSession("ForgottenSelf", SessionBug::kForgottenSelf), OfSession("SecondStream", SessionBug::kSecondStream),
        OfSession("ForgottenRepeat", SessionBug::kForgottenRepeat), OfSession("LateRepeat", SessionBug::kLateRepeat),
        OfSession("IgnoredMemory", SessionBug::kIgnoredMemory), OfSession("ShortLog", SessionBug::kShortLog),
        OfSession("ForgottenLeaves", SessionBug::kForgottenLeaves),
        OfSession("UnknownLeaves", SessionBug::kUnknownLeaves), OfSession("UnreadLeaves", SessionBug::kUnreadLeaves),
        OfSession("InventedLeaves", SessionBug::kInventedLeaves), OfSession("KeptBackward", SessionBug::kKeptBackward),
        OfSession("IgnoredNumber", SessionBug::kIgnoredNumber),
        OfSession("TakenForGranted", SessionBug::kTakenForGranted)),
    [](const auto& info) { return info.param.name; });

}  // namespace

// Takes what is meant for the simulation out of the arguments and the environment.
void Configure(int argc, char** argv) {
  if (const char* seed = std::getenv("SYNCBN_SIM_SEED")) first_seed = std::strtoull(seed, nullptr, 10);
  if (const char* number = std::getenv("SYNCBN_SIM_SCHEDULES")) schedules = std::strtoull(number, nullptr, 10);
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--follow") == 0) follow = true;
    if (std::strncmp(argv[i], "--seed=", 7) == 0) first_seed = std::strtoull(argv[i] + 7, nullptr, 10);
    if (std::strncmp(argv[i], "--schedules=", 12) == 0) schedules = std::strtoull(argv[i] + 12, nullptr, 10);
  }
}

}  // namespace syncbn::simulation

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  syncbn::simulation::Configure(argc, argv);
  return RUN_ALL_TESTS();
}
