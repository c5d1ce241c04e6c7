// Notices that a master's certificate is about to expire. Connections that are open then go on, so that nothing else
// tells of it until a worker comes back.

#ifndef SYNCBN_SERVER_EXPIRY_NOTICE_H_
#define SYNCBN_SERVER_EXPIRY_NOTICE_H_

#include <optional>
#include <string>

#include "absl/time/time.h"
#include "plumbing/log.h"

namespace syncbn {

// Returns the time as the log shows it: "2030-05-20 12:30 UTC".
std::string ExpiryText(absl::Time expiry);

// Thread safety: one thread at a time.
class ExpiryNotice {
 public:
  struct Line {
    LogLevel level;
    std::string text;
  };

  // Returns what the log is to say at `now` about a certificate that expires at `expiry`: a warning in its last week,
  // and an error once it has expired, each at once and then once a day. Nothing otherwise, and for the infinite future.
  std::optional<Line> Due(absl::Time expiry, absl::Time now);

 private:
  absl::Time told_ = absl::InfinitePast();
  LogLevel level_ = LogLevel::kInfo;  // Of the newest line.
};

}  // namespace syncbn

#endif  // SYNCBN_SERVER_EXPIRY_NOTICE_H_
