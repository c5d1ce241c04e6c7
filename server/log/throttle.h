// A limit on the rate of log lines that peers can cause.

#ifndef SYNCBN_SERVER_LOG_THROTTLE_H_
#define SYNCBN_SERVER_LOG_THROTTLE_H_

#include <cstdint>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "plumbing/log.h"

namespace syncbn {

// Logs the first lines of each reason, then one every ten seconds, with the number of lines that were left out.
//
// Thread safety: none.
class Throttle {
 public:
  // The lines of a reason that strangers can cause: a few at once.
  static constexpr int kBurst = 5;
  // The lines of a reason of which a group has one for each worker.
  static constexpr int kLongBurst = 256;

  // Lines are counted by `reason`, which must be one of a bounded set. `now` must not go backwards.
  void Log(LogLevel level, absl::string_view reason, absl::Time now, absl::string_view line,
           absl::Span<const LogField> fields = {}, int burst = kBurst);

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
