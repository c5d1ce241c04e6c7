#include "server/http/messages.h"

#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "boost/beast/http/error.hpp"
#include "boost/beast/http/field.hpp"

namespace syncbn::http {
namespace {

using boost::beast::http::error;
using boost::beast::http::field;

Answer Malformed(absl::string_view what) { return {400, kText, absl::StrCat("the request has ", what, "\n")}; }

std::string Text(boost::beast::string_view text) { return {text.data(), text.size()}; }

Answer Refusal(const boost::beast::error_code& code) {
  if (code == error::header_limit || code == error::buffer_overflow) {
    return {431, kText,
            absl::StrCat("a request's first line has at most ", kMaxHeadBytes, " bytes, and its headers too\n")};
  }
  if (code == error::bad_version) return {505, kText, "HTTP/1.1 is served here, in lines that end with CR and LF\n"};
  return Malformed(absl::StrCat("a ", code.message()));
}

}  // namespace

HeadParser::HeadParser() {
  header_limit(kMaxHeadBytes);
  // Nobody reads the body. Beast takes "no limit" for a limit of nothing.
  body_limit(std::numeric_limits<uint64_t>::max());
}

bool IsRefusal(const boost::beast::error_code& code) {
  return code.category() == make_error_code(error::bad_method).category() && code != error::end_of_stream &&
         code != error::partial_message;
}

std::variant<Request, Answer> Understand(const HeadParser& parser, const boost::beast::error_code& code) {
  if (code) return Refusal(code);
  const auto& message = parser.get();
  // A proxy in front of us may have judged by the other one of two.
  for (const field once : {field::host, field::authorization}) {
    if (message.count(once) > 1) return Malformed(absl::StrCat("two headers ", Text(to_string(once))));
  }
  Request request;
  request.method = Text(message.method_string());
  request.authorization = Text(message[field::authorization]);
  const auto host = message.find(field::host);
  if (host != message.end()) {
    request.host = Text(host->value());
    if (request.host->find_first_of(" \t") != std::string::npos) return Malformed("a Host that is no name");
  } else if (message.version() >= 11) {
    return Malformed("no header Host");
  }
  request.SetTarget(Text(message.target()));
  return request;
}

Response ToResponse(Answer answer, bool with_body) {
  Response response(static_cast<boost::beast::http::status>(answer.status), 11);
  response.set(field::date, absl::FormatTime("%a, %d %b %Y %H:%M:%S GMT", absl::Now(), absl::UTCTimeZone()));
  response.keep_alive(false);
  response.set(field::content_type, answer.type);
  response.content_length(answer.body.size());
  response.set(field::cache_control, "no-store");
  response.set("Content-Security-Policy", "default-src 'self'; frame-ancestors 'none'");
  response.set("X-Content-Type-Options", "nosniff");
  // Browsers ask for a name and a password, and scripts of the page send what was given.
  if (answer.status == 401) response.set(field::www_authenticate, "Basic realm=\"syncbn\"");
  if (answer.status == 405) response.set(field::allow, "GET, HEAD");
  if (with_body) response.body() = std::move(answer.body);
  return response;
}

}  // namespace syncbn::http
