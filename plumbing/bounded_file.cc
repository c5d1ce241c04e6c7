#include "plumbing/bounded_file.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "plumbing/clock.h"

namespace syncbn {
namespace {

// Waits until a read of `file` does not wait. Returns false, with errno, if it would still wait at `deadline`, a time
// of `clock`.
bool AwaitBytes(int file, const Clock& clock, absl::Time deadline) {
  pollfd waiting = {file, POLLIN, 0};
  const absl::Duration left = std::max(deadline - clock.Now(), absl::ZeroDuration());
  const int ready =
      poll(&waiting, 1, static_cast<int>(absl::ToInt64Milliseconds(absl::Ceil(left, absl::Milliseconds(1)))));
  if (ready == 0) errno = ETIMEDOUT;
  return ready > 0 || (ready < 0 && errno == EINTR);
}

// Appends up to `most_bytes` and one more. Returns whether it went well; otherwise errno tells.
bool ReadSome(int file, size_t most_bytes, absl::Duration patience, std::string* text) {
  const Clock clock;
  const absl::Time deadline = clock.Now() + patience;
  char buffer[4096];
  while (text->size() <= most_bytes) {
    const ssize_t count = read(file, buffer, std::min(sizeof(buffer), most_bytes + 1 - text->size()));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EAGAIN) {
      if (!AwaitBytes(file, clock, deadline)) return false;
      continue;
    }
    if (count <= 0) return count == 0;
    text->append(buffer, static_cast<size_t>(count));
  }
  return true;
}

}  // namespace

absl::StatusOr<std::string> ReadBoundedFile(absl::string_view what, const std::string& path, size_t most_bytes,
                                            absl::Duration patience) {
  std::string text;
  // Opening a pipe that nobody writes to would wait for ever.
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  const bool read = file >= 0 && ReadSome(file, most_bytes, patience, &text);
  const int error = errno;
  if (file >= 0) close(file);
  if (!read) {
    return absl::InvalidArgumentError(
        absl::StrCat("cannot read the ", what, " \"", path, "\": ", absl::AsciiStrToLower(std::strerror(error))));
  }
  if (text.size() > most_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the ", what, " \"", path, "\" is longer than ", most_bytes, " bytes, the most that are read"));
  }
  return text;
}

}  // namespace syncbn
