// The details of a failed round or call beyond its code and message.

#ifndef SYNCBN_CLIENT_CC_ERRORS_H_
#define SYNCBN_CLIENT_CC_ERRORS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace syncbn {

// The google.rpc.ErrorInfo that an absl::Status carries.
struct ErrorDetails {
  // One of those that proto/syncbn/v1/statistics.proto lists, or the client's own: LEFT, CLOSED, FORKED,
  // INTERRUPTED, UNREACHABLE.
  std::string reason;
  std::string layer;
  std::vector<uint32_t> ranks;  // To blame, ascending.
  std::string limit{};          // The name of the master's limit that was exceeded (PROTOCOL.md, section 13).
  // The sequence at which the master has all contributors begin their next rounds (PROTOCOL.md, section 4).
  std::optional<uint64_t> resume_at{};
};

// Returns the details of a status that this library returned; empty ones for others.
ErrorDetails DetailsOf(const absl::Status& status);

absl::Status MakeStatus(absl::StatusCode code, absl::string_view message, const ErrorDetails& details);

// The answers of a worker that has left or was closed, and of a wait that was interrupted.
absl::Status LeftError();
absl::Status ClosedError();
absl::Status InterruptedError();

// Returns the status as a serialized google.rpc.Status, with its details.
std::string ToSerializedStatus(const absl::Status& status);

// Returns the status that a master has sent, as a serialized google.rpc.Status. *Errors*: INTERNAL if it is none.
absl::Status FromSerializedStatus(absl::string_view serialized_google_rpc_status);

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_ERRORS_H_
