// Metrics of the process, as Prometheus's client libraries have them.

#ifndef SYNCBN_SERVER_HTTP_PROCESS_METRICS_H_
#define SYNCBN_SERVER_HTTP_PROCESS_METRICS_H_

#include <vector>

namespace syncbn::http {

struct ProcessMetric {
  const char* name = "";
  const char* help = "";
  bool counter = false;
  double value = 0.0;
};

// Returns: the metrics of this process, by the names that Prometheus's own libraries give them. What /proc does not
// tell is left out.
// Thread safety: any thread may call it.
std::vector<ProcessMetric> ReadProcessMetrics();

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_PROCESS_METRICS_H_
