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

// What becomes of the line that describes an event: nothing, it is put into the report, or printed as it happens.
enum class Log { kNone, kKeep, kPrint };

struct Report {
  // The promise that was broken; nothing if all held.
  std::optional<std::string> violation;
  // A line for each event, with Log::kKeep.
  std::vector<std::string> log;
  uint64_t events = 0;
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

}  // namespace syncbn::simulation

#endif  // SYNCBN_TESTS_SIMULATION_SIMULATION_H_
