#ifndef SYNCBN_TESTS_LAYOUT_PLANTED_COPYING_H_
#define SYNCBN_TESTS_LAYOUT_PLANTED_COPYING_H_

#include <cstddef>
#include <string>
#include <vector>

namespace syncbn::testing {

// Copies each element.
inline size_t TotalSize(const std::vector<std::string>& names) {
  size_t size = 0;
  for (const std::string name : names) size += name.size();
  return size;
}

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_LAYOUT_PLANTED_COPYING_H_
