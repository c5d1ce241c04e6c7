#include "plumbing/check.h"

#include <unistd.h>

#include <cstdlib>

namespace syncbn::internal {

void CheckFailed(const char* file, int line, const char* condition, const std::string& message) {
  const std::string text = absl::StrCat("syncbn: ", file, ":", line, ": check failed: ", condition,
                                        message.empty() ? "" : ": ", message, "\n");
  // One write, past the streams' buffers and locks. Its result does not matter: the process ends either way.
  const ssize_t written = write(STDERR_FILENO, text.data(), text.size());
  (void)written;
  std::abort();
}

}  // namespace syncbn::internal
