#include "plumbing/forked.h"

#include <pthread.h>

#include <atomic>
#include <cstdint>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "google/rpc/error_details.pb.h"

namespace syncbn {
namespace {

std::atomic<int> g_open{0};
std::atomic<bool> g_used{false};  // One has been open, in this process or an ancestor.

enum class Origin { kOwn, kOpen, kClosed };
std::atomic<Origin> g_origin{Origin::kOwn};
std::atomic<uint64_t> g_forks{0};  // From the first process to this one. A process id would cost a system call.

void OnChild() {
  ++g_forks;
  const bool open = g_open.exchange(0) > 0;
  if (g_origin == Origin::kOwn && g_used) g_origin = open ? Origin::kOpen : Origin::kClosed;
}

uint64_t Forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, OnChild);
  (void)registered;
  return g_forks.load(std::memory_order_relaxed);
}

absl::Status Error(const char* parent) {
  google::rpc::ErrorInfo info;
  info.set_reason("FORKED");
  info.set_domain("syncbn");
  absl::Status status = absl::FailedPreconditionError(
      absl::StrCat("this process was forked from one that ", parent, "; start it with spawn or forkserver"));
  status.SetPayload("type.googleapis.com/google.rpc.ErrorInfo", absl::Cord(info.SerializeAsString()));
  return status;
}

}  // namespace

absl::Status ForkedError() { return Error("has an open worker/master"); }

absl::Status CheckNotForked() {
  switch (g_origin.load()) {
    case Origin::kOwn:
      return absl::OkStatus();
    case Origin::kOpen:
      return ForkedError();
    case Origin::kClosed:
      return Error("has had an open worker/master, of which gRPC keeps threads");
  }
  return absl::OkStatus();
}

OpenHere::OpenHere() : forks_(Forks()) {
  g_used = true;
  ++g_open;
}

OpenHere::~OpenHere() {
  if (!forked()) --g_open;
}

bool OpenHere::forked() const { return g_forks.load(std::memory_order_relaxed) != forks_; }

}  // namespace syncbn
