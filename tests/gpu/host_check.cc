// The part of tools/gpu_check that needs no GPU: the kernels' algorithms, run on the host, give the recorded bits.
//
//   host_check CHECKSUMS

#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "tests/kernels/cuda/checksums.h"
#include "tests/kernels/cuda/host_kernels.h"

int main(int argc, char** argv) {
  std::ifstream file(argc == 2 ? argv[1] : "");
  if (!file) {
    std::fprintf(stderr, "usage: host_check CHECKSUMS\n");
    return 2;
  }
  std::vector<std::string> recorded;
  for (std::string line; std::getline(file, line);) recorded.push_back(line);
  syncbn::testing::HostBackend backend;
  const std::vector<std::string> computed = syncbn::testing::ComputeChecksums(backend);
  size_t different = computed.size() == recorded.size() ? 0 : 1;
  for (size_t i = 0; i < computed.size() && i < recorded.size(); ++i) different += computed[i] != recorded[i];
  std::printf("host: %zu results, %zu differ from %s\n", computed.size(), different, argv[1]);
  return different == 0 ? 0 : 1;
}
