// Requests of HTTP as text: whole, in pieces, and of any bytes.

#include "server/http/request.h"

#include <random>
#include <string>
#include <variant>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/seed.h"

namespace syncbn::http {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

TEST(HeadLengthTest, TheEndIsFoundWhereverAPieceEnds) {
  for (const std::string head :
       {"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET / HTTP/1.1\nHost: a\n\n", "\r\n\r\n", "\n\n"}) {
    const std::string bytes = head + "GET / HTTP/1.1\r\n\r\n";
    for (size_t first = 0; first < head.size(); ++first) {
      ASSERT_EQ(HeadLength(bytes.substr(0, first)), 0u) << first;
      for (size_t second = head.size(); second <= bytes.size(); ++second) {
        EXPECT_EQ(HeadLength(bytes.substr(0, second), first), head.size()) << first << ", " << second;
      }
    }
  }
}

TEST(ParseRequestTest, TheTargetIsTakenApart) {
  const auto parsed = ParseRequest(
      "HEAD http://host:1/api/group?job=a+b%2b%zz&job=second&group=%C3%BC&empty=&flag HTTP/1.1\r\n"
      "Host: other\r\nAuthorization:  Bearer x \r\n\r\n");
  const Request* const request = std::get_if<Request>(&parsed);
  ASSERT_NE(request, nullptr);
  EXPECT_EQ(request->method, "HEAD");
  EXPECT_EQ(request->path, "/api/group");
  EXPECT_EQ(request->host, "host:1");
  EXPECT_EQ(request->authorization, "Bearer x");
  EXPECT_EQ(request->Parameter("job"), "a b+%zz");
  EXPECT_EQ(request->Parameter("group"), "\u00fc");
  for (const char* name : {"empty", "flag", "absent", "roup"}) EXPECT_EQ(request->Parameter(name), "");
}

TEST(ParseRequestTest, AnyBytesGiveARequestOrARefusal) {
  std::mt19937 random(testing::Seed());
  const std::string whole = "GET /api/group?job=%41+b HTTP/1.1\r\nHost: localhost\r\nAuthorization: Basic eDp5\r\n\r\n";
  for (int i = 0; i < 20000; ++i) {
    std::string head = whole.substr(0, i % 4 == 0 ? random() % whole.size() : whole.size());
    for (uint32_t changes = random() % 4; changes > 0 && !head.empty(); --changes) {
      head[random() % head.size()] = static_cast<char>(random());
    }
    const auto parsed = ParseRequest(head);
    if (const Request* const request = std::get_if<Request>(&parsed)) {
      EXPECT_LE(request->Parameter("job").size(), head.size());
      EXPECT_FALSE(request->method.empty() || request->path.empty());
    } else {
      EXPECT_THAT(std::get<Answer>(parsed).status, ::testing::AnyOf(400, 505));
    }
  }
}

TEST(WriteAnswerTest, AHeadRequestIsToldTheLengthAlone) {
  const Answer answer = {404, kText, "none\n"};
  EXPECT_THAT(WriteAnswer(answer, true), StartsWith("HTTP/1.1 404 Not Found\r\n"));
  EXPECT_THAT(WriteAnswer(answer, true), HasSubstr("\r\nContent-Length: 5\r\n"));
  EXPECT_THAT(WriteAnswer(answer, true), ::testing::EndsWith("\r\n\r\nnone\n"));
  EXPECT_THAT(WriteAnswer(answer, false), HasSubstr("\r\nContent-Length: 5\r\n"));
  EXPECT_THAT(WriteAnswer(answer, false), ::testing::EndsWith("\r\n\r\n"));
  EXPECT_THAT(WriteAnswer(answer, false), Not(HasSubstr("WWW-Authenticate")));
  EXPECT_THAT(WriteAnswer({401, kText, ""}, false), HasSubstr("\r\nWWW-Authenticate: Basic realm=\"syncbn\"\r\n"));
}

}  // namespace
}  // namespace syncbn::http
