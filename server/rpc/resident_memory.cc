#include "server/rpc/resident_memory.h"

#include <fcntl.h>
#include <sys/types.h>
#include <unistd.h>

#include <array>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace syncbn::rpc {

ResidentMemory::ResidentMemory()
    : statm_(open("/proc/self/statm", O_RDONLY | O_CLOEXEC)), page_bytes_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {}

ResidentMemory::~ResidentMemory() {
  if (statm_ >= 0) close(statm_);
}

size_t ResidentMemory::bytes() const {
  std::array<char, 128> text;
  const ssize_t length = pread(statm_, text.data(), text.size(), 0);
  if (length <= 0) return 0;
  // "SIZE RESIDENT ...", in pages.
  const std::vector<absl::string_view> words =
      absl::StrSplit(absl::string_view(text.data(), static_cast<size_t>(length)), ' ');
  size_t pages = 0;
  return words.size() > 1 && absl::SimpleAtoi(words[1], &pages) ? pages * page_bytes_ : 0;
}

}  // namespace syncbn::rpc
