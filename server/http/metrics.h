// A master's state as Prometheus reads it.

#ifndef SYNCBN_SERVER_HTTP_METRICS_H_
#define SYNCBN_SERVER_HTTP_METRICS_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "server/http/inspection_client.h"

namespace syncbn::http {

struct MetricsOptions {
  // Groups of more workers have no series by rank.
  uint32_t max_ranks = 256;
};

// Returns: the metrics in Prometheus's text format (0.0.4). The series of a group vanish with it.
// Errors: as InspectionClient.
absl::StatusOr<std::string> MetricsText(const InspectionClient& client, const MetricsOptions& options);

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_METRICS_H_
