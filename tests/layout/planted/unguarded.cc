#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace syncbn::testing {

class Counter {
 public:
  // Reads without the lock.
  int value() const { return value_; }

 private:
  mutable absl::Mutex mutex_;
  int value_ ABSL_GUARDED_BY(mutex_) = 0;
};

int Read(const Counter& counter) { return counter.value(); }

}  // namespace syncbn::testing
