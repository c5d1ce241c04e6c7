// Files of any kind and length.

#include "plumbing/bounded_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
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

// A named pipe; nobody writes to it at first.
std::string NewPipe() {
  const std::string path = absl::StrCat(std::getenv("TEST_TMPDIR"), "/pipe");
  unlink(path.c_str());
  EXPECT_EQ(mkfifo(path.c_str(), 0600), 0);
  return path;
}

TEST(BoundedFileTest, PipeWithoutAWriterIsEmpty) {
  const auto read = ReadBoundedFile("key", NewPipe(), 3, absl::InfiniteDuration());
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(*read, "");
}

TEST(BoundedFileTest, PipeIsReadToItsEnd) {
  const std::string path = NewPipe();
  const int reader = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);  // Keeps what is written before the read.
  const int writer = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  ASSERT_GE(writer, 0);
  std::thread late([writer] {
    for (const char* const part : {"ab", "c"}) EXPECT_GT(write(writer, part, std::strlen(part)), 0);
    close(writer);
  });
  const auto read = ReadBoundedFile("key", path, 3, absl::Minutes(1));
  late.join();
  close(reader);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(*read, "abc");
}

TEST(BoundedFileTest, PipeThatDoesNotEndIsGivenUp) {
  const std::string path = NewPipe();
  const int writer = open(path.c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_EQ(write(writer, "a", 1), 1);
  const auto read = ReadBoundedFile("key", path, 3, absl::Milliseconds(1));
  close(writer);
  EXPECT_EQ(read.status().message(), absl::StrCat("cannot read the key \"", path, "\": connection timed out"));
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
