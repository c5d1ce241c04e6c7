// kernels_check of a build without CUDA.

#include <cstdio>

int main() {
  std::puts("skipped: built without CUDA");
  return 0;
}
