// Workers of which some give a step up alone, and which agree again by the error that the others get.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "client/cc/errors.h"
#include "client/cc/worker.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/cc/worker_group.h"

namespace syncbn::testing {
namespace {

using ::testing::ElementsAre;

// Takes a step of two sums until three have succeeded. Returns what came of each: "", "gave up" or an error's reason.
std::vector<std::string> Train(Worker& worker, bool gives_up_the_second) {
  std::vector<std::string> attempts;
  for (int done = 0; done < 3 && attempts.size() < 20;) {
    auto sum = Sum(worker, "first", {1.0});
    if (sum.ok() && attempts.size() == 1 && gives_up_the_second) {
      attempts.push_back("gave up");
      continue;
    }
    if (sum.ok()) sum = Sum(worker, "second", {1.0});
    done += sum.ok() ? 1 : 0;
    attempts.push_back(DetailsOf(sum.status()).reason);
  }
  return attempts;
}

TEST(ResumptionTest, AStepThatOneWorkerGivesUpCostsTheOthersOneStep) {
  const auto master = StartMaster();
  ASSERT_NE(master, nullptr);
  const auto workers = JoinAll(master->target(), 3);
  std::vector<std::vector<std::string>> attempts(3);
  OnEachRank(3, [&](uint32_t rank) { attempts[rank] = Train(*workers[rank], rank == 0); });
  EXPECT_THAT(attempts[0], ElementsAre("", "gave up", "DEADLOCK", "", ""));
  for (uint32_t rank = 1; rank < 3; ++rank) EXPECT_THAT(attempts[rank], ElementsAre("", "DEADLOCK", "", ""));
}

}  // namespace
}  // namespace syncbn::testing
