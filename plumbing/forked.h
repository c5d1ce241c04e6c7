// Refuses calls in a process that was forked from one with open workers or masters.
//
// A forked child does not have gRPC's threads, but it has their locks and queues, and shares kernel objects with its
// parent. A child that used gRPC would hang, and could take events away from the parent.

#ifndef SYNCBN_PLUMBING_FORKED_H_
#define SYNCBN_PLUMBING_FORKED_H_

#include <cstdint>

#include "absl/status/status.h"

namespace syncbn {

// Returns OK if this process may use gRPC.
//
// Errors: FAILED_PRECONDITION (FORKED) in a process that was forked, directly or indirectly, while an OpenHere existed
// ("this process was forked from one that has an open worker/master; start it with spawn or forkserver") or after one
// had existed, since gRPC keeps threads and locks as long as a process lives.
absl::Status CheckNotForked();

// Returns the error for a handle that another process has made.
absl::Status ForkedError();

// Marks an open worker or master: exists from before it opens until after it has closed.
//
// Thread safety: any thread may call any method.
class OpenHere {
 public:
  OpenHere();
  ~OpenHere();
  OpenHere(const OpenHere&) = delete;
  OpenHere& operator=(const OpenHere&) = delete;

  // Returns whether this process is a forked child of the one that made the object. Its owner must not be touched then,
  // not even its locks: another thread may have held them at the fork.
  bool forked() const;

 private:
  const uint64_t forks_;
};

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_FORKED_H_
