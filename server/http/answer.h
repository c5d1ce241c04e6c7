// The answer to a request, without the sockets.

#ifndef SYNCBN_SERVER_HTTP_ANSWER_H_
#define SYNCBN_SERVER_HTTP_ANSWER_H_

#include <string>

namespace syncbn::http {

inline constexpr char kText[] = "text/plain; charset=utf-8";

struct Answer {
  int status = 200;
  std::string type;
  std::string body;
};

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_ANSWER_H_
