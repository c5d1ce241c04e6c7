// Reads what the CUDA compiler reports for each kernel and architecture: no stack, no spills, no more registers than
// the planned number of resident blocks leaves.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <string>
#include <vector>

namespace syncbn {
namespace {

struct KernelReport {
  std::string name, architecture;
  int stack = -1, spill_stores = -1, spill_loads = -1, registers = -1;
};

std::vector<KernelReport> ReadReports(const std::string& path) {
  std::ifstream file(path);
  EXPECT_TRUE(file) << path;
  const std::regex entry("Compiling entry function '(\\S+)' for '(sm_\\d+)'");
  const std::regex memory("(\\d+) bytes stack frame, (\\d+) bytes spill stores, (\\d+) bytes spill loads");
  const std::regex registers("Used (\\d+) registers");
  std::vector<KernelReport> reports;
  std::smatch match;
  for (std::string line; std::getline(file, line);) {
    EXPECT_EQ(line.find("warning"), std::string::npos) << line;
    if (std::regex_search(line, match, entry)) {
      reports.emplace_back();
      reports.back().name = match[1];
      reports.back().architecture = match[2];
    } else if (reports.empty()) {
      continue;
    } else if (std::regex_search(line, match, memory)) {
      // A function that a kernel calls has lines like the kernel's own.
      KernelReport& report = reports.back();
      report.stack = std::max(report.stack, std::stoi(match[1]));
      report.spill_stores = std::max(report.spill_stores, std::stoi(match[2]));
      report.spill_loads = std::max(report.spill_loads, std::stoi(match[3]));
    } else if (std::regex_search(line, match, registers)) {
      reports.back().registers = std::stoi(match[1]);
    }
  }
  return reports;
}

// SYNCBN_HAVE_CUDA comes from the build: 1 if there are kernels to report on.
TEST(KernelResources, NoStackAndNoSpills) {
  if (SYNCBN_HAVE_CUDA == 0) GTEST_SKIP() << "built without CUDA";
  const char* const runfiles = std::getenv("TEST_SRCDIR");
  ASSERT_NE(runfiles, nullptr);
  std::map<std::string, int> kernels;
  for (const auto& file : std::filesystem::directory_iterator(std::string(runfiles) + "/syncbn/kernels/cuda")) {
    for (const KernelReport& report : ReadReports(file.path())) {
      SCOPED_TRACE(report.name + " " + report.architecture);
      EXPECT_EQ(report.stack, 0);
      EXPECT_EQ(report.spill_stores, 0);
      EXPECT_EQ(report.spill_loads, 0);
      EXPECT_GT(report.registers, 0);
      EXPECT_LE(report.registers, 128);
      ++kernels[report.architecture];
    }
  }
  // 8 of the statistics, 24 of each of the other operations, 2 that finalize.
  EXPECT_GE(kernels.size(), 7u);
  for (const auto& [architecture, count] : kernels) EXPECT_EQ(count, 82) << architecture;
}

}  // namespace
}  // namespace syncbn
