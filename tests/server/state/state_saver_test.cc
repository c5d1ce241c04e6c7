// Handing of changes to the writer.

#include "server/rpc/state_saver.h"

#include <cstdint>
#include <memory>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/coordinator.h"
#include "server/state/writer.h"
#include "tests/server/state/held_disk.h"

namespace syncbn::rpc {
namespace {

using testing::HeldDisk;
using ::testing::IsEmpty;
using ::testing::SizeIs;

// A group of one worker and one layer, on a virtual clock.
class StateSaverTest : public ::testing::Test {
 protected:
  void SetUp() override {
    coordinator_.Restore({}, now_);
    core::FrameReceived frame;
    frame.stream = 1;
    frame.join.emplace();
    frame.join->min_protocol_version = frame.join->max_protocol_version = 1;
    frame.join->world_size = 1;
    core::LayerSpec spec;
    spec.name = "a";
    spec.channels = 1;
    frame.layers = {spec};
    coordinator_.On(frame, now_);
  }

  void Rounds(int count) {
    const double mean = 1.0, m2 = 0.0;
    for (int i = 0; i < count; ++i) {
      core::FrameReceived frame;
      frame.stream = 1;
      const core::RoundKey key{"a", sequence_++, core::Phase::kForward};
      frame.contributions.push_back({key, 2, core::BackwardRole::kNone, {&mean, 1}, {&m2, 1}});
      coordinator_.On(frame, now_);
      saver_.OnTurn(now_);
    }
  }
  void Turn(absl::Duration later) {
    now_ += later;
    saver_.OnTurn(now_);
  }
  uint64_t NewestSaved() const { return disk_.saved().back().groups.at(0).layers.at(0).newest_sequence; }

  HeldDisk disk_;
  const std::unique_ptr<state::Writer> writer_ = testing::StartWriter(&disk_);
  core::Coordinator coordinator_;
  StateSaver saver_{&coordinator_, writer_.get(), size_t{1} << 20};
  absl::Time now_ = absl::FromUnixSeconds(1'700'000'000);
  uint64_t sequence_ = 0;
};

TEST_F(StateSaverTest, NothingIsDueWithoutChanges) {
  saver_.OnTurn(now_);
  EXPECT_EQ(saver_.NextTurn(), absl::InfiniteFuture());
  StateSaver none(&coordinator_, nullptr, 1);
  Rounds(1);
  none.OnTurn(now_);
  none.Finish();
  EXPECT_EQ(none.NextTurn(), absl::InfiniteFuture());
}

TEST_F(StateSaverTest, FewRoundsWaitForASecond) {
  Rounds(7);
  EXPECT_EQ(saver_.NextTurn(), now_ + absl::Seconds(1));
  Turn(absl::Milliseconds(999));
  EXPECT_TRUE(writer_->idle());
  Turn(absl::Milliseconds(1));
  disk_.AwaitSaved(1);
  EXPECT_EQ(NewestSaved(), 6u);
  EXPECT_EQ(saver_.NextTurn(), absl::InfiniteFuture());
}

TEST_F(StateSaverTest, EightRoundsOfALayerDoNotWait) {
  Rounds(8);
  disk_.AwaitSaved(1);
  EXPECT_EQ(NewestSaved(), 7u);
}

TEST_F(StateSaverTest, AnEndedGroupDoesNotWait) {
  coordinator_.On(core::StreamClosed{1}, now_);
  now_ += absl::Minutes(2);
  coordinator_.On(core::TimePassed{}, now_);
  saver_.OnTurn(now_);
  disk_.AwaitSaved(1);
  EXPECT_THAT(disk_.saved()[0].ended, SizeIs(1));
}

TEST_F(StateSaverTest, WhileTheDiskIsSlowChangesStayAndTheNewestAreStoredThen) {
  disk_.Hold();
  Rounds(8);
  disk_.AwaitAttempts(1);
  Rounds(1000);
  EXPECT_EQ(saver_.NextTurn(), now_ + absl::Milliseconds(10));
  EXPECT_TRUE(coordinator_.journal().has_changes());
  disk_.Release();
  disk_.AwaitSaved(1);
  while (!writer_->idle()) {  // It takes note of that right afterwards.
  }
  Turn(absl::Milliseconds(10));
  disk_.AwaitSaved(2);
  EXPECT_EQ(NewestSaved(), 1007u);
  EXPECT_THAT(disk_.saved(), SizeIs(2));
}

TEST_F(StateSaverTest, TheEndHandsOverEverything) {
  disk_.Hold();
  Rounds(8);
  Rounds(3);
  saver_.Finish();
  EXPECT_FALSE(coordinator_.journal().has_changes());
  EXPECT_THAT(disk_.saved(), IsEmpty());
  disk_.Release();
  writer_->Close();
  EXPECT_EQ(NewestSaved(), 10u);
}

}  // namespace
}  // namespace syncbn::rpc
