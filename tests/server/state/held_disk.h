// A store whose disk a test holds, fills and looks at.

#ifndef SYNCBN_TESTS_SERVER_STATE_HELD_DISK_H_
#define SYNCBN_TESTS_SERVER_STATE_HELD_DISK_H_

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"
#include "server/core/state.h"
#include "server/state/store.h"
#include "server/state/writer.h"

namespace syncbn::testing {

class HeldDisk {
 public:
  absl::Status Save(const core::StateChanges& changes) {
    const absl::MutexLock lock(&mutex_);
    ++attempts_;
    mutex_.Await(absl::Condition(&open_));
    if (failures_ > 0) {
      --failures_;
      return absl::ResourceExhaustedError("the disk is full");
    }
    saved_.push_back(changes);
    return absl::OkStatus();
  }

  // Between the two, calls of Save wait.
  void Hold() { Set(&open_, false); }
  void Release() { Set(&open_, true); }
  void FailTimes(int times) { Set(&failures_, times); }

  // Wait for so many calls of Save to have begun, or to have succeeded.
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
  std::vector<core::StateChanges> saved() const {
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
  std::vector<core::StateChanges> saved_;
};

class HeldStore final : public state::Store {
 public:
  // `disk` must outlive this object.
  explicit HeldStore(HeldDisk* disk) : disk_(disk) {}
  absl::StatusOr<std::vector<core::GroupState>> Load() override { return std::vector<core::GroupState>(); }
  absl::Status Save(const core::StateChanges& changes) override { return disk_->Save(changes); }

 private:
  HeldDisk* const disk_;
};

// Returns a writer that stores on this disk, which must outlive it.
inline std::unique_ptr<state::Writer> StartWriter(HeldDisk* disk, std::string where = "here") {
  auto writer = state::Writer::Start(std::make_unique<HeldStore>(disk), std::move(where));
  EXPECT_TRUE(writer.ok()) << writer.status();
  return *std::move(writer);
}

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_SERVER_STATE_HELD_DISK_H_
