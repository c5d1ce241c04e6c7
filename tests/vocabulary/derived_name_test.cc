// Names that stand for a layer's further rounds: as they are written down, and within the protocol's limit.

#include "vocabulary/derived_name.h"

#include <string>

#include "gtest/gtest.h"

namespace syncbn {
namespace {

TEST(DerivedNameTest, JoinsWhatFits) {
  EXPECT_EQ(DerivedName("bn", "/retained"), "bn/retained");
  const std::string longest(kMostNameBytes - 9, 'a');
  EXPECT_EQ(DerivedName(longest, "/retained"), longest + "/retained");
}

// The same names as in client/python/tests/test_naming.py: workers of every language meet by them.
TEST(DerivedNameTest, HashesWhatDoesNot) {
  EXPECT_EQ(DerivedName(std::string(247, 'a'), "/retained"), std::string(229, 'a') + "~1d4db4a3fed17e6e/retained");
  EXPECT_EQ(DerivedName(std::string(300, 'a'), ""), std::string(238, 'a') + "~ee7717eba7a17e21");
}

TEST(DerivedNameTest, CutsNoCharacterInTwo) {
  std::string accents;
  for (int i = 0; i < 13; ++i) accents += "\u00e9";
  const std::string kept(228, 'a');
  EXPECT_EQ(DerivedName(kept + accents, "/retained"), kept + "~c4101a41ace45bb5/retained");
}

}  // namespace
}  // namespace syncbn
