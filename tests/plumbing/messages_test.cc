// Messages, times and their bytes.

#include "plumbing/messages.h"

#include <cstdlib>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "google/protobuf/duration.pb.h"
#include "google/protobuf/timestamp.pb.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/slice.h"
#include "gtest/gtest.h"
#include "plumbing/duration.h"

namespace syncbn {
namespace {

TEST(MessagesTest, AMessageBecomesOneSlice) {
  FrameArena arena;
  auto* const message = arena.Create<google::protobuf::Duration>();
  message->set_seconds(1'000'000);
  message->set_nanos(7);
  const grpc::ByteBuffer buffer = SerializeToBuffer(*message);
  std::vector<grpc::Slice> slices;
  ASSERT_TRUE(buffer.Dump(&slices).ok());
  ASSERT_EQ(slices.size(), 1u);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(slices[0].begin()), slices[0].size()),
            message->SerializeAsString());
}

TEST(DurationTest, DurationsKeepTheirNanoseconds) {
  for (const absl::Duration duration :
       {absl::ZeroDuration(), absl::Nanoseconds(1), absl::Milliseconds(50), absl::Minutes(10) + absl::Nanoseconds(3),
        -absl::Milliseconds(1500), absl::Hours(24 * 365 * 100)}) {
    google::protobuf::Duration message;
    ToProto(duration, &message);
    EXPECT_EQ(FromProto(message), duration);
    EXPECT_LT(std::abs(message.nanos()), 1'000'000'000);
  }
  google::protobuf::Duration message;
  ToProto(absl::Milliseconds(1500), &message);
  EXPECT_EQ(message.seconds(), 1);
  EXPECT_EQ(message.nanos(), 500'000'000);
}

TEST(DurationTest, TimesCountFromTheEpoch) {
  google::protobuf::Timestamp message;
  ToProto(absl::FromUnixNanos(1'500'000'000'250'000'000), &message);
  EXPECT_EQ(message.seconds(), 1'500'000'000);
  EXPECT_EQ(message.nanos(), 250'000'000);
}

}  // namespace
}  // namespace syncbn
