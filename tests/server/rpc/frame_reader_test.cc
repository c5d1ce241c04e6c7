// The parts of a frame that are read without a parser of protobuf's.

#include "server/rpc/frame_reader.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "syncbn/v1/statistics.pb.h"

namespace syncbn::rpc {
namespace {

using ::testing::ElementsAre;

grpc::ByteBuffer BufferOf(const std::string& bytes) {
  const grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

core::Limits SmallLimits() {
  core::Limits limits;
  limits.max_workers = 4;
  return limits;
}

constexpr char kUnpacked[] = {0x50, 1, 0x50, 3};  // left_ranks (10) as varints: 1 and 3.
constexpr char kPacked[] = {0x52, 2, 0, 2};       // The same field packed: 0 and 2.

std::string Bytes(const char (&bytes)[4]) { return std::string(bytes, 4); }

TEST(FrameReaderTest, RanksMayBePackedOrNot) {
  const core::Limits limits = SmallLimits();
  FrameReader reader(BufferOf(Bytes(kUnpacked) + Bytes(kPacked)), limits);
  ASSERT_FALSE(reader.Open().has_value());
  EXPECT_THAT(reader.head().left_ranks, ElementsAre(1, 3, 0, 2));
  v1::WorkerFrame parsed;
  ASSERT_TRUE(parsed.ParseFromString(Bytes(kUnpacked) + Bytes(kPacked)));
  EXPECT_THAT(parsed.left_ranks(), ElementsAre(1, 3, 0, 2)) << "as protobuf reads them";
}

TEST(FrameReaderTest, RanksThatAreNotPackedHaveTheSameLimit) {
  const core::Limits limits = SmallLimits();
  FrameReader reader(BufferOf(Bytes(kUnpacked) + Bytes(kPacked) + Bytes(kUnpacked)), limits);
  const auto error = reader.Open();
  ASSERT_TRUE(error.has_value());
  EXPECT_STREQ(error->reason, "LIMIT_EXCEEDED");
  EXPECT_STREQ(error->limit, "max_workers");
}

TEST(FrameReaderTest, TheMembershipThatWasReadComesWithTheLastSlice) {
  v1::WorkerFrame frame;
  frame.set_membership_read(UINT64_MAX);
  frame.set_caught_up(true);
  for (uint64_t sequence = 0; sequence < 2; ++sequence) {
    v1::Contribution* const contribution = frame.add_contributions();
    contribution->mutable_key()->set_layer("v");
    contribution->mutable_key()->set_sequence(sequence);
    contribution->mutable_key()->set_phase(v1::PHASE_SUM);
    contribution->mutable_vector()->add_value(1.0);
  }
  const core::Limits limits = SmallLimits();
  FrameReader reader(BufferOf(frame.SerializeAsString()), limits);
  ASSERT_FALSE(reader.Open().has_value());
  SliceLimits one;
  one.contributions = 1;
  google::protobuf::Arena arena;
  core::FrameReceived first, last;
  ASSERT_FALSE(reader.Next(one, &arena, &first).has_value());
  EXPECT_EQ(first.membership_read, 0u);
  ASSERT_FALSE(reader.Next(one, &arena, &last).has_value());
  EXPECT_TRUE(reader.done());
  EXPECT_EQ(last.membership_read, UINT64_MAX);
  EXPECT_TRUE(last.caught_up);
}

// Protobuf's rule: a field of another type than the message's is unknown.
TEST(FrameReaderTest, BytesInPlaceOfANumberAreUnknown) {
  for (const int number : {v1::WorkerFrame::kCaughtUpFieldNumber, v1::WorkerFrame::kMembershipReadFieldNumber}) {
    v1::RoundKey key;
    key.set_layer("bn");
    key.set_phase(v1::PHASE_SUM);
    const std::string bytes = key.SerializeAsString();
    std::string frame(1, static_cast<char>(number << 3 | 2));
    frame += static_cast<char>(bytes.size()) + bytes;
    v1::WorkerFrame parsed;
    ASSERT_TRUE(parsed.ParseFromString(frame) && !parsed.caught_up() && parsed.blocked_on().empty());
    const core::Limits limits = SmallLimits();
    FrameReader reader(BufferOf(frame), limits);
    ASSERT_FALSE(reader.Open().has_value());
    EXPECT_TRUE(reader.head().blocked_on.empty() && !reader.head().caught_up);
    EXPECT_EQ(reader.head().membership_read, 0u);
  }
}

TEST(FrameReaderTest, AFrameMayLieInPieces) {
  v1::WorkerFrame frame;
  frame.mutable_leave()->set_reason("the end");
  frame.add_left_ranks(300);
  frame.add_blocked_on()->set_layer("blocked");
  frame.mutable_blocked_on(0)->set_phase(v1::PHASE_SUM);
  v1::Contribution* const contribution = frame.add_contributions();
  contribution->mutable_key()->set_layer("v");
  contribution->mutable_key()->set_phase(v1::PHASE_SUM);
  for (int i = 0; i < 20; ++i) contribution->mutable_vector()->add_value(i + 0.5);
  *frame.add_repeats() = *contribution;
  const std::string bytes = frame.SerializeAsString();
  const core::Limits limits;
  for (size_t cut = 0; cut <= bytes.size(); ++cut) {
    const grpc::Slice slices[] = {grpc::Slice(bytes.substr(0, cut)), grpc::Slice(bytes.substr(cut))};
    FrameReader reader(grpc::ByteBuffer(slices, 2), limits);
    ASSERT_FALSE(reader.Open().has_value()) << cut;
    google::protobuf::Arena arena;
    core::FrameReceived event;
    ASSERT_FALSE(reader.Next({}, &arena, &event).has_value()) << cut;
    ASSERT_EQ(event.contributions.size(), 2u);
    EXPECT_EQ(event.contributions[0].first[19], 19.5);
    EXPECT_FALSE(event.contributions[0].repeats);
    EXPECT_TRUE(event.contributions[1].repeats);
    EXPECT_EQ(event.leave, "the end");
    EXPECT_THAT(event.left_ranks, ElementsAre(300));
    EXPECT_EQ(event.blocked_on.at(0).layer, "blocked");
  }
}

TEST(FrameReaderTest, ANumberThatIsCutOffIsMalformed) {
  const core::Limits limits = SmallLimits();
  FrameReader reader(BufferOf("\x50"), limits);
  const auto error = reader.Open();
  ASSERT_TRUE(error.has_value());
  EXPECT_STREQ(error->reason, "MALFORMED_FRAME");
}

}  // namespace
}  // namespace syncbn::rpc
