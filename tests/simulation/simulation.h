// One schedule: a master, its workers and the network between them, on a virtual clock, all drawn from one seed.

#ifndef SYNCBN_TESTS_SIMULATION_SIMULATION_H_
#define SYNCBN_TESTS_SIMULATION_SIMULATION_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tests/simulation/mutant.h"
#include "tests/simulation/session_mutant.h"
#include "tests/simulation/settings.h"

namespace syncbn::simulation {

// Planted bugs: of the master, and of every worker's session.
struct Bugs {
  Bug master = Bug::kNone;
  SessionBug session = SessionBug::kNone;
};

// Fate of the line that describes an event: it is dropped, put into the report, or printed as it happens.
enum class Log { kNone, kKeep, kPrint };

// A crash that is asked for, besides what the seed decides.
struct Death {
  uint64_t after_event = 0;  // Right after so many events.
  bool master = false;
  std::optional<core::Rank> worker;  // A worker of this rank dies at the same moment, before the master.
  std::optional<core::Rank> stream;  // The stream of a worker of this rank breaks then.
};

// Schedules, by who dies in them.
enum class Deaths {
  kAmongFaults,  // Anyone may, and other things go wrong.
  kMasters,      // Only masters, and nothing else goes wrong;
  kWorkers,      // the same with workers,
  kBoth,         // and with both.
  kNobody        // Programs raise, and nothing else goes wrong.
};

struct Report {
  // The promise that was broken; nothing if all held.
  std::optional<std::string> violation;
  // A line for each event, with Log::kKeep.
  std::vector<std::string> log;
  uint64_t events = 0;
  Deaths deaths = Deaths::kAmongFaults;
  uint32_t world_size = 0;
  // The crash that was asked for has happened: it was possible, and schedules of this kind do not exclude it.
  bool died = false;
  uint64_t master_restarts = 0;
  uint64_t worker_restarts = 0;
  uint64_t broken_streams = 0;
  Tally tally;
};

// Runs the schedule of this seed: the real coordinator and, for each of two to six workers, the real session. Programs
// work through a few rounds of several layers, in orders of their own. For a while streams break in both directions or
// one, and are late; workers stall, crash, restart (some while their predecessors still live) and send bad numbers;
// strangers join, old frames come again, and the master restarts. Then the faults end, and everything must.
Report RunSchedule(uint64_t seed, Bugs bugs = {}, Log log = Log::kNone);

// The same with one more crash. The course of events before it is that of the schedule without it.
Report RunScheduleWithDeath(uint64_t seed, const Death& death, Bugs bugs = {}, Log log = Log::kNone);

}  // namespace syncbn::simulation

#endif  // SYNCBN_TESTS_SIMULATION_SIMULATION_H_
