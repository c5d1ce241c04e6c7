// A directory that is there for one test, with all that is in it at the end.

#ifndef SYNCBN_TESTS_TESTING_TEMPORARY_DIRECTORY_H_
#define SYNCBN_TESTS_TESTING_TEMPORARY_DIRECTORY_H_

#include <stdlib.h>

#include <filesystem>
#include <string>

#include "gtest/gtest.h"

namespace syncbn::testing {

class TemporaryDirectory {
 public:
  // The path of a unix socket has to be short, which `parent` then has to be, too.
  explicit TemporaryDirectory(const std::string& parent = ::testing::TempDir()) {
    std::string path = parent + "/syncbn-test-XXXXXX";
    EXPECT_NE(mkdtemp(path.data()), nullptr) << path;
    path_ = path;
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_TESTING_TEMPORARY_DIRECTORY_H_
