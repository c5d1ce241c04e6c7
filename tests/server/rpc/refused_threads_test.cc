// A system that grants a master no further thread: the start fails with a sentence, and nothing else ends.

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <string>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/master_server.h"

namespace {

// Counts down the threads of the C++ library, which ours are; gRPC's are made by pthread_create itself. The one at 0 is
// refused.
std::atomic<int> threads_before_refusal = -1;

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
  return real(thread, attributes, run, argument);
}

namespace syncbn {
namespace {

using ::testing::HasSubstr;

MasterServer::Options Stateful() {
  MasterServer::Options options;
  options.addresses = {"127.0.0.1:0"};
  options.state_dir = ::testing::TempDir() + "/state";
  return options;
}

TEST(RefusedThreadsTest, AStartWithoutOneFailsAndTheNextSucceeds) {
  int refused = 0;
  for (const char* purpose : {"storing the state", "serving workers", "accepting connections"}) {
    threads_before_refusal = refused++;
    const auto master = MasterServer::Start(Stateful());
    EXPECT_EQ(master.status().code(), absl::StatusCode::kResourceExhausted) << purpose;
    EXPECT_THAT(std::string(master.status().message()), HasSubstr(purpose));
    EXPECT_THAT(std::string(master.status().message()), HasSubstr("ulimit -u"));
  }
  threads_before_refusal = refused;
  const auto master = MasterServer::Start(Stateful());
  ASSERT_TRUE(master.ok()) << master.status();
  EXPECT_GT((*master)->port(), 0);
  EXPECT_EQ(threads_before_refusal, 0) << "a master starts threads that this test does not know of";
  threads_before_refusal = -1;
}

}  // namespace
}  // namespace syncbn
