// A forked child keeps none of the sockets that its parent gave to GiveUpInForkedChildren, and everything else.

#include "plumbing/fork_sockets.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace syncbn {
namespace {

constexpr int kPatienceMs = 60000;

// Both ends of a connection.
struct Pair {
  Pair() { EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0); }
  ~Pair() {
    close(ends[0]);
    close(ends[1]);
  }
  int ends[2] = {-1, -1};
};

bool IsSocket(int descriptor) {
  struct stat status;
  return fstat(descriptor, &status) == 0 && S_ISSOCK(status.st_mode);
}

// Calls the function in a forked child and returns its result.
bool InChild(const std::function<bool()>& function) {
  const pid_t child = fork();
  if (child == 0) _exit(function() ? 0 : 1);
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// A child that lives until the object ends.
class LastingChild {
 public:
  LastingChild() {
    EXPECT_EQ(pipe2(pipe_, O_CLOEXEC), 0);
    child_ = fork();
    if (child_ != 0) return;
    close(pipe_[1]);
    char byte;
    const ssize_t end = read(pipe_[0], &byte, 1);  // Until the parent closes its end, or dies.
    _exit(end == 0 ? 0 : 1);
  }
  ~LastingChild() {
    close(pipe_[0]);
    close(pipe_[1]);
    waitpid(child_, nullptr, 0);
  }

 private:
  int pipe_[2] = {-1, -1};
  pid_t child_ = -1;
};

// True if the peer of the socket is gone.
bool IsEnded(int descriptor) {
  pollfd wait = {descriptor, POLLIN, 0};
  char byte;
  return poll(&wait, 1, kPatienceMs) == 1 && recv(descriptor, &byte, 1, MSG_DONTWAIT) == 0;
}

TEST(ForkSocketsTest, APeerLearnsOfTheEndThoughAChildLivesOn) {
  Pair pair;
  ASSERT_TRUE(GiveUpInForkedChildren(pair.ends[0]));
  const LastingChild child;
  close(std::exchange(pair.ends[0], -1));
  EXPECT_TRUE(IsEnded(pair.ends[1]));
}

TEST(ForkSocketsTest, OtherSocketsStay) {
  Pair pair;
  ASSERT_TRUE(GiveUpInForkedChildren(pair.ends[0]));
  EXPECT_TRUE(InChild([&] { return !IsSocket(pair.ends[0]) && IsSocket(pair.ends[1]); }));
  EXPECT_TRUE(IsSocket(pair.ends[0])) << "the parent lost its own";
}

TEST(ForkSocketsTest, TheNumberStaysTaken) {
  Pair pair;
  ASSERT_TRUE(GiveUpInForkedChildren(pair.ends[0]));
  EXPECT_TRUE(InChild([&] {
    const int opened = open("/dev/null", O_RDONLY);
    return opened >= 0 && opened != pair.ends[0] && fcntl(pair.ends[0], F_GETFD) == FD_CLOEXEC;
  }));
}

TEST(ForkSocketsTest, WhatTheDescriptorHasBecomeStays) {
  int number = -1;
  {
    Pair pair;
    number = pair.ends[0];
    ASSERT_TRUE(GiveUpInForkedChildren(number));
  }
  Pair later;  // Has the numbers that have become free.
  ASSERT_EQ(later.ends[0], number);
  EXPECT_TRUE(InChild([&] { return IsSocket(later.ends[0]) && IsSocket(later.ends[1]); }));
}

TEST(ForkSocketsTest, AChildsChildHasNothingToGiveUp) {
  Pair pair;
  ASSERT_TRUE(GiveUpInForkedChildren(pair.ends[0]));
  EXPECT_TRUE(InChild([&] {
    Pair own;
    return InChild([&] { return IsSocket(own.ends[0]) && IsSocket(own.ends[1]); });
  }));
}

TEST(ForkSocketsTest, OnlySocketsAreTaken) {
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  EXPECT_FALSE(GiveUpInForkedChildren(ends[0]));
  EXPECT_FALSE(GiveUpInForkedChildren(-1));
  close(ends[0]);
  EXPECT_FALSE(GiveUpInForkedChildren(ends[0]));
  close(ends[1]);
}

TEST(ForkSocketsTest, WithoutADescriptorToSpareTheSocketIsClosed) {
  Pair pair;
  ASSERT_TRUE(GiveUpInForkedChildren(pair.ends[0]));
  EXPECT_TRUE(InChild([&] {
    // The child's own child has none left for /dev/null.
    Pair second;
    if (!GiveUpInForkedChildren(second.ends[0])) return false;
    const rlimit limit = {static_cast<rlim_t>(second.ends[1] + 1), static_cast<rlim_t>(second.ends[1] + 1)};
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0) return false;
    while (open("/dev/null", O_RDONLY) >= 0) {
    }
    return InChild([&] { return !IsSocket(second.ends[0]) && IsSocket(second.ends[1]); });
  }));
}

TEST(ForkSocketsTest, ManySocketsFromManyThreads) {
  constexpr int kThreads = 8;
  constexpr int kPairs = 16;
  std::vector<std::vector<Pair>> pairs;
  for (int t = 0; t < kThreads; ++t) pairs.emplace_back(kPairs);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&pairs, t] {
      for (const Pair& pair : pairs[t]) EXPECT_TRUE(GiveUpInForkedChildren(pair.ends[0]));
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(InChild([&] {
    for (const auto& of_thread : pairs) {
      for (const Pair& pair : of_thread) {
        if (IsSocket(pair.ends[0]) || !IsSocket(pair.ends[1])) return false;
      }
    }
    return true;
  }));
}

}  // namespace
}  // namespace syncbn
