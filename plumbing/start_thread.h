// Threads that the system may refuse.

#ifndef SYNCBN_PLUMBING_START_THREAD_H_
#define SYNCBN_PLUMBING_START_THREAD_H_

#include <functional>
#include <thread>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace syncbn {

// Starts a thread that runs `run`, and assigns it to `thread`, which must not be joinable. `purpose` completes the
// error's sentence: "no thread can be had for PURPOSE".
// Errors: RESOURCE_EXHAUSTED if the system grants none; `thread` is as it was.
absl::Status StartThread(absl::string_view purpose, std::function<void()> run, std::thread* thread);

// Returns OK if so many threads can be had at once, beside those that there are. They have ended when it returns, but
// count for the system a moment longer. `purpose` and errors are those of StartThread.
absl::Status CheckThreads(absl::string_view purpose, int count);

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_START_THREAD_H_
