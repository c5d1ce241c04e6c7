#include "server/core/rank_set.h"

#include <vector>

#include "gtest/gtest.h"

namespace syncbn::core {
namespace {

TEST(RankSetTest, ListsItsRanksInAscendingOrder) {
  RankSet ranks;
  EXPECT_TRUE(ranks.ToVector().empty());
  for (const Rank rank : {130u, 63u, 0u, 64u, 127u, 5u, 63u}) ranks.insert(rank);
  EXPECT_EQ(ranks.size(), 6u);
  EXPECT_EQ(ranks.ToVector(), (std::vector<Rank>{0, 5, 63, 64, 127, 130}));
}

TEST(RankSetTest, ForgetsWhatIsErased) {
  RankSet ranks;
  for (const Rank rank : {1u, 63u, 200u}) ranks.insert(rank);
  ranks.erase(63);
  ranks.erase(1'000);
  EXPECT_FALSE(ranks.contains(63));
  EXPECT_EQ(ranks.size(), 2u);
  EXPECT_EQ(ranks.ToVector(), (std::vector<Rank>{1, 200}));
  ranks.erase(1);
  ranks.erase(200);
  EXPECT_TRUE(ranks.empty());
  EXPECT_TRUE(ranks.ToVector().empty());
}

}  // namespace
}  // namespace syncbn::core
