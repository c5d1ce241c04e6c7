#include "server/rpc/executor_threads.h"

#include <time.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <system_error>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"

namespace syncbn::rpc {
namespace {

// The system keeps the first 15 bytes of "default-executor".
constexpr char kName[] = "default-executo";
constexpr absl::Duration kBetweenSearches = absl::Seconds(1);

// Returns nothing if there is no such thread any more.
std::optional<absl::Duration> CpuTimeOf(pid_t thread) {
  // As glibc makes the clock of pthread_getcpuclockid: the thread's, of user and system time.
  constexpr clockid_t kOfThread = 6;
  timespec cpu = {};
  if (clock_gettime(~static_cast<clockid_t>(thread) * 8 | kOfThread, &cpu) != 0) return std::nullopt;
  return absl::DurationFromTimespec(cpu);
}

// Returns how often the thread has given the processor up, or nothing if there is no such thread any more.
std::optional<uint64_t> SleepsOf(pid_t thread) {
  std::ifstream file(absl::StrCat("/proc/self/task/", thread, "/status"));
  for (std::string line; std::getline(file, line);) {
    absl::string_view rest = line;
    uint64_t sleeps = 0;
    if (!absl::ConsumePrefix(&rest, "voluntary_ctxt_switches:")) continue;
    if (absl::SimpleAtoi(rest, &sleeps)) return sleeps;
  }
  return std::nullopt;
}

}  // namespace

void ExecutorThreads::Find() {
  std::error_code error;
  for (std::filesystem::directory_iterator entry("/proc/self/task", error), end; !error && entry != end;
       entry.increment(error)) {
    std::ifstream file(entry->path() / "comm");
    std::string name;
    pid_t thread = 0;
    if (!std::getline(file, name) || name != kName) continue;
    if (!absl::SimpleAtoi(entry->path().filename().string(), &thread)) continue;
    if (std::find(threads_.begin(), threads_.end(), thread) != threads_.end()) continue;
    const auto free = std::find(threads_.begin(), threads_.end(), 0);
    if (free != threads_.end()) *free = thread;
  }
}

ExecutorThreads::Turns ExecutorThreads::turns() {
  const absl::Time now = clock_.Now();
  if (now - found_at_ >= kBetweenSearches) {
    found_at_ = now;
    Find();
  }
  for (size_t i = 0; i < threads_.size(); ++i) {
    LoopTurn& turn = turns_[i];
    const std::optional<absl::Duration> cpu = threads_[i] == 0 ? std::nullopt : CpuTimeOf(threads_[i]);
    if (cpu.has_value() && turn.there && *cpu == turn.cpu) continue;
    const std::optional<uint64_t> sleeps = cpu.has_value() ? SleepsOf(threads_[i]) : std::nullopt;
    if (sleeps.has_value()) {
      turn = {/*there=*/true, *sleeps, /*in_grpc=*/true, *cpu};
    } else {
      threads_[i] = 0;
      turn = {};
    }
  }
  return turns_;
}

}  // namespace syncbn::rpc
