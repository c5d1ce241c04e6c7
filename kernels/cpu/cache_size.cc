#include "kernels/cpu/cache_size.h"

#include <fstream>
#include <string>

namespace syncbn::kernels::cpu {
namespace {

constexpr int64_t kUsual = int64_t{32} << 20;

// Returns the size that a file of the system tells, as "32768K"; 0 if there is none.
int64_t SizeIn(const std::string& path) {
  std::ifstream file(path);
  int64_t size = 0;
  char unit = 0;
  if (!(file >> size >> unit) || size <= 0) return 0;
  return unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : 0;
}

}  // namespace

int64_t LargestCacheBytes() {
  // Not by sysconf: for processors with a cache for every few cores, glibc 2.36 tells the sum of all.
  static const int64_t bytes = [] {
    for (const char* const level : {"3", "2"}) {
      const int64_t size = SizeIn(std::string("/sys/devices/system/cpu/cpu0/cache/index") + level + "/size");
      if (size != 0) return size;
    }
    return kUsual;
  }();
  return bytes;
}

}  // namespace syncbn::kernels::cpu
