// Requests as text, and what their query says.

#include "server/http/request.h"

#include <random>
#include <string>

#include "gtest/gtest.h"
#include "tests/testing/seed.h"

namespace syncbn::http {
namespace {

Request WithTarget(absl::string_view target) {
  Request request;
  request.SetTarget(target);
  return request;
}

TEST(RequestTest, TheTargetIsTakenApart) {
  EXPECT_EQ(WithTarget("/").path, "/");
  EXPECT_EQ(WithTarget("/metrics?").path, "/metrics");
  EXPECT_EQ(WithTarget("/metrics?").query, "");
  EXPECT_EQ(WithTarget("/a?b?c=d").path, "/a");
  EXPECT_EQ(WithTarget("/a?b?c=d").query, "b?c=d");
  EXPECT_EQ(WithTarget("/a?b").host, std::nullopt);
  EXPECT_EQ(WithTarget("*").path, "*");
}

TEST(RequestTest, AWholeAddressNamesTheHost) {
  for (const char* target : {"http://host:1/api?x=y", "HTTP://host:1/api?x=y"}) {
    const Request request = WithTarget(target);
    EXPECT_EQ(request.host, "host:1");
    EXPECT_EQ(request.path, "/api");
    EXPECT_EQ(request.Parameter("x"), "y");
  }
  EXPECT_EQ(WithTarget("http://host").path, "/");
  EXPECT_EQ(WithTarget("http://host?x=y").Parameter("x"), "y");
  EXPECT_EQ(WithTarget("http://").host, "");
}

TEST(RequestTest, ParametersAreDecoded) {
  const Request request = WithTarget("/api/group?job=a+b%2b%zz&job=second&group=%C3%BC&empty=&flag&end=%4");
  EXPECT_EQ(request.Parameter("job"), "a b+%zz");
  EXPECT_EQ(request.Parameter("group"), "\u00fc");
  EXPECT_EQ(request.Parameter("end"), "%4");
  for (const char* name : {"empty", "flag", "absent", "roup", ""}) EXPECT_EQ(request.Parameter(name), "");
}

TEST(RequestTest, AnyTargetIsTakenApart) {
  std::mt19937 random(testing::Seed());
  const std::string whole = "http://localhost:1/api/group?job=%41+b&group=%C3%BC";
  for (int i = 0; i < 20000; ++i) {
    std::string target = whole.substr(0, i % 4 == 0 ? random() % whole.size() : whole.size());
    for (uint32_t changes = random() % 4; changes > 0 && !target.empty(); --changes) {
      target[random() % target.size()] = static_cast<char>(random());
    }
    const Request request = WithTarget(target);
    EXPECT_FALSE(request.path.empty());
    EXPECT_LE(request.Parameter("job").size(), target.size());
  }
}

}  // namespace
}  // namespace syncbn::http
