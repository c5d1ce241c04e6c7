#include "plumbing/start_thread.h"

#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"

namespace syncbn {

absl::Status StartThread(absl::string_view purpose, std::function<void()> run, std::thread* thread) {
  try {
    *thread = std::thread(std::move(run));
  } catch (const std::system_error& error) {
    return absl::ResourceExhaustedError(absl::StrCat("no thread can be had for ", purpose, ": ", error.code().message(),
                                                     "; the limit of the user's or the container's processes "
                                                     "(ulimit -u, pids.max) may have been reached"));
  }
  return absl::OkStatus();
}

}  // namespace syncbn
