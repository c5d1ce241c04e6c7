// A log that others make grow must not grow as fast as they like.

#ifndef SYNCBN_SERVER_LOG_THROTTLE_H_
#define SYNCBN_SERVER_LOG_THROTTLE_H_

#include <cstdint>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "plumbing/log.h"

namespace syncbn {

// Lets the first few lines of each reason through, then one every ten seconds, which says how many it stands for.
// Not thread-safe.
class Throttle {
 public:
  // `reason`: from a bounded set; it is what lines are counted by. `now`: of a clock that only goes forward.
  void Log(LogLevel level, absl::string_view reason, absl::Time now, absl::string_view line);

 private:
  struct Bucket {
    int lines = 0;  // Let through since `since`.
    absl::Time since;
    uint64_t held_back = 0;
  };

  absl::flat_hash_map<std::string, Bucket> buckets_;
};

}  // namespace syncbn

#endif  // SYNCBN_SERVER_LOG_THROTTLE_H_
