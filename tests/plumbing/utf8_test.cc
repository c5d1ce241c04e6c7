// Text is UTF-8 or it is not, by the table of RFC 3629, and by protobuf, which is what refuses it in the end.

#include "plumbing/utf8.h"

#include <cstdint>
#include <string>

#include "google/protobuf/stubs/logging.h"
#include "gtest/gtest.h"
#include "syncbn/v1/statistics.pb.h"

namespace syncbn {
namespace {

// Protobuf parses a string of a proto3 message only if it is UTF-8.
bool ProtobufTakes(const std::string& text) {
  std::string encoded = {0x0a, static_cast<char>(text.size())};
  return v1::RoundKey().ParseFromString(encoded + text);
}

TEST(Utf8Test, TextIsTaken) {
  for (const char* text :
       {"", "layer1.bn", "Schicht \xc3\xa4", "\xe5\xb1\xa4", "\xf0\x9f\xa7\xa0", "\xf4\x8f\xbf\xbf"}) {
    EXPECT_TRUE(IsUtf8(text)) << text;
    EXPECT_TRUE(CheckUtf8("a name", text).ok()) << text;
  }
  EXPECT_TRUE(IsUtf8(std::string("a\0b", 3)));
}

TEST(Utf8Test, OtherBytesAreShown) {
  const absl::Status status = CheckUtf8("a layer's name", "bn\xff");
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "a layer's name is not UTF-8: \"bn\\xff\"");
}

// All of up to three bytes, with those of 0x00 to 0x7f thinned out, and four bytes around the edges.
TEST(Utf8Test, ProtobufAgrees) {
  google::protobuf::SetLogHandler(nullptr);
  const auto same = [](const std::string& text) { ASSERT_EQ(IsUtf8(text), ProtobufTakes(text)) << text.size(); };
  const auto thin = [](int byte) { return byte < 0x80 ? byte + 0x7f : byte + 1; };
  for (int a = 0; a < 256; a = thin(a)) {
    same({static_cast<char>(a)});
    for (int b = 0; b < 256; b = thin(b)) {
      same({static_cast<char>(a), static_cast<char>(b)});
      for (int c = 0; c < 256; c = thin(c)) same({static_cast<char>(a), static_cast<char>(b), static_cast<char>(c)});
    }
  }
  for (const int a : {0xee, 0xef, 0xf0, 0xf1, 0xf3, 0xf4, 0xf5, 0xff}) {
    for (int b = 0x7f; b < 256; ++b) {
      for (const int c : {0x7f, 0x80, 0xbf, 0xc0}) {
        for (const int d : {0x00, 0x7f, 0x80, 0xbf, 0xc0}) {
          same({static_cast<char>(a), static_cast<char>(b), static_cast<char>(c), static_cast<char>(d)});
        }
      }
    }
  }
}

}  // namespace
}  // namespace syncbn
