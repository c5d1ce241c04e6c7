// Files of any kind and length.

#include "plumbing/bounded_file.h"

#include <cstdlib>
#include <fstream>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace syncbn {
namespace {

std::string FileWith(const std::string& text) {
  const std::string path = absl::StrCat(std::getenv("TEST_TMPDIR"), "/file of ", text.size());
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

TEST(BoundedFileTest, LongAsTheLimit) {
  for (const size_t size : {size_t{0}, size_t{1}, size_t{4095}, size_t{4096}, size_t{4097}, size_t{10000}}) {
    const std::string text(size, '\0');
    const auto read = ReadBoundedFile("key", FileWith(text), size);
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_EQ(*read, text);
  }
}

TEST(BoundedFileTest, LongerThanTheLimit) {
  for (const std::string& path : {FileWith("abcd"), std::string("/dev/zero")}) {
    const auto read = ReadBoundedFile("key", path, 3);
    EXPECT_EQ(read.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(read.status().message(),
              absl::StrCat("the key \"", path, "\" is longer than 3 bytes, the most that are read"));
  }
}

TEST(BoundedFileTest, ErrorsSayWhy) {
  for (const auto& [path, why] : {std::pair{"/no/such/file", "no such file or directory"}, {"/", "is a directory"}}) {
    const auto read = ReadBoundedFile("key", path, 3);
    EXPECT_EQ(read.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(read.status().message(), absl::StrCat("cannot read the key \"", path, "\": ", why));
  }
}

}  // namespace
}  // namespace syncbn
