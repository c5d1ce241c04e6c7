// The files of TLS: each that cannot be used is named, and so is what is wrong with it.

#include "plumbing/tls.h"

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace syncbn {
namespace {

using ::testing::HasSubstr;

class TlsTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    const std::string key = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:prime256v1 -out ";
    Shell(absl::StrCat(key, "own.key && ", key, "other.key"));
    Shell("openssl req -x509 -key own.key -days 2 -subj /CN=own -out own.pem");
    Shell("openssl req -new -key own.key -subj /CN=own -out own.csr");
    Shell("openssl x509 -req -in own.csr -signkey own.key -days -1 -out expired.pem");
  }

  static void Shell(const std::string& command) {
    ASSERT_EQ(std::system(absl::StrCat("cd ", ::testing::TempDir(), " && ", command, " 2>/dev/null").c_str()), 0)
        << command;
  }

  static std::string Path(const std::string& name) { return absl::StrCat(::testing::TempDir(), "/", name); }

  static std::string Contents(const std::string& name) {
    std::ifstream file(Path(name));
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
  }

  static void ExpectRefusal(const TlsFiles& files, const std::string& file, const std::string& message) {
    const auto material = ReadTls(files);
    EXPECT_EQ(material.status().code(), absl::StatusCode::kInvalidArgument) << material.status();
    EXPECT_THAT(std::string(material.status().message()), HasSubstr(file));
    EXPECT_THAT(std::string(material.status().message()), HasSubstr(message));
  }
};

TEST_F(TlsTest, FilesAreReadAsTheyAre) {
  const auto material = ReadTls({Path("own.pem"), Path("own.key"), Path("own.pem")});
  ASSERT_TRUE(material.ok()) << material.status();
  EXPECT_EQ(material->certificate, Contents("own.pem"));
  EXPECT_EQ(material->key, Contents("own.key"));
  EXPECT_EQ(material->trusted_ca, Contents("own.pem"));
  EXPECT_GT(material->expiry, absl::Now());
  EXPECT_LT(material->expiry, absl::Now() + absl::Hours(72));
}

TEST_F(TlsTest, FilesThatAreNotGivenAreEmpty) {
  const auto nothing = ReadTls({});
  ASSERT_TRUE(nothing.ok()) << nothing.status();
  EXPECT_EQ(nothing->certificate, "");
  EXPECT_EQ(nothing->expiry, absl::InfiniteFuture());
  const auto trusted = ReadTls({"", "", Path("own.pem")});
  ASSERT_TRUE(trusted.ok()) << trusted.status();
  EXPECT_EQ(trusted->key, "");
  EXPECT_EQ(trusted->trusted_ca, Contents("own.pem"));
}

TEST_F(TlsTest, FilesThatCannotBeUsedAreNamed) {
  ExpectRefusal({Path("own.pem"), "", ""}, "", "the key is missing");
  ExpectRefusal({"", Path("own.key"), ""}, "", "the certificate is missing");
  ExpectRefusal({Path("none.pem"), Path("own.key"), ""}, Path("none.pem"), "cannot read the certificate");
  ExpectRefusal({Path("own.pem"), Path("own.pem"), ""}, Path("own.pem"), "no PEM block of a PRIVATE KEY");
  ExpectRefusal({Path("own.pem"), Path("other.key"), ""}, Path("other.key"), "does not belong to the certificate");
  ExpectRefusal({Path("expired.pem"), Path("own.key"), ""}, Path("expired.pem"), "expired on");
  ExpectRefusal({Path("own.pem"), Path("own.key"), Path("own.csr")}, Path("own.csr"), "the trusted CA");
}

}  // namespace
}  // namespace syncbn
