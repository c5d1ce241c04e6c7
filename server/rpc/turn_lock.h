// The lock under which the threads of a master take turns.

#ifndef SYNCBN_SERVER_RPC_TURN_LOCK_H_
#define SYNCBN_SERVER_RPC_TURN_LOCK_H_

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace syncbn::rpc {

// A mutex that the thread which waits for it gets next. A plain one goes to a thread that is awake: one that takes turn
// after turn would have it for as long as it has work, while the other is being woken in vain.
//
// Thread safety: any thread. For two threads; with more, the order among those that wait is that of a plain mutex.
class ABSL_LOCKABLE TurnLock {
 public:
  void Lock() ABSL_EXCLUSIVE_LOCK_FUNCTION() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    const absl::MutexLock next(&next_);
    turn_.Lock();
  }
  void Unlock() ABSL_UNLOCK_FUNCTION() ABSL_NO_THREAD_SAFETY_ANALYSIS { turn_.Unlock(); }

 private:
  absl::Mutex next_;  // Held by whoever has the next turn, until it has begun.
  absl::Mutex turn_;
};

// Holds the lock while it lives.
class ABSL_SCOPED_LOCKABLE Turn {
 public:
  explicit Turn(TurnLock* lock) ABSL_EXCLUSIVE_LOCK_FUNCTION(lock) : lock_(lock) { lock_->Lock(); }
  ~Turn() ABSL_UNLOCK_FUNCTION() { lock_->Unlock(); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  TurnLock* const lock_;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_TURN_LOCK_H_
