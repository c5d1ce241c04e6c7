// Runs a few schedules again and again, each time with one more crash, at every place where one can be: between any two
// events the master dies, or a worker of any rank, or both, or a worker's stream breaks. What was on its way is lost,
// or comes late, or some of each, as the seed decides.

#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/simulation/simulation.h"

namespace syncbn::simulation {
namespace {

constexpr uint64_t kFirstSeed = 1;
constexpr int kSchedules = 2;  // Of each kind.

struct Kind {
  const char* name;
  Deaths deaths;
  bool master_dies;
  bool worker_dies;
  bool stream_breaks;
};

// Returns the seeds of the first schedules of this kind that complete a few rounds.
std::vector<uint64_t> SeedsOf(Deaths deaths) {
  std::vector<uint64_t> seeds;
  for (uint64_t seed = kFirstSeed; seeds.size() < kSchedules; ++seed) {
    const Report report = RunSchedule(seed);
    if (report.deaths == deaths && report.tally.completed >= 4) seeds.push_back(seed);
  }
  return seeds;
}

// Returns every crash between two events that a schedule of this kind may have.
std::vector<Death> DeathsAfter(uint64_t event, const Kind& kind, uint32_t world_size) {
  std::vector<Death> deaths;
  if (kind.master_dies) deaths.push_back({event, true, std::nullopt, std::nullopt});
  for (core::Rank rank = 0; rank < world_size; ++rank) {
    if (kind.worker_dies) deaths.push_back({event, false, rank, std::nullopt});
    if (kind.worker_dies && kind.master_dies) deaths.push_back({event, true, rank, std::nullopt});
    if (kind.stream_breaks) deaths.push_back({event, false, std::nullopt, rank});
  }
  return deaths;
}

std::string Describe(uint64_t seed, const Death& death) {
  std::string text = "seed " + std::to_string(seed) + ", after event " + std::to_string(death.after_event) + ":";
  if (death.worker.has_value()) text += " rank " + std::to_string(*death.worker) + " dies";
  if (death.stream.has_value()) text += " the stream of rank " + std::to_string(*death.stream) + " breaks";
  if (death.master) text += " the master dies";
  for (const std::string& line : RunScheduleWithDeath(seed, death, {}, Log::kKeep).log) text += "\n" + line;
  return text;
}

class DeathsTest : public ::testing::TestWithParam<Kind> {};

TEST_P(DeathsTest, AtEveryEvent) {
  const Kind& kind = GetParam();
  for (const uint64_t seed : SeedsOf(kind.deaths)) {
    const Report undisturbed = RunSchedule(seed);
    uint64_t runs = 0;
    uint64_t died = 0;
    uint64_t places = 0;  // Between two events, with a death.
    for (uint64_t event = 0; event < undisturbed.events; ++event) {
      const uint64_t died_before = died;
      for (const Death& death : DeathsAfter(event, kind, undisturbed.world_size)) {
        const Report report = RunScheduleWithDeath(seed, death);
        ++runs;
        died += report.died;
        ASSERT_FALSE(report.violation.has_value()) << *report.violation << "\n" << Describe(seed, death);
      }
      places += died != died_before;
    }
    std::printf("seed %llu: %llu events; %llu runs, in %llu of them someone died; at %llu places\n",
                static_cast<unsigned long long>(seed), static_cast<unsigned long long>(undisturbed.events),
                static_cast<unsigned long long>(runs), static_cast<unsigned long long>(died),
                static_cast<unsigned long long>(places));
    // Before the first worker there is nobody to die, and once all have left.
    EXPECT_GT(places, undisturbed.events / 2);
  }
}

INSTANTIATE_TEST_SUITE_P(Kind, DeathsTest,
                         ::testing::Values(Kind{"AmongFaults", Deaths::kAmongFaults, true, true, true},
                                           Kind{"OfMasters", Deaths::kMasters, true, false, false},
                                           Kind{"OfWorkers", Deaths::kWorkers, false, true, false},
                                           Kind{"OfBoth", Deaths::kBoth, true, true, false}),
                         [](const auto& info) { return info.param.name; });

// A new master that claims the memory of the one before it does no harm in schedules in which no master dies. A crash
// of the master shows it in one of a few such schedules.
TEST(DeathsAtEveryEventTest, ShowABugThatTheSchedulesThemselvesDoNot) {
  const Bugs bugs{Bug::kSameMemory, SessionBug::kNone};
  for (uint64_t seed = kFirstSeed; seed < kFirstSeed + 50; ++seed) {
    const Report undisturbed = RunSchedule(seed, bugs);
    if (undisturbed.master_restarts != 0) continue;
    ASSERT_FALSE(undisturbed.violation.has_value()) << *undisturbed.violation;
    for (uint64_t event = 0; event < undisturbed.events; ++event) {
      const Death death{event, /*master=*/true, std::nullopt, std::nullopt};
      const auto violation = RunScheduleWithDeath(seed, death, bugs).violation;
      if (!violation.has_value()) continue;
      std::printf("seed %llu, after event %llu: %s\n", static_cast<unsigned long long>(seed),
                  static_cast<unsigned long long>(event), violation->c_str());
      return;
    }
  }
  FAIL() << "not found";
}

}  // namespace
}  // namespace syncbn::simulation
