// Requests and answers as Beast's messages, without the sockets.

#ifndef SYNCBN_SERVER_HTTP_MESSAGES_H_
#define SYNCBN_SERVER_HTTP_MESSAGES_H_

#include <cstddef>
#include <variant>

#include "boost/beast/core/error.hpp"
#include "boost/beast/http/empty_body.hpp"
#include "boost/beast/http/message.hpp"
#include "boost/beast/http/parser.hpp"
#include "boost/beast/http/string_body.hpp"
#include "server/http/answer.h"
#include "server/http/request.h"

namespace syncbn::http {

// Longest first line of a request, and longest headers together.
inline constexpr size_t kMaxHeadBytes = 8192;

// Parses the head of a request, whose body is left alone.
class HeadParser : public boost::beast::http::request_parser<boost::beast::http::empty_body> {
 public:
  HeadParser();
};

using Response = boost::beast::http::response<boost::beast::http::string_body>;

// Returns whether an error of reading is about what the peer has sent, and not about the connection.
bool IsRefusal(const boost::beast::error_code& error);

// Takes a head that the parser has read, or has stopped at with an error of which IsRefusal holds.
//
// Returns: the request, or the answer that refuses it: 400 for text that is no request, 431 for one that is too long,
// 505 for another version.
std::variant<Request, Answer> Understand(const HeadParser& parser, const boost::beast::error_code& error);

// Returns the message of an answer, after which the connection ends. `with_body`: false for a HEAD request, which is
// told the length of the body alone.
Response ToResponse(Answer answer, bool with_body);

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_MESSAGES_H_
