// The host executor's results have the recorded bits. A GPU is held to the same file by tools/gpu_check, so an equal
// sum here says what a GPU computes. `checksums_test --print` writes the file anew, after a change that is meant to
// change results.

#include "tests/kernels/cuda/checksums.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "tests/kernels/cuda/host_kernels.h"

namespace syncbn::testing {
namespace {

TEST(Checksums, AsRecorded) {
  std::ifstream file("tests/kernels/cuda/checksums.txt");
  ASSERT_TRUE(file);
  std::vector<std::string> recorded;
  for (std::string line; std::getline(file, line);) recorded.push_back(line);
  HostBackend backend;
  const std::vector<std::string> computed = ComputeChecksums(backend);
  ASSERT_EQ(computed.size(), recorded.size());
  for (size_t i = 0; i < computed.size(); ++i) EXPECT_EQ(computed[i], recorded[i]);
}

}  // namespace
}  // namespace syncbn::testing

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "--print") == 0) {
    syncbn::testing::HostBackend backend;
    for (const std::string& line : syncbn::testing::ComputeChecksums(backend)) std::puts(line.c_str());
    return 0;
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
