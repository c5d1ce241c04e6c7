// The thread that stores a master's state: nobody waits for it, and it gives nothing up.

#include "server/state/writer.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "plumbing/log.h"
#include "server/core/state.h"
#include "tests/server/state/held_disk.h"

namespace syncbn::state {
namespace {

using core::StateChanges;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::HeldDisk;
using testing::StartWriter;

StateChanges Changes(const std::string& name) { return {{{"job", name}}, {}}; }

std::vector<std::string> Names(const HeldDisk& disk) {
  std::vector<std::string> names;
  for (const StateChanges& changes : disk.saved()) names.push_back(changes.ended.at(0).group);
  return names;
}

// Keeps the log's lines while it lives.
class Lines {
 public:
  Lines() {
    SetLogSink([this](LogLevel, absl::string_view line) {
      const absl::MutexLock lock(&mutex_);
      lines_ += std::string(line) + "\n";
    });
  }
  ~Lines() { SetLogSink(nullptr); }
  std::string text() const {
    const absl::MutexLock lock(&mutex_);
    return lines_;
  }

 private:
  mutable absl::Mutex mutex_;
  std::string lines_;
};

TEST(WriterTest, StoresInOrder) {
  HeldDisk disk;
  const auto writer = StartWriter(&disk);
  EXPECT_TRUE(writer->idle());
  EXPECT_EQ(writer->status().saved_at, absl::InfinitePast());
  for (const char* name : {"a", "b", "c"}) writer->Write(Changes(name));
  writer->Close();
  EXPECT_THAT(Names(disk), ElementsAre("a", "b", "c"));
  EXPECT_TRUE(writer->idle());
  EXPECT_NE(writer->status().saved_at, absl::InfinitePast());
  EXPECT_EQ(writer->status().error, "");
}

TEST(WriterTest, NobodyWaitsForASlowDisk) {
  HeldDisk disk;
  disk.Hold();
  const auto writer = StartWriter(&disk);
  writer->Write(Changes("a"));
  disk.AwaitAttempts(1);
  EXPECT_FALSE(writer->idle());
  EXPECT_EQ(writer->status().error, "");
  disk.Release();
  disk.AwaitSaved(1);
}

TEST(WriterTest, WhatCannotBeStoredIsTriedAgainAndTheLogTells) {
  Lines lines;
  HeldDisk disk;
  disk.FailTimes(2);
  const auto writer = StartWriter(&disk, "\"/state\"");
  writer->Write(Changes("a"));
  disk.AwaitAttempts(2);
  EXPECT_EQ(writer->status().error, "the disk is full");
  EXPECT_FALSE(writer->idle());
  disk.AwaitSaved(1);
  writer->Close();
  EXPECT_EQ(writer->status().error, "");
  EXPECT_THAT(Names(disk), ElementsAre("a"));
  EXPECT_THAT(lines.text(), HasSubstr("cannot be stored in \"/state\": the disk is full; training goes on"));
  EXPECT_THAT(lines.text(), HasSubstr("are stored in \"/state\" again"));
}

TEST(WriterTest, AnEndDoesNotWaitForADiskThatIsBroken) {
  HeldDisk disk;
  disk.FailTimes(1 << 30);
  const auto writer = StartWriter(&disk);
  writer->Write(Changes("a"));
  writer->Write(Changes("b"));
  writer->Close();
  EXPECT_EQ(writer->status().error, "the disk is full");
  EXPECT_FALSE(writer->idle());
}

}  // namespace
}  // namespace syncbn::state
