// The jobs and ranks that certificates stand for.

#include "server/rpc/identity.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/error.h"

namespace syncbn::rpc {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

core::Join JoinOf(const std::string& job, const std::string& group, core::Rank rank) {
  core::Join join;
  join.id = {job, group};
  join.rank = rank;
  return join;
}

struct Case {
  std::string identity;
  std::string job, group;
  core::Rank rank;
  PeerNames names;
  bool admitted;
};

std::vector<Case> Cases() {
  const std::string spiffe = "URI:spiffe://example.org/job/{job}/rank/{rank}";
  const std::string host = "DNS:rank-{rank}.{job}.example.org";
  return {
      {spiffe, "a", "g", 3, {{}, {"spiffe://example.org/job/a/rank/3"}}, true},
      {spiffe, "a", "g", 3, {{}, {"urn:x", "spiffe://example.org/job/a/rank/3"}}, true},
      {spiffe, "a", "g", 3, {{}, {"spiffe://example.org/job/a/rank/30"}}, false},
      {spiffe, "a", "g", 30, {{}, {"spiffe://example.org/job/a/rank/3"}}, false},
      {spiffe, "b", "g", 3, {{}, {"spiffe://example.org/job/a/rank/3"}}, false},
      {spiffe, "A", "g", 3, {{}, {"spiffe://example.org/job/a/rank/3"}}, false},
      {spiffe, "a", "g", 3, {{"spiffe://example.org/job/a/rank/3"}, {}}, false},  // A DNS name is no URI.
      {spiffe, "a", "g", 3, {}, false},
      // A job's name cannot imitate the rest of the name.
      {spiffe, "a/rank/3", "g", 4, {{}, {"spiffe://example.org/job/a/rank/3/rank/4"}}, false},
      {spiffe, "a/rank/3", "g", 4, {{}, {"spiffe://example.org/job/a%2Frank%2F3/rank/4"}}, true},
      {spiffe, "host:29500", "g", 0, {{}, {"spiffe://example.org/job/host%3A29500/rank/0"}}, true},
      {spiffe, "50%25", "g", 0, {{}, {"spiffe://example.org/job/50%2525/rank/0"}}, true},
      {"URI:urn:job:{job}:{group}", "a", "g", 7, {{}, {"urn:job:a:g"}}, true},
      {"URI:urn:job:{job}:{group}", "a:g", "", 7, {{}, {"urn:job:a:g:"}}, false},
      {host, "a", "g", 3, {{"rank-3.a.example.org"}, {}}, true},
      {host, "a", "g", 3, {{"RANK-3.A.Example.org"}, {}}, true},
      {host, "A", "g", 3, {{"rank-3.a.example.org"}, {}}, true},
      {host, "a", "g", 3, {{"rank-3.b.example.org"}, {}}, false},
      {host, "a.b", "g", 3, {{"rank-3.a.b.example.org"}, {}}, false},  // Not one label.
      {host, "", "g", 3, {{"rank-3..example.org"}, {}}, false},
      {host, "a", "g", 3, {{}, {"rank-3.a.example.org"}}, false},
      {"DNS:trainers.example.org", "any", "g", 9, {{"trainers.example.org"}, {}}, true},
      {"DNS:trainers.example.org", "any", "g", 9, {{"other.example.org"}, {}}, false},
  };
}

TEST(IdentityTest, Cases) {
  for (const Case& one : Cases()) {
    SCOPED_TRACE(::testing::Message() << one.identity << ", job " << one.job << ", rank " << one.rank);
    const auto parsed = IdentityTemplate::Parse(one.identity);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    const auto error = CheckIdentity({*parsed}, one.names, JoinOf(one.job, one.group, one.rank));
    EXPECT_EQ(!error.has_value(), one.admitted);
  }
}

TEST(IdentityTest, OneOfSeveralIsEnoughAndNoneAdmitsEverybody) {
  const core::Join join = JoinOf("a", "g", 0);
  EXPECT_FALSE(CheckIdentity({}, {}, join).has_value());
  const std::vector<IdentityTemplate> both = {*IdentityTemplate::Parse("DNS:{job}.x"),
                                              *IdentityTemplate::Parse("URI:urn:{rank}")};
  EXPECT_FALSE(CheckIdentity(both, {{}, {"urn:0"}}, join).has_value());
  EXPECT_FALSE(CheckIdentity(both, {{"a.x"}, {}}, join).has_value());
  EXPECT_TRUE(CheckIdentity(both, {{"b.x"}, {"urn:1"}}, join).has_value());
}

TEST(IdentityTest, TheErrorNamesWhatIsAskedAndWhatIsThere) {
  const auto parsed = IdentityTemplate::Parse("URI:spiffe://example.org/{job}/{rank}");
  const auto error =
      CheckIdentity({*parsed}, {{"host.example.org"}, {"urn:a", "urn:b", "urn:c\n", "urn:d"}}, JoinOf("a", "g", 2));
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code, absl::StatusCode::kPermissionDenied);
  EXPECT_STREQ(error->reason, core::kIdentityMismatch);
  EXPECT_THAT(error->message,
              AllOf(HasSubstr("rank 2 of group \"g\" of job \"a\""), HasSubstr("URI:spiffe://example.org/a/2"),
                    HasSubstr("URI:urn:b"), HasSubstr("URI:urn:c\\n"), HasSubstr("and 1 more")));
  const auto nothing = CheckIdentity({*parsed}, {}, JoinOf("a", "g", 2));
  EXPECT_THAT(nothing->message, HasSubstr("neither URIs nor DNS names"));
  const auto label = CheckIdentity({*IdentityTemplate::Parse("DNS:{job}.x")}, {}, JoinOf("a b", "g", 2));
  EXPECT_THAT(label->message, HasSubstr("DNS:{job}.x (of which"));
}

TEST(IdentityTest, TemplatesThatCannotBeUsed) {
  for (const auto& [text, words] : {std::pair{"", "neither URI: nor DNS:"},
                                    {"spiffe://example.org/{rank}", "neither URI: nor DNS:"},
                                    {"URI:", "has no name"},
                                    {"DNS:a b", "spaces"},
                                    {"URI:x/{world}", "placeholder other than"},
                                    {"URI:x/{rank", "placeholder other than"},
                                    {"URI:x}", "placeholder other than"},
                                    {"URI:{job}{rank}", "without a slash"},
                                    {"URI:{job}-{group}", "without a slash"},
                                    {"URI:{job}%2F{group}", "without a slash"},
                                    {"DNS:{job}-{rank}.example", "without a dot"}}) {
    const auto parsed = IdentityTemplate::Parse(text);
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(parsed.status().message()), AllOf(HasSubstr(text), HasSubstr(words)));
  }
}

}  // namespace
}  // namespace syncbn::rpc
