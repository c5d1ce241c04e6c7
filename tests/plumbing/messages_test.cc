// Messages, times and their bytes.

#include "plumbing/messages.h"

#include <cstdlib>
#include <string>

#include "absl/time/time.h"
#include "google/protobuf/duration.pb.h"
#include "google/protobuf/timestamp.pb.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/slice.h"
#include "gtest/gtest.h"
#include "plumbing/duration.h"

namespace syncbn {
namespace {

google::protobuf::Duration Message(int64_t seconds, int32_t nanos) {
  google::protobuf::Duration message;
  message.set_seconds(seconds);
  message.set_nanos(nanos);
  return message;
}

TEST(MessagesTest, AMessageBecomesOneSlice) {
  const google::protobuf::Duration message = Message(1'000'000, 7);
  const grpc::Slice slice = SerializeToSlice(message);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(slice.begin()), slice.size()), message.SerializeAsString());
  EXPECT_EQ(SerializeToBuffer(message).Length(), message.ByteSizeLong());
}

TEST(MessagesTest, AMessageIsParsedFromSlicesOfAnyLength) {
  const google::protobuf::Duration message = Message(1'000'000, 7);
  const std::string bytes = message.SerializeAsString();
  for (size_t cut = 0; cut <= bytes.size(); ++cut) {
    const grpc::Slice slices[] = {grpc::Slice(bytes.substr(0, cut)), grpc::Slice(bytes.substr(cut))};
    grpc::ByteBuffer buffer(slices, 2);
    FrameArena arena;
    auto* const parsed = arena.Create<google::protobuf::Duration>();
    ASSERT_TRUE(ParseFromBuffer(&buffer, parsed)) << cut;
    EXPECT_EQ(parsed->seconds(), 1'000'000);
    EXPECT_EQ(parsed->nanos(), 7);
    EXPECT_EQ(buffer.Length(), bytes.size());
  }
}

TEST(MessagesTest, WhatIsNoMessageIsNotParsed) {
  google::protobuf::Duration parsed;
  const grpc::Slice slice("\xff\xff\xff");
  grpc::ByteBuffer malformed(&slice, 1), invalid;
  EXPECT_FALSE(ParseFromBuffer(&malformed, &parsed));
  EXPECT_FALSE(ParseFromBuffer(&invalid, &parsed));
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
