#include "kernels/cpu/parallel.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <cstdint>
#include <thread>
#include <vector>

namespace syncbn::kernels::cpu {
namespace {

// Counts the runs of each block.
std::vector<int> RunCounts(int num_threads, int64_t blocks) {
  std::vector<std::atomic<int>> counts(static_cast<size_t>(blocks));
  ParallelFor(num_threads, blocks, [&](int64_t block) { ++counts[static_cast<size_t>(block)]; });
  return std::vector<int>(counts.begin(), counts.end());
}

TEST(ParallelFor, RunsEachBlockOnce) {
  for (int threads : {-1, 0, 1, 2, 3, 8, 1000}) {
    for (int64_t blocks : {0, 1, 2, 7, 1000}) {
      EXPECT_EQ(RunCounts(threads, blocks), std::vector<int>(static_cast<size_t>(blocks), 1)) << threads;
    }
  }
}

TEST(ParallelFor, OneThreadStaysOnTheCallers) {
  ParallelFor(1, 100,
              [caller = std::this_thread::get_id()](int64_t) { ASSERT_EQ(std::this_thread::get_id(), caller); });
}

TEST(ParallelFor, OtherThreadsTakePart) {
  // Each of the three blocks waits for the other two to start, so three threads are in it.
  std::atomic<int> inside{0};
  ParallelFor(3, 3, [&](int64_t) {
    ++inside;
    while (inside.load() < 3) std::this_thread::yield();
  });
  EXPECT_EQ(inside.load(), 3);
}

TEST(ParallelFor, ServesSeveralCallersAtOnce) {
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int i = 0; i < 6; ++i) {
    callers.emplace_back([&wrong] {
      for (int round = 0; round < 200; ++round) {
        if (RunCounts(4, 33) != std::vector<int>(33, 1)) ++wrong;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST(ParallelFor, KeepsTheCallersRoundingMode) {
  std::fesetround(FE_DOWNWARD);
  std::atomic<int> other{0};
  ParallelFor(4, 100, [&](int64_t) {
    if (std::fegetround() != FE_DOWNWARD) ++other;
  });
  std::fesetround(FE_TONEAREST);
  EXPECT_EQ(other.load(), 0);
}

TEST(ParallelFor, WorksInAForkedChild) {
  RunCounts(4, 100);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);
    _exit(RunCounts(4, 100) == std::vector<int>(100, 1) ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_EQ(RunCounts(4, 100), std::vector<int>(100, 1));
}

}  // namespace
}  // namespace syncbn::kernels::cpu
