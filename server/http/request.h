// Requests that are understood, without the sockets.

#ifndef SYNCBN_SERVER_HTTP_REQUEST_H_
#define SYNCBN_SERVER_HTTP_REQUEST_H_

#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace syncbn::http {

// The parts of a request that answers need.
struct Request {
  std::string method;
  std::string path;           // As it was sent: our paths need no escapes.
  std::string query;          // Without the question mark; "" if there is none.
  std::string authorization;  // The header of this name; "" if it is absent.
  // The host that the client wanted to reach, with its port. Absent in HTTP/1.0, which no browser speaks.
  std::optional<std::string> host;

  // Takes the target of a request's first line apart: path and query, and the host if it is a whole address.
  void SetTarget(absl::string_view target);
  // Returns the value of a parameter of the query, decoded; "" if it is absent.
  std::string Parameter(absl::string_view name) const;
};

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_REQUEST_H_
