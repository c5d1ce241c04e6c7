#include "plumbing/start_thread.h"

#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"

namespace syncbn {

absl::Status StartThread(absl::string_view purpose, std::function<void()> run, std::thread* thread) {
  try {
    *thread = std::thread(std::move(run));
  } catch (const std::system_error& error) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no thread can be had for ", purpose, ": ", error.code().message(),
                     "; the limit of the user's or the container's processes "
                     "(ulimit -u, pids.max), or of memory (ulimit -v), may have been reached"));
  }
  return absl::OkStatus();
}

absl::Status CheckThreads(absl::string_view purpose, int count) {
  absl::Notification all;
  std::vector<std::thread> threads(static_cast<size_t>(count));
  absl::Status status;
  for (auto thread = threads.begin(); thread != threads.end() && status.ok(); ++thread) {
    status = StartThread(
        purpose, [&all] { all.WaitForNotification(); }, &*thread);
  }
  all.Notify();
  for (std::thread& thread : threads) {
    if (thread.joinable()) thread.join();
  }
  return status;
}

}  // namespace syncbn
