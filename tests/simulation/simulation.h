// One schedule: a master, its workers and the network between them, on a virtual clock, all drawn from one seed.

#ifndef SYNCBN_TESTS_SIMULATION_SIMULATION_H_
#define SYNCBN_TESTS_SIMULATION_SIMULATION_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tests/simulation/model.h"
#include "tests/simulation/mutant.h"

namespace syncbn::simulation {

struct Report {
  // The promise that was broken; nothing if all held.
  std::optional<std::string> violation;
  // What happened, line by line, if it was asked for.
  std::vector<std::string> log;
  uint64_t events = 0;
  uint64_t master_restarts = 0;
  uint64_t worker_restarts = 0;
  uint64_t broken_streams = 0;
  Tally tally;
};

// Runs the schedule of this seed. Two to six workers work through a few rounds of several layers, in orders of their
// own. For a while streams break and are late, workers stall, crash, restart (some while their predecessors still
// live), repeat themselves, send bad numbers, and the master restarts; then the faults end, and everything must.
Report RunSchedule(uint64_t seed, Bug bug = Bug::kNone, bool keep_log = false);

}  // namespace syncbn::simulation

#endif  // SYNCBN_TESTS_SIMULATION_SIMULATION_H_
