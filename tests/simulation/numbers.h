// The numbers that rounds are of, and what they merge to: in long double, without the code that is tested.

#ifndef SYNCBN_TESTS_SIMULATION_NUMBERS_H_
#define SYNCBN_TESTS_SIMULATION_NUMBERS_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "server/core/coordinator.h"
#include "tests/simulation/frame.h"

namespace syncbn::simulation {

// A contribution that a master has taken.
struct Held {
  uint64_t incarnation = 0;
  NumbersPtr numbers;
  bool bad = false;  // A master must refuse the numbers.
};
using HeldParts = std::map<core::Rank, Held>;

// Returns true if a replay with these numbers is the same contribution, bit for bit.
bool SameNumbers(const testing::Numbers& a, const testing::Numbers& b);
// Returns true if a master must refuse these numbers for a round of this phase, of a layer of this declaration.
bool IsBad(core::Phase phase, const testing::Numbers& numbers, const core::LayerSpec& spec);

// The merge of a round's contributions, as it should be.
struct Merged {
  int64_t count = 0;
  std::vector<long double> first;
  std::vector<long double> second;
  std::vector<long double> first_scale;  // The magnitudes against which rounding is judged.
  std::vector<long double> second_scale;
};

// `forward_count` is the count of a backward round's forward round.
Merged Merge(const core::RoundKey& key, uint32_t channels, const HeldParts& parts, int64_t forward_count);
// Returns what is wrong with the numbers of an outcome; empty if nothing is.
std::string CompareNumbers(const core::RoundOutcome& outcome, const Merged& merged);

// The running statistics of a layer, by the rounds that completed.
class RunningModel {
 public:
  // Adds a round. `later`: it belongs to the layer as it was declared anew.
  void Add(const Merged& round, const core::LayerSpec& spec, bool later);
  // Returns false if the statistics that are shown are not those of the rounds.
  bool Agrees(const core::LayerView& view) const;

 private:
  std::vector<long double> mean_;
  std::vector<long double> var_;
  uint64_t updates_ = 0;
  bool later_ = false;      // They belong to the layer as it was declared anew.
  bool mixed_ = false;      // An earlier size has come after the later one: which of them counts is a matter of order.
  bool any_later_ = false;  // A round of the later size has completed, be it one of empty batches.
};

}  // namespace syncbn::simulation

#endif  // SYNCBN_TESTS_SIMULATION_NUMBERS_H_
