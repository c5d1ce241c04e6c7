#ifndef SYNCBN_TESTS_LAYOUT_PLANTED_APART_H_
#define SYNCBN_TESTS_LAYOUT_PLANTED_APART_H_

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace syncbn::testing {

class CounterApart {
 public:
  int value() const;

 private:
  mutable absl::Mutex mutex_;
  int value_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_LAYOUT_PLANTED_APART_H_
