// Connections that come in pieces, end at any time, or are too many.

#include "server/http/request_loop.h"

#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/server/http/served_loop.h"

namespace syncbn::http {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::SizeIs;

// More than are open at a time.
constexpr int kMany = 300;
constexpr char kNow[] = "GET /a HTTP/1.1\r\nHost: b\r\n\r\n";
constexpr char kLater[] = "GET /later HTTP/1.1\r\nHost: b\r\n\r\n";

TEST(RequestLoopTest, AHeadMayComeByteByByte) {
  ServedLoop loop;
  Peer peer(loop, "");
  for (const char byte : std::string(kNow)) peer.Send(std::string(1, byte));
  EXPECT_THAT(peer.ReadAll(), HasSubstr("GET /a b "));
}

TEST(RequestLoopTest, APeerThatSendsNoMoreGetsItsAnswer) {
  ServedLoop loop;
  Peer peer(loop, kLater);
  peer.EndSending();
  loop.Respond(loop.TakeLater(), "late\n");
  EXPECT_THAT(peer.ReadAll(), EndsWith("\r\n\r\nlate\n"));
}

TEST(RequestLoopTest, APeerThatEndsWithinAHeadGetsNoAnswer) {
  ServedLoop loop;
  for (const char* sent : {"", "GET", "GET /a HTTP/1.1\r\nHost: b\r\n"}) {
    Peer peer(loop, sent);
    peer.EndSending();
    EXPECT_EQ(peer.ReadAll(), "") << sent;
  }
}

TEST(RequestLoopTest, AHeadRequestGetsNoBodyEvenIfItIsRefused) {
  ServedLoop loop;
  for (const char* sent :
       {"HEAD /a HTTP/1.1\r\nHost: b\r\n\r\n", "HEAD /a HTTP/1.1\r\n\r\n", "HEAD /a HTTP/1.1\r\nNo colon\r\n\r\n"}) {
    EXPECT_THAT(Peer(loop, sent).ReadAll(), EndsWith("\r\n\r\n")) << sent;
  }
}

TEST(RequestLoopTest, AnswersToNobodyAreDropped) {
  ServedLoop loop;
  Peer gone(loop, kLater);
  const uint64_t id = loop.TakeLater();
  gone.Reset();
  for (int i = 0; i < 3; ++i) loop.Respond(id, std::string(1 << 20, 'x'));
  loop.Respond(id + 1000, "nobody's\n");
  EXPECT_THAT(Peer(loop, kNow).ReadAll(), HasSubstr("GET /a b "));
}

TEST(RequestLoopTest, TheOldestOfTooManyUnreadBytesIsDropped) {
  ServedLoop loop;
  const std::string body(40 << 20, 'x');
  Peer first(loop, kLater);
  const uint64_t first_id = loop.TakeLater();
  Peer second(loop, kLater);
  const uint64_t second_id = loop.TakeLater();
  loop.Respond(first_id, body);
  loop.Respond(second_id, body);
  EXPECT_THAT(second.ReadAll(), SizeIs(::testing::Gt(body.size())));
  EXPECT_THAT(first.ReadAll(), SizeIs(::testing::Lt(body.size())));
}

// Younger connections are dropped before it.
TEST(RequestLoopTest, APreciousRequestKeepsItsPlace) {
  ServedLoop loop;
  Peer served(loop, "GET /later?precious HTTP/1.1\r\nHost: b\r\n\r\n");
  const uint64_t id = loop.TakeLater();
  std::vector<std::unique_ptr<Peer>> slow;
  for (int i = 0; i < kMany; ++i) slow.push_back(std::make_unique<Peer>(loop, "GET /"));
  EXPECT_EQ(slow.front()->ReadAll(), "");
  loop.Respond(id, "late\n");
  EXPECT_THAT(served.ReadAll(), EndsWith("late\n"));
  EXPECT_EQ(loop.forgotten(), 0);
}

TEST(RequestLoopTest, TheOldestOfTooManyRequestsIsForgotten) {
  ServedLoop loop;
  std::vector<std::unique_ptr<Peer>> served;
  for (int i = 0; i < kMany; ++i) {
    served.push_back(std::make_unique<Peer>(loop, kLater));
    loop.TakeLater();
  }
  EXPECT_EQ(served.front()->ReadAll(), "");
  EXPECT_GT(loop.forgotten(), 0);
}

TEST(RequestLoopTest, ItEndsInTheMidstOfRequests) {
  for (int i = 0; i < 20; ++i) {
    auto loop = std::make_unique<ServedLoop>();
    Peer unfinished(*loop, "GET /a"), drained(*loop, kNow), unread(*loop, kLater);
    loop->Respond(loop->TakeLater(), std::string(16 << 20, 'x'));
    Peer served(*loop, kLater);
    loop.reset();
    EXPECT_EQ(unfinished.ReadAll(), "");
  }
}

}  // namespace
}  // namespace syncbn::http
