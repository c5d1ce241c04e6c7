// Heads of requests through a socket: odd ones, and those that no honest client sends.

#include <ostream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/server/http/served_loop.h"

namespace syncbn::http {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

struct Case {
  std::string name;
  std::string sent;
  int status;
  std::string body;  // Or a part of it.
};
void PrintTo(const Case& tried, std::ostream* out) { *out << tried.name; }

class HeadsTest : public ::testing::TestWithParam<Case> {};

TEST_P(HeadsTest, AreAnsweredOnce) {
  ServedLoop loop;
  const std::string answer = Peer(loop, GetParam().sent).ReadAll();
  EXPECT_THAT(answer, StartsWith(absl::StrCat("HTTP/1.1 ", GetParam().status, " ")));
  EXPECT_THAT(answer, HasSubstr(GetParam().body));
  EXPECT_EQ(answer.find("\r\nDate: "), answer.rfind("\r\nDate: ")) << "One answer alone.";
}

// Returns the text with the NULs in it.
template <size_t size>
std::string Bytes(const char (&text)[size]) {
  return std::string(text, size - 1);
}

std::string ManyHeaders() {
  std::string head = "GET /a HTTP/1.1\r\nHost: b\r\n";
  for (int i = 0; i < 3000; ++i) head += "X: y\r\n";
  return head + "\r\n";
}

constexpr char kVersion[] = "HTTP/1.1 is served here";

std::vector<Case> Served() {
  return {
      Case{"Plain", "GET /a HTTP/1.1\r\nHost: b\r\n\r\n", 200, "GET /a b "},
      Case{"Http10", "GET /a HTTP/1.0\r\n\r\n", 200, "GET /a nobody "},
      Case{"Http10WithHost", "GET /a HTTP/1.0\r\nHost: b\r\n\r\n", 200, "GET /a b "},
      Case{"AbsoluteForm", "GET http://c/a HTTP/1.1\r\nHost: b\r\n\r\n", 200, "GET /a c "},
      Case{"NamesInAnyCase", "GET /a HTTP/1.1\r\nhOsT:b\r\naUTHORIZATION:x\r\n\r\n", 200, "GET /a b x"},
      Case{"UnknownMethod", "BREW /a HTTP/1.1\r\nHost: b\r\n\r\n", 200, "BREW /a b "},
      Case{"Star", "OPTIONS * HTTP/1.1\r\nHost: b\r\n\r\n", 200, "OPTIONS * b "},
      Case{"Pipelined", "GET /a HTTP/1.1\r\nHost: b\r\n\r\nGET /c HTTP/1.1\r\nHost: b\r\n\r\n", 200, "GET /a b "},
      Case{"KeepAlive", "GET /a HTTP/1.1\r\nHost: b\r\nConnection: keep-alive\r\n\r\n", 200, "Connection: close"},
      Case{"BodyThatDoesNotCome", "POST /a HTTP/1.1\r\nHost: b\r\nContent-Length: 9\r\n\r\n", 200, "POST /a b "},
      Case{"EndlessBody", "POST /a HTTP/1.1\r\nHost: b\r\nContent-Length: 18446744073709551615\r\n\r\n", 200,
           "POST /a b "},
      Case{"Chunked", "POST /a HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\nx", 200, "POST /a b "},
      Case{"ExpectContinue", "POST /a HTTP/1.1\r\nHost: b\r\nExpect: 100-continue\r\n\r\n", 200, "POST /a b "},
      Case{"Upgrade", "GET /a HTTP/1.1\r\nHost: b\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 200, "GET /a b "},
      // RFC 9112, 5.2: a fold is a space.
      Case{"FoldedAuthorization", "GET /a HTTP/1.1\r\nHost: b\r\nAuthorization: c\r\n d\r\n\r\n", 200, "GET /a b c d"},
      Case{"LongestHead", "GET /a HTTP/1.1\r\nHost: b\r\nX: " + std::string(8100, 'x') + "\r\n\r\n", 200, "GET /a b "}};
}

std::vector<Case> Refused() {
  return {
      Case{"NoHost", "GET /a HTTP/1.1\r\n\r\n", 400, "no header Host"},
      Case{"TwoHosts", "GET /a HTTP/1.1\r\nHost: b\r\nHost: b\r\n\r\n", 400, "two headers Host"},
      Case{"TwoAuthorizations", "GET /a HTTP/1.1\r\nHost: b\r\nAuthorization: x\r\nAuthorization: x\r\n\r\n", 400,
           "two headers Authorization"},
      Case{"FoldedHost", "GET /a HTTP/1.1\r\nHost: b\r\n c\r\n\r\n", 400, "Host that is no name"},
      Case{"FoldBeforeHeaders", "GET /a HTTP/1.1\r\n Host: b\r\n\r\n", 400, "bad field"},
      Case{"NoColon", "GET /a HTTP/1.1\r\nHost: b\r\nNo colon\r\n\r\n", 400, "bad field"},
      Case{"SpaceBeforeColon", "GET /a HTTP/1.1\r\nHost : b\r\n\r\n", 400, "bad field"},
      Case{"NulInTarget", Bytes("GET /\0 HTTP/1.1\r\nHost: b\r\n\r\n"), 400, "bad target"},
      Case{"NulInName", Bytes("GET /a HTTP/1.1\r\nX\0: b\r\n\r\n"), 400, "bad field"},
      Case{"NulInValue", Bytes("GET /a HTTP/1.1\r\nX: \0\r\n\r\n"), 400, "bad value"},
      Case{"LoneCr", "GET /a HTTP/1.1\r\nHost: b\rX: y\r\n\r\n", 400, "bad"},
      Case{"LineFeedAloneInHeaders", "GET /a HTTP/1.1\r\nHost: b\nX: y\n\r\n", 400, "bad"},
      Case{"LineFeedsAlone", "GET /a HTTP/1.1\nHost: b\n\n", 505, "lines that end with CR and LF"},
      Case{"TwoSpaces", "GET  /a HTTP/1.1\r\nHost: b\r\n\r\n", 400, "bad target"},
      Case{"SpaceInTarget", "GET /a b HTTP/1.1\r\nHost: b\r\n\r\n", 505, kVersion},
      Case{"Http09", "GET /a\r\n\r\n", 400, "bad target"},
      Case{"Http11WithSpace", "GET /a HTTP/1.1 \r\nHost: b\r\n\r\n", 505, kVersion},
      Case{"Http12", "GET /a HTTP/1.2\r\nHost: b\r\n\r\n", 505, kVersion},
      Case{"Http2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, kVersion},
      Case{"Http3", "GET /a HTTP/3\r\nHost: b\r\n\r\n", 505, kVersion},
      Case{"Tls", "\x16\x03\x01\x02\x01\x01\x01\xfc\x03\x03\r\n\r\n", 400, "bad method"},
      Case{"LengthAndChunks", "POST /a HTTP/1.1\r\nHost: b\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
           400, "bad Transfer-Encoding"},
      Case{"ChunksAndLength", "POST /a HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
           400, "bad Content-Length"},
      Case{"TwoLengths", "POST /a HTTP/1.1\r\nHost: b\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400,
           "bad Content-Length"},
      Case{"NoLength", "POST /a HTTP/1.1\r\nHost: b\r\nContent-Length: -1\r\n\r\n", 400, "bad Content-Length"},
      Case{"LongTarget", "GET /" + std::string(9000, 'x') + " HTTP/1.1\r\nHost: b\r\n\r\n", 431, "8192 bytes"},
      Case{"LongValue", "GET /a HTTP/1.1\r\nHost: b\r\nX: " + std::string(1 << 20, 'x'), 431, "8192 bytes"},
      Case{"ManyHeaders", ManyHeaders(), 431, "8192 bytes"},
      Case{"Noise", std::string(20000, '\xff'), 400, "bad method"}};
}

std::string NameOf(const ::testing::TestParamInfo<Case>& info) { return info.param.name; }

INSTANTIATE_TEST_SUITE_P(Served, HeadsTest, ::testing::ValuesIn(Served()), NameOf);
INSTANTIATE_TEST_SUITE_P(Refused, HeadsTest, ::testing::ValuesIn(Refused()), NameOf);

}  // namespace
}  // namespace syncbn::http
