// A master's state as text for a terminal.

#ifndef SYNCBN_SERVER_HTTP_STATUS_TEXT_H_
#define SYNCBN_SERVER_HTTP_STATUS_TEXT_H_

#include <string>

#include "absl/status/statusor.h"
#include "server/http/inspection_client.h"

namespace syncbn::http {

// Returns: the process, then each group: its members with their lateness, the oldest rounds in flight, and what failed
// last.
// Errors: as InspectionClient.
absl::StatusOr<std::string> StatusText(const InspectionClient& client);

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_STATUS_TEXT_H_
