// A system that grants a master no further thread: the start fails with a sentence, and nothing else ends.

#include <dlfcn.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "plumbing/grpc_process.h"
#include "server/master_server.h"

namespace {

// Counts down the threads of the C++ library, which ours are; gRPC's are made by pthread_create itself. The one at 0 is
// refused.
std::atomic<int> threads_before_refusal = -1;

// The number of threads that the process may have.
std::atomic<int> most_threads = 1 << 20;

bool HasMost() {
  return std::distance(begin(std::filesystem::directory_iterator("/proc/self/task")), {}) >= most_threads;
}

bool IsOfCppLibrary(void* caller) {
  Dl_info info = {};
  return dladdr(caller, &info) != 0 && std::string(info.dli_fname).find("libstdc++") != std::string::npos;
}

}  // namespace

// Takes the place of the C library's, for every library of the process.
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*),
                              void* argument) {
  static const auto real = reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"));
  if (IsOfCppLibrary(__builtin_return_address(0)) && threads_before_refusal-- == 0) return EAGAIN;
  if (HasMost()) return EAGAIN;
  return real(thread, attributes, run, argument);
}

namespace syncbn {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::IsSupersetOf;

MasterServer::Options Stateful() {
  MasterServer::Options options;
  options.addresses = {"127.0.0.1:0"};
  options.state_dir = ::testing::TempDir() + "/state";
  return options;
}

// Starts a master in a process of its own, which may have so many threads. Returns the process's status: 0 if the
// master has started and ended, 1 if it was told that there are no threads.
int StartInChild(int threads) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(300);  // It may hang.
    most_threads = threads;
    auto master = MasterServer::Start(Stateful());
    const absl::Status status = master.status();
    if (master.ok()) master->reset();
    if (absl::IsResourceExhausted(status)) _exit(absl::StrContains(status.message(), "ulimit -u") ? 1 : 2);
    exit(status.ok() ? 0 : 3);
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "ended by signal " << WTERMSIG(status) << ", with " << threads << " threads";
  return WEXITSTATUS(status);
}

// Comes first: children of a process that has used gRPC could not use it.
TEST(RefusedThreadsTest, AProcessOfFewThreadsIsToldOrServes) {
  bool served = false;
  for (int threads = 1; threads < 128 && !served; ++threads) {
    const int result = StartInChild(threads);
    EXPECT_THAT(result, AnyOf(0, 1));
    served = result == 0;
  }
  EXPECT_TRUE(served);
}

TEST(RefusedThreadsTest, AStartWithoutOneFailsAndTheNextSucceeds) {
  ASSERT_TRUE(StartGrpc().ok());  // So that each start tries the same number of threads for it.
  std::vector<std::string> purposes;
  absl::StatusOr<std::unique_ptr<MasterServer>> master = absl::UnknownError("not started");
  for (int refused = 0; !master.ok(); ++refused) {
    threads_before_refusal = refused;
    master = MasterServer::Start(Stateful());
    if (master.ok()) break;
    ASSERT_EQ(master.status().code(), absl::StatusCode::kResourceExhausted) << master.status();
    const std::string message(master.status().message());
    EXPECT_THAT(message, HasSubstr("ulimit -u"));
    if (purposes.empty() || purposes.back() != message) purposes.push_back(message);
  }
  EXPECT_THAT(purposes, IsSupersetOf({HasSubstr("for gRPC:"), HasSubstr("storing the state"),
                                      HasSubstr("serving workers"), HasSubstr("accepting connections")}));
  EXPECT_GT((*master)->port(), 0);
  EXPECT_EQ(threads_before_refusal, 0) << "a master starts threads that this test does not know of";
  threads_before_refusal = -1;
}

}  // namespace
}  // namespace syncbn
