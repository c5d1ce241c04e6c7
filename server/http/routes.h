// The answers to requests by their paths, without the sockets.

#ifndef SYNCBN_SERVER_HTTP_ROUTES_H_
#define SYNCBN_SERVER_HTTP_ROUTES_H_

#include <functional>
#include <string>

#include "absl/strings/string_view.h"
#include "server/http/answer.h"
#include "server/http/inspection_client.h"
#include "server/http/metrics.h"

namespace syncbn::http {

// Returns the value of a parameter of the query, decoded; "" if it is absent.
using Query = std::function<std::string(const char* name)>;

// Returns: the answer to a GET of the path; 404 for unknown ones.
// Thread safety: any thread may call it.
Answer Route(absl::string_view path, const Query& query, const InspectionClient& client, const MetricsOptions& metrics);

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_ROUTES_H_
