// Tokens and their digests.

#include "plumbing/secret.h"

#include <cstdlib>
#include <fstream>
#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace syncbn {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

std::string FileWith(const std::string& name, const std::string& text) {
  const std::string path = absl::StrCat(std::getenv("TEST_TMPDIR"), "/", name);
  std::ofstream(path) << text;
  return path;
}

TEST(SecretTest, DigestsAreSha256) {
  const auto digest = Sha256("abc");  // FIPS 180-2, B.1.
  EXPECT_EQ(absl::BytesToHexString(absl::string_view(reinterpret_cast<const char*>(digest.data()), digest.size())),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST(SecretTest, RandomBytesDiffer) {
  EXPECT_EQ(RandomBytes(16).size(), 16u);
  EXPECT_NE(RandomBytes(16), RandomBytes(16));
}

TEST(SecretTest, TokensArePrintableAscii) {
  EXPECT_TRUE(CheckToken("a").ok());
  EXPECT_TRUE(CheckToken("!~aZ09-_+/=").ok());
  EXPECT_TRUE(CheckToken(std::string(1024, 'x')).ok());
  for (const std::string& bad :
       {std::string(), std::string(1025, 'x'), std::string("secret one"), std::string("secret\n"),
        std::string("secret\0", 7), std::string("gr\xc3\xbc\xc3\x9f")}) {
    const absl::Status status = CheckToken(bad);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), Not(HasSubstr("secret"))) << "it shows the token";
  }
}

TEST(SecretTest, FilesHoldOneToken) {
  EXPECT_EQ(*ReadTokenFile(FileWith("plain", "abc")), "abc");
  EXPECT_EQ(*ReadTokenFile(FileWith("line", "abc\n")), "abc");
  EXPECT_EQ(*ReadTokenFile(FileWith("line of Windows", "abc\r\n")), "abc");
  for (const auto& [name, text, words] : {std::tuple{"empty", "", "it is empty"},
                                          {"blank", "\n", "0 bytes"},
                                          {"two", "abc\ndef\n", "more than one line"},
                                          {"return", "abc\r", "not printable ASCII"},
                                          {"spaces", "a secret\n", "a space"}}) {
    const auto token = ReadTokenFile(FileWith(name, text));
    EXPECT_EQ(token.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(token.status().message()), HasSubstr(words));
    EXPECT_THAT(std::string(token.status().message()), HasSubstr(name));
  }
  EXPECT_THAT(std::string(ReadTokenFile("/no/such/file").status().message()), HasSubstr("no such file"));
  EXPECT_THAT(std::string(ReadTokenFile("/dev/zero").status().message()), HasSubstr("longer than 4096 bytes"));
}

}  // namespace
}  // namespace syncbn
