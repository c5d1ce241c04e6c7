// The answers to requests by their paths, without the sockets.

#ifndef SYNCBN_SERVER_HTTP_ROUTES_H_
#define SYNCBN_SERVER_HTTP_ROUTES_H_

#include "absl/strings/string_view.h"
#include "server/http/answer.h"
#include "server/http/inspection_client.h"
#include "server/http/metrics.h"
#include "server/http/request.h"

namespace syncbn::http {

// Returns whether the path is that of a probe, whose answer depends on nothing but the master's state.
bool IsProbe(absl::string_view path);

// Returns: the answer to a GET of the request's path; 404 for unknown ones.
// Thread safety: any thread may call it.
Answer Route(const Request& request, const InspectionClient& client, const MetricsOptions& metrics);

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_ROUTES_H_
