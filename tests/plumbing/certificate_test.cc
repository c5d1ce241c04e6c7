#include "plumbing/certificate.h"

#include <sys/stat.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "plumbing/pem.h"

namespace syncbn {
namespace {

std::string NewPath(const std::string& name) {
  static int count = 0;
  return absl::StrCat(testing::TempDir(), "/certificate-", ++count, "-", name);
}

TEST(Certificate, IsReadBackWithItsKey) {
  for (const std::string host : {"10.1.2.3", "fe80::1", "node-7.cluster.local"}) {
    const std::string cert = NewPath("cert.pem"), key = NewPath("key.pem");
    ASSERT_TRUE(MakeSelfSignedCertificate(host, cert, key).ok());
    const auto identity = ReadIdentity(cert, key);
    ASSERT_TRUE(identity.ok()) << identity.status();
    EXPECT_LT(identity->certificate.not_before, absl::Now() - absl::Hours(23));
    EXPECT_GT(identity->certificate.not_after, absl::Now() + absl::Hours(24 * 3000));
    struct stat found = {};
    ASSERT_EQ(stat(key.c_str(), &found), 0);
    EXPECT_EQ(found.st_mode & 0777, 0600u);
  }
}

TEST(Certificate, TwoAreDifferent) {
  std::vector<std::string> keys;
  for (int i = 0; i < 2; ++i) {
    const std::string cert = NewPath("cert.pem"), key = NewPath("key.pem");
    ASSERT_TRUE(MakeSelfSignedCertificate("127.0.0.1", cert, key).ok());
    keys.push_back(ReadIdentity(cert, key)->key);
  }
  EXPECT_NE(keys[0], keys[1]);
}

TEST(Certificate, RefusesHostsThatAreNone) {
  for (const std::string host : {"", "a,IP:1.2.3.4", "a b", "host:80", "[::1]", "a\n"}) {
    const absl::Status status = MakeSelfSignedCertificate(host, NewPath("cert.pem"), NewPath("key.pem"));
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << host;
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr(host));
  }
}

TEST(Certificate, OverwritesNothing) {
  const std::string cert = NewPath("cert.pem"), key = NewPath("key.pem");
  ASSERT_TRUE(MakeSelfSignedCertificate("127.0.0.1", cert, key).ok());
  const absl::Status again = MakeSelfSignedCertificate("127.0.0.1", NewPath("cert.pem"), key);
  EXPECT_EQ(again.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(again.message()), testing::HasSubstr(key));
}

}  // namespace
}  // namespace syncbn
