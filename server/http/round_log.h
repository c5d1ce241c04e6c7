// The rounds that a master remembers, as lines of its log.

#ifndef SYNCBN_SERVER_HTTP_ROUND_LOG_H_
#define SYNCBN_SERVER_HTTP_ROUND_LOG_H_

#include "absl/status/status.h"
#include "server/http/inspection_client.h"

namespace syncbn::http {

// Logs one line for each remembered round of each group, oldest first: its outcome, its duration, and how long after
// the first each rank contributed.
//
// Errors: as InspectionClient.
absl::Status LogRounds(const InspectionClient& client);

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_ROUND_LOG_H_
