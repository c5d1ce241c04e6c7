// The seed of a test that draws numbers.

#ifndef SYNCBN_TESTS_TESTING_SEED_H_
#define SYNCBN_TESTS_TESTING_SEED_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

namespace syncbn::testing {

// Returns a seed of its own for each run, unless SYNCBN_TEST_SEED gives that of another, and prints it.
inline uint32_t Seed() {
  const char* const given = std::getenv("SYNCBN_TEST_SEED");
  const uint32_t seed =
      given == nullptr ? std::random_device()() : static_cast<uint32_t>(std::strtoul(given, nullptr, 10));
  std::printf("seed %u (SYNCBN_TEST_SEED)\n", seed);
  return seed;
}

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_TESTING_SEED_H_
