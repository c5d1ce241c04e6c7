// Layers with parameters of their own: training by all workers, evaluation by one, and the declarations of a name that
// two models share.

#include "client/cc/batch_norm.h"

#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/cc/worker_group.h"

namespace syncbn::testing {
namespace {

using ::testing::DoubleNear;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Pointwise;

constexpr double kRoundoff = 1e-14;

BatchNorm::Options OptionsOf(int64_t channels) {
  BatchNorm::Options options;
  options.name = "bn";
  options.channels = channels;
  return options;
}

// A tensor of one channel and any number of rows. `values` must outlive the view.
TensorView View(std::vector<double>& values) {
  TensorView view;
  view.data = values.data();
  view.shape.batch = static_cast<int64_t>(values.size());
  view.shape.channels = 1;
  view.shape.spatial = 1;
  view.shape.type = kernels::DataType::kFloat64;
  return view;
}

// The batch 1, 3, 8 has mean 4, variance 26/3 and unbiased variance 13.
class BatchNormTest : public ::testing::Test {
 protected:
  void SetUp() override {
    master_ = StartMaster();
    ASSERT_NE(master_, nullptr);
    workers_ = JoinAll(master_->target(), 2);
  }

  std::vector<double> BatchOf(uint32_t rank) const { return rank == 0 ? std::vector<double>{1, 3} : std::vector{8.0}; }

  std::unique_ptr<MasterServer> master_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

TEST_F(BatchNormTest, TrainsOverTheBatchOfAllWorkersAndEvaluatesWithoutThem) {
  OnEachRank(2, [&](uint32_t rank) {
    absl::StatusOr<BatchNorm> norm = BatchNorm::Create(workers_[rank].get(), OptionsOf(1));
    ASSERT_TRUE(norm.ok()) << norm.status();
    EXPECT_TRUE(norm->training());
    norm->weight()[0] = 2.0;
    norm->bias()[0] = -1.0;
    std::vector<double> x = BatchOf(rank), y(x.size()), dy(x.size(), 1.0), dx(x.size());
    ASSERT_TRUE(norm->Forward(View(x), View(y)).ok());
    std::vector<double> expected;
    for (const double value : x) expected.push_back((value - 4.0) / std::sqrt(26.0 / 3.0 + 1e-5) * 2.0 - 1.0);
    EXPECT_THAT(y, Pointwise(DoubleNear(kRoundoff), expected));
    EXPECT_THAT(norm->running_mean(), ElementsAre(DoubleNear(0.4, kRoundoff)));
    EXPECT_THAT(norm->running_var(), ElementsAre(DoubleNear(0.9 + 1.3, kRoundoff)));
    EXPECT_EQ(norm->num_batches_tracked(), 1);
    // A gradient that is the same everywhere changes the mean alone, which the layer takes away.
    ASSERT_TRUE(norm->Backward(View(x), View(dy), View(dx)).ok());
    EXPECT_THAT(dx, Pointwise(DoubleNear(1e-9), std::vector<double>(x.size(), 0.0)));
    EXPECT_THAT(norm->bias_gradient(), ElementsAre(static_cast<double>(x.size())));

    if (rank == 1) return;  // Evaluation is one worker's own affair.
    norm->set_training(false);
    norm->ClearGradients();
    ASSERT_TRUE(norm->Forward(View(x), View(y)).ok());
    const double scale = 2.0 / std::sqrt(2.2 + 1e-5);
    EXPECT_THAT(y, ElementsAre(DoubleNear(0.6 * scale - 1.0, kRoundoff), DoubleNear(2.6 * scale - 1.0, kRoundoff)));
    ASSERT_TRUE(norm->Backward(View(x), View(dy), View(dx)).ok());
    EXPECT_THAT(dx, Pointwise(DoubleNear(kRoundoff), std::vector<double>(2, scale)));
    EXPECT_THAT(norm->weight_gradient(), ElementsAre(DoubleNear(3.2 * scale / 2.0, kRoundoff)));
    EXPECT_THAT(norm->bias_gradient(), ElementsAre(2.0));
    EXPECT_EQ(norm->num_batches_tracked(), 1);
  });
}

TEST_F(BatchNormTest, KeepsTheBiasedVarianceWhereItIsAskedTo) {
  OnEachRank(2, [&](uint32_t rank) {
    BatchNorm::Options options = OptionsOf(1);
    options.biased_running_variance = true;
    options.momentum = std::nullopt;  // The average over all batches: of one, that batch.
    options.affine = false;
    absl::StatusOr<BatchNorm> norm = BatchNorm::Create(workers_[rank].get(), options);
    ASSERT_TRUE(norm.ok()) << norm.status();
    std::vector<double> x = BatchOf(rank), y(x.size());
    ASSERT_TRUE(norm->Forward(View(x), View(y)).ok());
    EXPECT_THAT(norm->running_var(), ElementsAre(DoubleNear(26.0 / 3.0, kRoundoff)));
    EXPECT_THAT(norm->weight(), IsEmpty());
  });
}

// Two models whose layers have one name and differ in an option: each contributes under its own declaration.
TEST_F(BatchNormTest, DeclaresItselfAgainAfterAnotherModelOfTheName) {
  std::vector<BatchNorm::Options> others(5, OptionsOf(1));
  others[0].eps = 1e-3;
  others[1].clamp_eps = true;
  others[2].biased_running_variance = true;
  others[3].momentum = 0.5;
  others[4].momentum = std::nullopt;
  for (const BatchNorm::Options& other : others) {
    OnEachRank(2, [&](uint32_t rank) {
      Worker& worker = *workers_[rank];
      absl::StatusOr<BatchNorm> first = BatchNorm::Create(&worker, OptionsOf(1));
      ASSERT_TRUE(first.ok()) << first.status();
      const LayerOptions declared = *worker.FindLayer("bn");
      absl::StatusOr<BatchNorm> second = BatchNorm::Create(&worker, other);
      ASSERT_TRUE(second.ok()) << second.status();
      const LayerOptions changed = *worker.FindLayer("bn");
      ASSERT_NE(declared, changed);
      std::vector<double> x = BatchOf(rank), y(x.size());
      ASSERT_TRUE(first->Forward(View(x), View(y)).ok());
      EXPECT_EQ(*worker.FindLayer("bn"), declared);
      ASSERT_TRUE(second->Forward(View(x), View(y)).ok());
      EXPECT_EQ(*worker.FindLayer("bn"), changed);
    });
  }
}

TEST_F(BatchNormTest, RefusesOutputsBeforeItsRound) {
  absl::StatusOr<BatchNorm> norm = BatchNorm::Create(workers_[0].get(), OptionsOf(1));
  ASSERT_TRUE(norm.ok()) << norm.status();
  std::vector<double> x = {1, 3, 5}, shorter = {0};
  TensorView across = View(x);  // Lies across x, from its second element on.
  across.data = &x[1];
  across.shape.batch = 2;
  TensorView front = across;
  front.data = x.data();
  // The other worker has begun nothing, so that a round would not end.
  EXPECT_EQ(norm->Forward(View(x), View(shorter)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(norm->Forward(front, across).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(norm->num_batches_tracked(), 0);
  const auto next = workers_[0]->NextRounds();
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_EQ(next->size(), 1) << "a round of the layer has begun";
}

TEST(BatchNormAloneTest, EvaluatesWithoutAWorkerAndDoesNotTrain) {
  absl::StatusOr<BatchNorm> norm = BatchNorm::Create(nullptr, OptionsOf(1));
  ASSERT_TRUE(norm.ok()) << norm.status();
  std::vector<double> x = {2.0}, y = {0.0}, dx = {0.0};
  const absl::Status early = norm->Backward(View(x), View(y), View(dx));
  EXPECT_EQ(early.code(), absl::StatusCode::kFailedPrecondition) << early;
  const absl::Status alone = norm->Forward(View(x), View(y));
  EXPECT_EQ(alone.code(), absl::StatusCode::kFailedPrecondition) << alone;
  EXPECT_THAT(std::string(alone.message()), HasSubstr("\"bn\" has no worker"));
  norm->set_training(false);
  ASSERT_TRUE(norm->Forward(View(x), View(y)).ok());
  EXPECT_THAT(y, ElementsAre(DoubleNear(2.0 / std::sqrt(1.0 + 1e-5), kRoundoff)));
}

TEST(BatchNormAloneTest, RefusesOptionsThatCannotBeUsed) {
  EXPECT_EQ(BatchNorm::Create(nullptr, OptionsOf(0)).status().code(), absl::StatusCode::kInvalidArgument);
  BatchNorm::Options options = OptionsOf(1);
  options.num_threads = 0;
  EXPECT_EQ(BatchNorm::Create(nullptr, options).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace syncbn::testing
