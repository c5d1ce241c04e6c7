// Requests of HTTP/1 as text, without the sockets.

#ifndef SYNCBN_SERVER_HTTP_REQUEST_H_
#define SYNCBN_SERVER_HTTP_REQUEST_H_

#include <cstddef>
#include <optional>
#include <string>
#include <variant>

#include "absl/strings/string_view.h"
#include "server/http/answer.h"

namespace syncbn::http {

// Longest head of a request: its first line and headers.
inline constexpr size_t kMaxHeadBytes = 8192;

// What is needed of a request.
struct Request {
  std::string method;
  std::string path;           // As it was sent: our paths need no escapes.
  std::string query;          // Without the question mark; "" if there is none.
  std::string authorization;  // The header of this name; "" if it is absent.
  // The host that the client wanted to reach, with its port. Absent in HTTP/1.0, which no browser speaks.
  std::optional<std::string> host;

  // Returns the value of a parameter of the query, decoded; "" if it is absent.
  std::string Parameter(absl::string_view name) const;
};

// Returns the length of the head at the beginning of `bytes`, with the empty line that ends it; 0 if it has not come in
// full. `searched` of the bytes are known to have no end of a head.
size_t HeadLength(absl::string_view bytes, size_t searched = 0);

// Parses a head that is complete.
//
// Returns: the request, or the answer that refuses it: 400 for text that is no request, 505 for another version.
// Thread safety: any thread may call it.
std::variant<Request, Answer> ParseRequest(absl::string_view head);

// Returns the bytes of an answer, after which the connection ends. `with_body`: false for a HEAD request.
std::string WriteAnswer(const Answer& answer, bool with_body);

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_REQUEST_H_
