// The programs that need a GPU, kernels_check and round_phases, in a build without CUDA.

#include <cstdio>

int main() {
  std::puts("skipped: built without CUDA");
  return 0;
}
