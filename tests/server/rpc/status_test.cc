#include "server/rpc/status.h"

#include <cstdint>
#include <optional>

#include "gmock/gmock.h"
#include "google/rpc/status.pb.h"
#include "gtest/gtest.h"
#include "server/core/error.h"

namespace syncbn::rpc {
namespace {

using ::testing::ElementsAre;

// Returns the error as another master has it from the report of a worker that was told it.
core::Error Reported(const core::Error& error) {
  const core::RoundKey key{"a", 6, core::Phase::kForward};
  google::rpc::Status status;
  ToProto(error, &key, &status);
  return FromProto(status);
}

TEST(StatusTest, AReportedErrorIsTheErrorThatWasTold) {
  core::Error error = core::DeadlockError("all wait", {1, 3});
  for (const std::optional<uint64_t> resume_at :
       {std::optional<uint64_t>(), std::optional<uint64_t>(8), std::optional<uint64_t>(UINT64_MAX - 1)}) {
    error.resume_at = resume_at;
    const core::Error reported = Reported(error);
    EXPECT_EQ(reported.code, error.code);
    EXPECT_STREQ(reported.reason, core::kDeadlock);
    EXPECT_EQ(reported.message, error.message);
    EXPECT_THAT(reported.ranks, ElementsAre(1, 3));
    EXPECT_EQ(reported.rank_count, 2u);
    EXPECT_EQ(reported.resume_at, resume_at);
  }
}

}  // namespace
}  // namespace syncbn::rpc
