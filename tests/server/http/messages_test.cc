// Beast's messages, to and from ours.

#include "server/http/messages.h"

#include <random>
#include <sstream>
#include <string>
#include <variant>

#include "boost/asio/buffer.hpp"
#include "boost/beast/http/error.hpp"
#include "boost/beast/http/write.hpp"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/seed.h"

namespace syncbn::http {
namespace {

using ::testing::AnyOf;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

// Returns what a head is understood as. One that is not complete is refused as one that is too long.
std::variant<Request, Answer> Parse(const std::string& head) {
  HeadParser parser;
  boost::beast::error_code error;
  size_t used = 0;
  while (!error && !parser.is_header_done()) {
    used += parser.put(boost::asio::buffer(head.data() + used, head.size() - used), error);
  }
  if (error == boost::beast::http::error::need_more) error = boost::beast::http::error::header_limit;
  EXPECT_TRUE(!error || IsRefusal(error)) << error.message();
  return Understand(parser, error);
}

std::string Written(const Answer& answer, bool with_body) {
  std::ostringstream text;
  Response response = ToResponse(answer, with_body);
  text << response;
  return text.str();
}

TEST(UnderstandTest, TheRequestHasWhatIsNeededOfIt) {
  const auto parsed = Parse(
      "HEAD http://host:1/api/group?job=a HTTP/1.1\r\n"
      "Host: other\r\nX: y\r\nAuthorization:  Bearer x \r\n\r\n");
  const Request* const request = std::get_if<Request>(&parsed);
  ASSERT_NE(request, nullptr);
  EXPECT_EQ(request->method, "HEAD");
  EXPECT_EQ(request->path, "/api/group");
  EXPECT_EQ(request->query, "job=a");
  EXPECT_EQ(request->host, "host:1");
  EXPECT_EQ(request->authorization, "Bearer x");
}

TEST(UnderstandTest, OnlyHttp10MayLackAHost) {
  const auto old = Parse("GET / HTTP/1.0\r\n\r\n");
  ASSERT_TRUE(std::holds_alternative<Request>(old));
  EXPECT_EQ(std::get<Request>(old).host, std::nullopt);
  const auto refused = Parse("GET / HTTP/1.1\r\n\r\n");
  ASSERT_TRUE(std::holds_alternative<Answer>(refused));
  EXPECT_EQ(std::get<Answer>(refused).body, "the request has no header Host\n");
}

TEST(UnderstandTest, AnyBytesGiveARequestOrARefusal) {
  std::mt19937 random(testing::Seed());
  const std::string whole = "GET /api/group?job=%41+b HTTP/1.1\r\nHost: localhost\r\nAuthorization: Basic eDp5\r\n\r\n";
  int requests = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string head = whole.substr(0, i % 4 == 0 ? random() % whole.size() : whole.size());
    for (uint32_t changes = random() % 4; changes > 0 && !head.empty(); --changes) {
      head[random() % head.size()] = static_cast<char>(random());
    }
    const auto parsed = Parse(head);
    if (const Request* const request = std::get_if<Request>(&parsed)) {
      ++requests;
      EXPECT_FALSE(request->method.empty() || request->path.empty());
    } else {
      EXPECT_THAT(std::get<Answer>(parsed).status, AnyOf(400, 431, 505));
    }
  }
  EXPECT_GT(requests, 1000);
}

TEST(ToResponseTest, AHeadRequestIsToldTheLengthAlone) {
  const Answer answer = {404, kText, "none\n"};
  EXPECT_THAT(Written(answer, true), StartsWith("HTTP/1.1 404 Not Found\r\n"));
  EXPECT_THAT(Written(answer, true), HasSubstr("\r\nContent-Length: 5\r\n"));
  EXPECT_THAT(Written(answer, true), HasSubstr("\r\nConnection: close\r\n"));
  EXPECT_THAT(Written(answer, true), EndsWith("\r\n\r\nnone\n"));
  EXPECT_THAT(Written(answer, false), HasSubstr("\r\nContent-Length: 5\r\n"));
  EXPECT_THAT(Written(answer, false), EndsWith("\r\n\r\n"));
}

TEST(ToResponseTest, RefusalsTellWhatWouldBeServed) {
  EXPECT_THAT(Written({401, kText, ""}, false), HasSubstr("\r\nWWW-Authenticate: Basic realm=\"syncbn\"\r\n"));
  EXPECT_THAT(Written({405, kText, ""}, false), HasSubstr("\r\nAllow: GET, HEAD\r\n"));
  EXPECT_THAT(Written({421, kText, ""}, false), StartsWith("HTTP/1.1 421 Misdirected Request\r\n"));
  EXPECT_THAT(Written({404, kText, ""}, false), Not(AnyOf(HasSubstr("WWW-Authenticate"), HasSubstr("Allow"))));
}

}  // namespace
}  // namespace syncbn::http
