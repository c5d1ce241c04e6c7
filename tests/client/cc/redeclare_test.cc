// Layers and sums that a worker declares anew: another width, another eps, another length.

#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/cc/worker_group.h"

namespace syncbn::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class RedeclareTest : public ::testing::TestWithParam<uint32_t> {
 protected:
  void SetUp() override {
    master_ = StartMaster();
    ASSERT_NE(master_, nullptr);
    workers_ = JoinAll(master_->target(), GetParam());
  }
  uint32_t world_size() const { return GetParam(); }

  // Contributes the moments of the value rank + 1 in each of `channels` channels, once.
  Round StartForward(Worker& worker, uint32_t channels) {
    const std::vector<double> mean(channels, worker.rank() + 1.0), m2(channels, 0.0);
    auto round = worker.StartForward("1", Worker::kNextSequence, 1, mean, m2, BackwardRole::kRequired);
    EXPECT_TRUE(round.ok()) << round.status();
    return *std::move(round);
  }

  std::unique_ptr<MasterServer> master_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

TEST_P(RedeclareTest, ASumMayChangeItsLength) {
  OnEachRank(world_size(), [&](uint32_t rank) {
    for (const size_t length : {23, 23, 41, 41, 7, 23}) {
      const auto sum = Sum(*workers_[rank], "gradients", std::vector<double>(length, 1.0));
      ASSERT_TRUE(sum.ok()) << "rank " << rank << ": " << sum.status();
      EXPECT_EQ(*sum, std::vector<double>(length, world_size()));
    }
  });
}

TEST_P(RedeclareTest, SumsOfManyLengthsMayBeUnderWayTogether) {
  const std::vector<size_t> lengths = {1, 2, 2, 3, 1, 5, 2};
  OnEachRank(world_size(), [&](uint32_t rank) {
    std::vector<Round> rounds;
    for (const size_t length : lengths) {
      auto round = workers_[rank]->StartSum("v", Worker::kNextSequence, std::vector<double>(length, 1.0));
      ASSERT_TRUE(round.ok()) << round.status();
      rounds.push_back(*std::move(round));
    }
    for (size_t i = 0; i < lengths.size(); ++i) {
      const absl::Status status = rounds[i].Wait();
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_EQ(rounds[i].result().vector(), std::vector<double>(lengths[i], world_size()));
    }
  });
}

// A vector of pieces that grows by a part of a piece: its last piece changes its length, and one is added.
TEST_P(RedeclareTest, ALongSumMayGrow) {
  OnEachRank(world_size(), [&](uint32_t rank) {
    std::vector<Round> rounds;
    for (const size_t length : {(size_t{1} << 20) + 3, (size_t{2} << 20) + 5}) {
      auto round = workers_[rank]->StartSum("v", Worker::kNextSequence, std::vector<double>(length, 1.0));
      ASSERT_TRUE(round.ok()) << round.status();
      rounds.push_back(*std::move(round));
    }
    for (Round& round : rounds) {
      const absl::Status status = round.Wait();
      ASSERT_TRUE(status.ok()) << status;
    }
    EXPECT_EQ(rounds[0].result().vector(), std::vector<double>((size_t{1} << 20) + 3, world_size()));
    EXPECT_EQ(rounds[1].result().vector(), std::vector<double>((size_t{2} << 20) + 5, world_size()));
  });
}

TEST_P(RedeclareTest, TwoModelsMayUseOneName) {
  OnEachRank(world_size(), [&](uint32_t rank) {
    Worker& worker = *workers_[rank];
    for (int step = 0; step < 3; ++step) {
      ASSERT_TRUE(worker.DeclareLayer(BatchNormOptions("1", 2)).ok());
      Round narrow = StartForward(worker, 2);
      ASSERT_TRUE(worker.DeclareLayer(BatchNormOptions("1", 5)).ok());
      Round wide = StartForward(worker, 5);
      ASSERT_TRUE(wide.Wait().ok());
      ASSERT_TRUE(narrow.Wait().ok());
      EXPECT_EQ(narrow.result().mean(), std::vector<double>(2, (world_size() + 1.0) / 2));
      EXPECT_EQ(wide.result().mean(), std::vector<double>(5, (world_size() + 1.0) / 2));
      for (const auto& [round, channels] : {std::pair<Round*, size_t>{&wide, 5}, {&narrow, 2}}) {
        const std::vector<double> sums(channels, 1.0);
        auto backward = worker.StartBackward("1", round->sequence(), sums, sums);
        ASSERT_TRUE(backward.ok()) << backward.status();
        const absl::Status status = backward->Wait();
        ASSERT_TRUE(status.ok()) << status;
        EXPECT_EQ(backward->result().sum_dy(), std::vector<double>(channels, world_size()));
      }
      // An empty batch tells no length.
      Round empty = StartForward(worker, 5);
      ASSERT_TRUE(empty.Wait().ok());
      auto backward = worker.StartBackward("1", empty.sequence(), {}, {});
      ASSERT_TRUE(backward.ok() && backward->Wait().ok());
      EXPECT_EQ(backward->result().sum_dy(), std::vector<double>(5, 0.0));
    }
  });
}

TEST_P(RedeclareTest, EpsMayChangeAfterAStep) {
  OnEachRank(world_size(), [&](uint32_t rank) {
    Worker& worker = *workers_[rank];
    LayerOptions layer = BatchNormOptions("1", 3);
    for (const double eps : {1e-5, 1e-3, 1e-5, 0.1}) {
      layer.eps = eps;
      ASSERT_TRUE(worker.DeclareLayer(layer).ok());
      Round round = StartForward(worker, 3);
      const absl::Status status = round.Wait();
      ASSERT_TRUE(status.ok()) << status;
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Workers, RedeclareTest, ::testing::Values(1, 2, 5),
                         [](const auto& info) { return std::to_string(info.param); });

// Rounds under way when the master goes away are declared as they were, and contributed, before what has been declared
// since.
TEST(RedeclareReconnectTest, RoundsOfBothDeclarationsFormAgain) {
  auto master = StartMaster();
  ASSERT_NE(master, nullptr);
  const int port = master->port();
  const auto workers = JoinAll(master->target(), 2);
  std::vector<Round> rounds;
  for (const size_t length : {2, 3, 4}) {
    auto round = workers[0]->StartSum("v", Worker::kNextSequence, std::vector<double>(length, 1.0));
    ASSERT_TRUE(round.ok());
    ASSERT_TRUE(workers[0]->Flush().ok());
    rounds.push_back(*std::move(round));
  }
  AwaitArrival(*master, "v", 0);
  master.reset();
  master = StartMaster(port);
  ASSERT_NE(master, nullptr);
  OnEachRank(2, [&](uint32_t rank) {
    for (const size_t length : {2, 3, 4}) {
      if (rank == 0) {
        Round& round = rounds[length - 2];
        const absl::Status status = round.Wait();
        ASSERT_TRUE(status.ok()) << status;
        EXPECT_EQ(round.result().vector(), std::vector<double>(length, 3.0));
      } else {
        const auto sum = Sum(*workers[1], "v", std::vector<double>(length, 2.0));
        ASSERT_TRUE(sum.ok()) << sum.status();
        EXPECT_EQ(*sum, std::vector<double>(length, 3.0));
      }
    }
  });
}

TEST(RedeclareDisagreementTest, IsToldAtOnceAndMayBeMended) {
  const auto master = StartMaster();
  const auto workers = JoinAll(master->target(), 2);
  OnEachRank(2, [&](uint32_t rank) {
    const auto sum = Sum(*workers[rank], "v", std::vector<double>(2, 1.0));
    ASSERT_TRUE(sum.ok()) << sum.status();
  });
  OnEachRank(2, [&](uint32_t rank) {
    const auto sum = Sum(*workers[rank], "v", std::vector<double>(rank == 0 ? 2 : 3, 1.0));
    EXPECT_EQ(DetailsOf(sum.status()).reason, "LAYER_SPEC_MISMATCH") << sum.status();
    EXPECT_EQ(DetailsOf(sum.status()).layer, "v");
    EXPECT_THAT(std::string(sum.status().message()), HasSubstr("disagree about the sum 1 of vector \"v\""));
  });
  OnEachRank(2, [&](uint32_t rank) {
    const auto sum = Sum(*workers[rank], "v", std::vector<double>(3, 1.0));
    ASSERT_TRUE(sum.ok()) << sum.status();
    EXPECT_THAT(*sum, ElementsAre(2.0, 2.0, 2.0));
  });
}

}  // namespace
}  // namespace syncbn::testing
