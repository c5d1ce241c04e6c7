#include "plumbing/vector_pool.h"

#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace syncbn {
namespace {

using ::testing::ElementsAre;

constexpr size_t kMostBytes = 64 * sizeof(double);

TEST(VectorPoolTest, AVectorOfTheSameLengthGetsTheSameMemory) {
  VectorPool pool(kMostBytes);
  std::vector<double> first = pool.Copy(std::vector<double>{1.0, 2.0});
  const double* const memory = first.data();
  pool.Keep(std::move(first));
  const std::vector<double> second = pool.Copy(std::vector<double>{3.0, 4.0});
  EXPECT_EQ(second.data(), memory);
  EXPECT_THAT(second, ElementsAre(3.0, 4.0));
  const std::vector<double> third = pool.Copy(std::vector<double>{5.0, 6.0});
  EXPECT_NE(third.data(), memory);
  EXPECT_THAT(second, ElementsAre(3.0, 4.0));
}

TEST(VectorPoolTest, AVectorToFillHasItsSizeAndTheMemoryOfOneBefore) {
  VectorPool pool(kMostBytes);
  std::vector<double> first = pool.Take(6);
  ASSERT_EQ(first.size(), 6u);
  const double* const memory = first.data();
  pool.Keep(std::move(first));
  std::vector<double> shorter = pool.Take(4);
  EXPECT_EQ(shorter.size(), 4u);
  EXPECT_EQ(shorter.data(), memory);
  pool.Keep(std::move(shorter));
  const std::vector<double> as_before = pool.Take(6);
  EXPECT_EQ(as_before.size(), 6u);
  EXPECT_EQ(as_before.data(), memory);
}

TEST(VectorPoolTest, AVectorThatIsTooLongStaysTheCallers) {
  VectorPool pool(sizeof(double));
  std::vector<double> left{2.0, 3.0};
  const double* const memory = left.data();
  pool.Keep(std::move(left));
  EXPECT_NE(pool.Take(2).data(), memory);
}

// The layers of a model have several sizes.
TEST(VectorPoolTest, VectorsOfOtherLengthsAreNotInTheWay) {
  VectorPool pool(kMostBytes);
  std::vector<double> kept(32);
  const double* const memory = kept.data();
  pool.Keep(std::move(kept));
  for (size_t size = 1; size < 5; ++size) pool.Keep(std::vector<double>(size));
  EXPECT_EQ(pool.Copy(std::vector<double>(32)).data(), memory);
}

TEST(VectorPoolTest, TheOldestGoFirst) {
  VectorPool pool(kMostBytes);
  std::vector<double> kept(1);
  const double* const memory = kept.data();
  pool.Keep(std::vector<double>(32));
  pool.Keep(std::vector<double>(32));
  pool.Keep(std::move(kept));
  EXPECT_EQ(pool.Take(1).data(), memory);
  EXPECT_EQ(pool.Take(16).capacity(), 32u) << "one of the long ones is left";
  EXPECT_EQ(pool.Take(16).capacity(), 16u);
}

TEST(VectorPoolTest, KeepsFewVectorsHoweverShort) {
  VectorPool pool(size_t{1} << 20);
  pool.Keep(std::vector<double>(100));
  for (int i = 0; i < 32; ++i) pool.Keep(std::vector<double>(1));
  EXPECT_EQ(pool.Take(50).capacity(), 50u) << "the long one was the 33rd newest";
}

// Otherwise short vectors could hold much more memory than anything counts.
TEST(VectorPoolTest, AShortVectorDoesNotGetTheMemoryOfALongOne) {
  VectorPool pool(kMostBytes);
  pool.Keep(std::vector<double>(32));
  EXPECT_LT(pool.Copy(std::vector<double>(15)).capacity(), 32u);
  EXPECT_EQ(pool.Copy({}).capacity(), 0u);
  EXPECT_EQ(pool.Copy(std::vector<double>(16)).capacity(), 32u);
}

TEST(VectorPoolTest, KeepsNoMoreThanItsBytes) {
  VectorPool pool(kMostBytes);
  pool.Keep(std::vector<double>(65));
  EXPECT_EQ(pool.Copy(std::vector<double>(64)).capacity(), 64u) << "too long to be kept";
}

}  // namespace
}  // namespace syncbn
