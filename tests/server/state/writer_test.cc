// The thread that stores a master's state: nobody waits for it, and it gives nothing up.

#include "server/state/writer.h"

#include <deque>
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

namespace syncbn::state {
namespace {

using core::StateChanges;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A disk that a test holds and breaks.
class Disk {
 public:
  absl::Status Save(const StateChanges& changes) {
    const absl::MutexLock lock(&mutex_);
    ++attempts_;
    mutex_.Await(absl::Condition(&open_));
    if (failures_ > 0) {
      --failures_;
      return absl::ResourceExhaustedError("the disk is full");
    }
    saved_.push_back(changes.ended.at(0).group);
    return absl::OkStatus();
  }
  void Hold() { Set(&open_, false); }
  void Release() { Set(&open_, true); }
  void FailTimes(int times) { Set(&failures_, times); }
  void AwaitAttempts(int attempts) {
    const absl::MutexLock lock(&mutex_);
    const auto reached = [this, attempts] { return attempts_ >= attempts; };
    mutex_.Await(absl::Condition(&reached));
  }
  void AwaitSaved(size_t count) {
    const absl::MutexLock lock(&mutex_);
    const auto reached = [this, count] { return saved_.size() >= count; };
    mutex_.Await(absl::Condition(&reached));
  }
  std::vector<std::string> saved() const {
    const absl::MutexLock lock(&mutex_);
    return saved_;
  }

 private:
  template <typename T>
  void Set(T* field, T value) {
    const absl::MutexLock lock(&mutex_);
    *field = value;
  }

  mutable absl::Mutex mutex_;
  bool open_ = true;
  int failures_ = 0;
  int attempts_ = 0;
  std::vector<std::string> saved_;
};

class DiskStore final : public Store {
 public:
  explicit DiskStore(Disk* disk) : disk_(disk) {}
  absl::StatusOr<std::vector<core::GroupState>> Load() override { return std::vector<core::GroupState>(); }
  absl::Status Save(const StateChanges& changes) override { return disk_->Save(changes); }

 private:
  Disk* const disk_;
};

StateChanges Changes(const std::string& name) { return {{{"job", name}}, {}}; }

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
  Disk disk;
  Writer writer(std::make_unique<DiskStore>(&disk), "here");
  EXPECT_TRUE(writer.idle());
  EXPECT_EQ(writer.status().saved_at, absl::InfinitePast());
  for (const char* name : {"a", "b", "c"}) writer.Write(Changes(name));
  writer.Close();
  EXPECT_THAT(disk.saved(), ElementsAre("a", "b", "c"));
  EXPECT_TRUE(writer.idle());
  EXPECT_NE(writer.status().saved_at, absl::InfinitePast());
  EXPECT_EQ(writer.status().error, "");
}

TEST(WriterTest, NobodyWaitsForASlowDisk) {
  Disk disk;
  disk.Hold();
  Writer writer(std::make_unique<DiskStore>(&disk), "here");
  writer.Write(Changes("a"));
  disk.AwaitAttempts(1);
  EXPECT_FALSE(writer.idle());
  EXPECT_EQ(writer.status().error, "");
  disk.Release();
  disk.AwaitSaved(1);
}

TEST(WriterTest, WhatCannotBeStoredIsTriedAgainAndTheLogTells) {
  Lines lines;
  Disk disk;
  disk.FailTimes(2);
  Writer writer(std::make_unique<DiskStore>(&disk), "\"/state\"");
  writer.Write(Changes("a"));
  disk.AwaitAttempts(2);
  EXPECT_EQ(writer.status().error, "the disk is full");
  EXPECT_FALSE(writer.idle());
  disk.AwaitSaved(1);
  writer.Close();
  EXPECT_EQ(writer.status().error, "");
  EXPECT_THAT(disk.saved(), ElementsAre("a"));
  EXPECT_THAT(lines.text(), HasSubstr("cannot be stored in \"/state\": the disk is full; training goes on"));
  EXPECT_THAT(lines.text(), HasSubstr("are stored in \"/state\" again"));
}

TEST(WriterTest, AnEndDoesNotWaitForADiskThatIsBroken) {
  Disk disk;
  disk.FailTimes(1 << 30);
  Writer writer(std::make_unique<DiskStore>(&disk), "here");
  writer.Write(Changes("a"));
  writer.Write(Changes("b"));
  writer.Close();
  EXPECT_EQ(writer.status().error, "the disk is full");
  EXPECT_FALSE(writer.idle());
}

}  // namespace
}  // namespace syncbn::state
