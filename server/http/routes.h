// The answers to requests by their paths, without the sockets.

#ifndef SYNCBN_SERVER_HTTP_ROUTES_H_
#define SYNCBN_SERVER_HTTP_ROUTES_H_

#include <cstdint>
#include <functional>
#include <string>

#include "absl/strings/string_view.h"
#include "server/http/inspection_client.h"

namespace syncbn::http {

struct Answer {
  int status = 200;
  std::string type;
  std::string body;
};

// Returns the value of a parameter of the query, decoded; "" if it is absent.
using Query = std::function<std::string(const char* name)>;

// Returns: the answer to a GET of the path; 404 for unknown ones.
// Thread safety: any thread may call it.
Answer Route(absl::string_view path, const Query& query, const InspectionClient& client, uint32_t max_ranks);

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_ROUTES_H_
