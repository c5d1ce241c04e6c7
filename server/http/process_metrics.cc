#include "server/http/process_metrics.h"

#include <dirent.h>
#include <sys/resource.h>
#include <unistd.h>

#include <fstream>
#include <iterator>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace syncbn::http {
namespace {

std::string ReadFile(const char* path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

double Number(absl::string_view text) {
  double number = 0.0;
  return absl::SimpleAtod(text, &number) ? number : 0.0;
}

// Returns the time at which the machine started, in seconds since the epoch; 0 if it is not known.
double BootTime() {
  for (absl::string_view line : absl::StrSplit(ReadFile("/proc/stat"), '\n')) {
    if (absl::ConsumePrefix(&line, "btime ")) return Number(line);
  }
  return 0.0;
}

int OpenDescriptors() {
  DIR* const folder = opendir("/proc/self/fd");
  if (folder == nullptr) return 0;
  int entries = 0;
  while (readdir(folder) != nullptr) ++entries;
  closedir(folder);
  return entries - 3;  // ".", "..", and the folder's own.
}

}  // namespace

std::vector<ProcessMetric> ReadProcessMetrics() {
  std::vector<ProcessMetric> metrics;
  metrics.push_back({"process_open_fds", "Open file descriptors.", false, static_cast<double>(OpenDescriptors())});
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    metrics.push_back(
        {"process_max_fds", "Most file descriptors that may be open.", false, static_cast<double>(limit.rlim_cur)});
  }
  const std::string text = ReadFile("/proc/self/stat");
  const size_t name_end = text.rfind(')');  // The program's name may have spaces.
  if (name_end == std::string::npos || name_end + 2 > text.size()) return metrics;
  // Field 3 of proc(5), the state, is the first here.
  const std::vector<std::string> fields = absl::StrSplit(text.substr(name_end + 2), ' ');
  if (fields.size() < 22) return metrics;
  const auto ticks = static_cast<double>(sysconf(_SC_CLK_TCK));
  metrics.push_back({"process_cpu_seconds_total", "User and system CPU time spent, in seconds.", true,
                     (Number(fields[11]) + Number(fields[12])) / ticks});
  metrics.push_back({"process_threads", "Threads of the process.", false, Number(fields[17])});
  metrics.push_back({"process_start_time_seconds", "Start time of the process since the epoch, in seconds.", false,
                     BootTime() + Number(fields[19]) / ticks});
  metrics.push_back(
      {"process_virtual_memory_bytes", "Size of the virtual memory in bytes.", false, Number(fields[20])});
  metrics.push_back({"process_resident_memory_bytes", "Size of the resident memory in bytes.", false,
                     Number(fields[21]) * static_cast<double>(sysconf(_SC_PAGESIZE))});
  return metrics;
}

}  // namespace syncbn::http
