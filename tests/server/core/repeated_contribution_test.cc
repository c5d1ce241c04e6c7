// The table of PROTOCOL.md, section 4: the answer to a contribution, by the state of its round and by what its rank has
// contributed before. The test reads the table and tries each cell.

#include <cmath>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/error.h"
#include "tests/testing/engine.h"

namespace syncbn::core {
namespace {

using testing::BatchNormLayer;
using testing::Engine;
using testing::Forward;
using testing::Numbers;
using testing::ReasonOf;

enum Row { kPending, kRemembered, kOutcomeForgotten, kForgotten, kRows };
enum Column { kNothing, kSame, kOther, kPredecessor, kColumns };

// Nobody requires a backward round, for which the forward round would be remembered longer.
const Numbers kFirst{4, {1.0}, {0.5}, BackwardRole::kNone};
const Numbers kOthers{4, {2.0}, {0.5}, BackwardRole::kNone};
const Numbers kPeers{4, {1.0}, {0.5}, BackwardRole::kNone};

// The cells of the table whose first heading is "the round", row by row, without the first column.
std::vector<std::vector<std::string>> TableOfTheDocument() {
  std::ifstream document("proto/PROTOCOL.md");
  EXPECT_TRUE(document.good());
  std::string line;
  while (std::getline(document, line) && line.rfind("| the round | nothing |", 0) != 0) {
  }
  std::getline(document, line);  // The rule below the headings.
  std::vector<std::vector<std::string>> table;
  while (std::getline(document, line) && line.rfind("| ", 0) == 0) {
    const std::vector<std::string> cells = absl::StrSplit(line, " | ");
    table.emplace_back(cells.begin() + 1, cells.end());
  }
  return table;
}

// A group of two whose rank 0 contributes to one key at last.
class RepeatedContributionTest : public ::testing::TestWithParam<int> {
 protected:
  RepeatedContributionTest() : engine_(LimitsOf(row())) {
    for (Rank rank = 0; rank < 2; ++rank) workers_.push_back(engine_.Join(rank, 2, {BatchNormLayer("bn", 1)}));
  }

  Row row() const { return static_cast<Row>(GetParam() / kColumns); }
  Column column() const { return static_cast<Column>(GetParam() % kColumns); }

  // Brings the round into the state of the row, with the column's history.
  void Prepare() {
    if (column() != kNothing) engine_.Contribute(workers_[0], key_, kFirst);
    if (row() != kPending) {
      // Without a contribution of rank 0 a round can only fail.
      const Numbers bad{4, {std::nan("")}, {0.5}};
      engine_.Contribute(workers_[1], key_, column() == kNothing ? bad : kPeers);
    } else if (column() == kNothing) {
      engine_.Contribute(workers_[1], key_, kPeers);
    }
    if (row() == kOutcomeForgotten) Complete(key_.sequence + 1);
    if (row() == kForgotten) Complete(key_.sequence + 2 * Limits().retained_rounds);
    if (column() == kPredecessor) {
      engine_.Close(workers_[0]);
      workers_[0] = engine_.Join(0, 2, {BatchNormLayer("bn", 1)});
    }
  }

  void Complete(uint64_t sequence) {
    for (const StreamId worker : workers_) engine_.Contribute(worker, Forward("bn", sequence), kPeers);
  }

  // The mean of the round, which rank 1 completes if that is still to be done.
  double MergedMean() {
    if (column() != kNothing) engine_.Contribute(workers_[1], key_, kPeers);
    return engine_.Outcome(workers_[1], key_)->first.at(0);
  }

  const RoundKey key_ = Forward("bn", 7);
  Engine engine_;
  std::vector<StreamId> workers_;

 private:
  static Limits LimitsOf(Row row) {
    Limits limits;
    if (row == kOutcomeForgotten) {
      limits.max_retained_bytes = 1;
      limits.min_retained_outcomes = 1;
    }
    return limits;
  }
};

TEST_P(RepeatedContributionTest, IsAnsweredAsTheTableSays) {
  const auto table = TableOfTheDocument();
  ASSERT_EQ(table.size(), static_cast<size_t>(kRows));
  ASSERT_EQ(table[row()].size(), static_cast<size_t>(kColumns));
  const std::string& cell = table[row()][column()];
  SCOPED_TRACE(cell);
  Prepare();
  const size_t told_before = engine_.Outcomes(workers_[0], key_).size();
  const bool repeats = column() == kSame;
  engine_.Contribute(workers_[0], key_, repeats || column() == kNothing ? kFirst : kOthers);
  const auto told = engine_.Outcomes(workers_[0], key_);
  const bool answered = told.size() == told_before + 1;
  const std::string reason = answered ? ReasonOf(*told.back()) : "";
  if (absl::StartsWith(cell, "the outcome")) {
    EXPECT_TRUE(answered);
    EXPECT_EQ(reason, column() == kNothing ? kNotFinite : "");
  } else if (absl::StrContains(cell, kRoundExpired)) {
    EXPECT_EQ(reason, kRoundExpired);
  } else if (absl::StrContains(cell, kPayloadChanged)) {
    EXPECT_EQ(reason, kPayloadChanged);
    if (row() == kPending) {
      EXPECT_EQ(MergedMean(), 1.0);
    }
  } else if (absl::StartsWith(cell, "replaces")) {
    EXPECT_FALSE(answered);
    EXPECT_EQ(MergedMean(), 1.5);
  } else if (absl::StartsWith(cell, "changes nothing")) {
    EXPECT_FALSE(answered);
    EXPECT_EQ(MergedMean(), 1.0);
  } else {
    ASSERT_EQ(cell, "counts");
    EXPECT_EQ(MergedMean(), 1.0);
  }
}

INSTANTIATE_TEST_SUITE_P(Cells, RepeatedContributionTest, ::testing::Range(0, static_cast<int>(kRows) * kColumns));

// "An empty vector and a vector of zeros are different numbers", and so are roles.
TEST(NumbersTest, EmptyVectorsAreNotZeros) {
  Engine engine;
  const StreamId worker = engine.Join(0, 2, {BatchNormLayer("bn", 1)});
  engine.Contribute(worker, Forward("bn", 0), {0, {}, {}});
  engine.Contribute(worker, Forward("bn", 0), {0, {0.0}, {0.0}});
  EXPECT_EQ(ReasonOf(*engine.Outcome(worker, Forward("bn", 0))), kPayloadChanged);
}

// "`missing_ranks` names those contributors of the forward round that did not contribute."
TEST(MissingRanksTest, OfABackwardRoundAreContributorsOfItsForwardRound) {
  Engine engine;
  std::vector<StreamId> workers;
  for (Rank rank = 0; rank < 3; ++rank) {
    Join join = testing::MakeJoin(rank, 3);
    join.config.missing_policy = MissingPolicy::kProceed;
    join.config.min_workers = 1;
    workers.push_back(engine.Join(join));
    engine.Declare(workers.back(), {BatchNormLayer("bn", 1)});
  }
  for (const Rank rank : {0, 1}) engine.Contribute(workers[rank], Forward("bn", 0), {4, {1.0}, {0.5}});
  engine.Advance(*engine.View().config.round_timeout);
  EXPECT_THAT(engine.Outcome(workers[0], Forward("bn", 0))->missing_ranks, ::testing::ElementsAre(2));
  engine.Contribute(workers[0], testing::Backward("bn", 0), {0, {1.0}, {1.0}});
  engine.Advance(*engine.View().config.round_timeout);
  EXPECT_THAT(engine.Outcome(workers[0], testing::Backward("bn", 0))->missing_ranks, ::testing::ElementsAre(1));
}

TEST(MissingRanksTest, AreAllButTheContributors) {
  Engine engine;
  std::vector<StreamId> workers;
  for (Rank rank = 0; rank < 6; ++rank) workers.push_back(engine.Join(rank, 6, {BatchNormLayer("bn", 1)}));
  const auto missing_from = [&](uint64_t sequence, const std::vector<Rank>& contributors) {
    for (const Rank rank : contributors) engine.Contribute(workers[rank], Forward("bn", sequence), {0, {}, {}});
    engine.Advance(*engine.View().config.round_timeout);
    return engine.Outcome(workers[contributors.front()], Forward("bn", sequence))->error->ranks;
  };
  EXPECT_THAT(missing_from(0, {0}), ::testing::ElementsAre(1, 2, 3, 4, 5));
  EXPECT_THAT(missing_from(1, {2, 3}), ::testing::ElementsAre(0, 1, 4, 5));
  EXPECT_THAT(missing_from(2, {5, 1}), ::testing::ElementsAre(0, 2, 3, 4));
  EXPECT_THAT(missing_from(3, {0, 1, 3, 4, 5}), ::testing::ElementsAre(2));
}

}  // namespace
}  // namespace syncbn::core
