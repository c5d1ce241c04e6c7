// Runs schedules by the ten thousand, and shows that planted bugs are found.
//
// --seed=N, or SYNCBN_SIM_SEED=N, begins with the schedule of that seed, and --schedules=N runs so many of them; the
// schedule of a seed is the same everywhere.

#include "tests/simulation/simulation.h"

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
constexpr int kBlocks = 10;
constexpr uint64_t kEnoughToFindABug = 5000;

std::string Replay(uint64_t seed, Bug bug) {
  std::string text;
  for (const std::string& line : RunSchedule(seed, bug, true).log) text += line + "\n";
  return text;
}

void Add(const Tally& from, Tally& to) {
  to.completed += from.completed;
  to.partial += from.partial;
  to.replayed += from.replayed;
  to.redeclared += from.redeclared;
  to.fenced += from.fenced;
  to.late += from.late;
  to.taken += from.taken;
  for (const auto& [reason, times] : from.failed) to.failed[reason] += times;
  for (const auto& [reason, times] : from.refused) to.refused[reason] += times;
}

// One block of the schedules, so that they can be spread over shards.
class SchedulesTest : public ::testing::TestWithParam<int> {};

TEST_P(SchedulesTest, KeepEveryPromise) {
  const uint64_t each = (schedules + kBlocks - 1) / kBlocks;
  const uint64_t begin = first_seed + GetParam() * each;
  std::printf("schedules of the seeds %llu to %llu\n", static_cast<unsigned long long>(begin),
              static_cast<unsigned long long>(begin + each - 1));
  Report sum;
  for (uint64_t seed = begin; seed < begin + each; ++seed) {
    const Report report = RunSchedule(seed);
    ASSERT_FALSE(report.violation.has_value())
        << *report.violation << "\nrun again with --schedules=1 --seed=" << seed << "\n"
        << Replay(seed, Bug::kNone);
    Add(report.tally, sum.tally);
    sum.events += report.events;
    sum.master_restarts += report.master_restarts;
    sum.worker_restarts += report.worker_restarts;
    sum.broken_streams += report.broken_streams;
  }
  std::printf(
      "%llu events, %llu restarts of masters, %llu of workers, %llu broken streams; rounds: %llu completed (%llu "
      "without all), %llu replayed; %llu fenced, %llu seats taken\n",
      static_cast<unsigned long long>(sum.events), static_cast<unsigned long long>(sum.master_restarts),
      static_cast<unsigned long long>(sum.worker_restarts), static_cast<unsigned long long>(sum.broken_streams),
      static_cast<unsigned long long>(sum.tally.completed), static_cast<unsigned long long>(sum.tally.partial),
      static_cast<unsigned long long>(sum.tally.replayed), static_cast<unsigned long long>(sum.tally.fenced),
      static_cast<unsigned long long>(sum.tally.taken));
  for (const auto& [reason, times] : sum.tally.failed) {
    std::printf("  failed with %s: %llu\n", reason.c_str(), static_cast<unsigned long long>(times));
  }
  for (const auto& [reason, times] : sum.tally.refused) {
    std::printf("  refused with %s: %llu\n", reason.c_str(), static_cast<unsigned long long>(times));
  }
  if (each < 1'000) return;
  // A simulation that no longer reaches these proves nothing about them.
  EXPECT_GT(sum.master_restarts, 0u);
  EXPECT_GT(sum.tally.partial, 0u);
  EXPECT_GT(sum.tally.replayed, 0u);
  EXPECT_GT(sum.tally.redeclared, 0u);
  EXPECT_GT(sum.tally.fenced, 0u);
  EXPECT_GT(sum.tally.late, 0u);
  EXPECT_GT(sum.tally.taken, 0u);
  for (const char* reason : {"ROUND_TIMEOUT", "WORKER_LOST", "DEADLOCK", "TOO_FEW_WORKERS", "INVALID_CONTRIBUTION",
                             "NOT_FINITE", "LAYER_SET_MISMATCH"}) {
    EXPECT_GT(sum.tally.failed[reason], 0u) << reason;
  }
  for (const char* reason : {"PAYLOAD_CHANGED", "FORWARD_ROUND_UNKNOWN", "NOT_A_CONTRIBUTOR"}) {
    EXPECT_GT(sum.tally.refused[reason], 0u) << reason;
  }
}

INSTANTIATE_TEST_SUITE_P(Block, SchedulesTest, ::testing::Range(0, kBlocks));

TEST(ScheduleTest, IsTheSameEachTime) {
  for (uint64_t seed = 1; seed < 20; ++seed) EXPECT_EQ(Replay(seed, Bug::kNone), Replay(seed, Bug::kNone));
}

struct PlantedBug {
  const char* name;
  Bug bug;
};

class PlantedBugTest : public ::testing::TestWithParam<PlantedBug> {};

TEST_P(PlantedBugTest, IsFound) {
  for (uint64_t seed = first_seed; seed < first_seed + kEnoughToFindABug; ++seed) {
    if (const auto violation = RunSchedule(seed, GetParam().bug).violation) {
      std::printf("found by the %lluth schedule: %s\n", static_cast<unsigned long long>(seed - first_seed + 1),
                  violation->c_str());
      return;
    }
  }
  FAIL() << "not found in " << kEnoughToFindABug << " schedules";
}

INSTANTIATE_TEST_SUITE_P(
    All, PlantedBugTest,
    ::testing::Values(PlantedBug{"NoFencing", Bug::kNoFencing}, PlantedBug{"StaleStream", Bug::kStaleStream},
                      PlantedBug{"ChangedReplay", Bug::kChangedReplay}, PlantedBug{"DoubleCount", Bug::kDoubleCount},
                      PlantedBug{"LostOutcome", Bug::kLostOutcome}, PlantedBug{"SendAfterClose", Bug::kSendAfterClose},
                      PlantedBug{"IgnoredDeadline", Bug::kIgnoredDeadline}, PlantedBug{"EarlyLeave", Bug::kEarlyLeave},
                      PlantedBug{"WrongVariance", Bug::kWrongVariance}, PlantedBug{"SplitOutcome", Bug::kSplitOutcome},
                      PlantedBug{"AcceptedNan", Bug::kAcceptedNan}, PlantedBug{"AnyLayers", Bug::kAnyLayers},
                      PlantedBug{"SilentLate", Bug::kSilentLate}, PlantedBug{"LostDeclaration", Bug::kLostDeclaration},
                      PlantedBug{"StolenSeat", Bug::kStolenSeat}),
    [](const auto& info) { return info.param.name; });

}  // namespace

// Takes what is meant for the simulation out of the arguments and the environment.
void Configure(int argc, char** argv) {
  if (const char* seed = std::getenv("SYNCBN_SIM_SEED")) first_seed = std::strtoull(seed, nullptr, 10);
  if (const char* number = std::getenv("SYNCBN_SIM_SCHEDULES")) schedules = std::strtoull(number, nullptr, 10);
  for (int i = 1; i < argc; ++i) {
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
