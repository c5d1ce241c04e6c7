// Refuses calls in a process that was forked from one with open workers or masters.
//
// gRPC's threads are not in a forked child, but their locks, queues and the kernel's objects that they share with the
// parent are. A child that used gRPC would wait for ever, and could take the parent's events away from it.

#ifndef SYNCBN_PLUMBING_FORKED_H_
#define SYNCBN_PLUMBING_FORKED_H_

#include <cstdint>

#include "absl/status/status.h"

namespace syncbn {

// OK; or FAILED_PRECONDITION with the reason FORKED in a process that was forked, directly or further up, while an
// OpenHere lived ("this process was forked from one that has an open worker/master; start it with spawn or
// forkserver"), or after one had lived: gRPC keeps threads and locks for as long as a process lives.
absl::Status CheckNotForked();

// The error for a handle that another process has made.
absl::Status ForkedError();

// Lives as long as an open worker or master, the time in which it opens and closes included.
// Thread safety: any thread.
class OpenHere {
 public:
  OpenHere();
  ~OpenHere();
  OpenHere(const OpenHere&) = delete;
  OpenHere& operator=(const OpenHere&) = delete;

  // Returns whether this is another process than the one that made it, forked from it by fork(). Nothing of what it
  // belongs to may be touched then, its locks included: another thread may have held them when the process was forked.
  bool forked() const;

 private:
  const uint64_t forks_;
};

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_FORKED_H_
