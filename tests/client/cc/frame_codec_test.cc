// A master's frames as they are read without protobuf, against what protobuf makes of them.

#include "client/cc/frame_codec.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "gtest/gtest.h"
#include "syncbn/v1/statistics.pb.h"

namespace syncbn {
namespace {

void Draw(std::mt19937& random, google::protobuf::RepeatedField<double>* vector) {
  const int sizes[] = {0, 1, 15, 16, 300};
  for (int i = sizes[random() % 5]; i > 0; --i) {
    const uint64_t bits = static_cast<uint64_t>(random()) << 32 | random();
    double value = 0.0;
    std::memcpy(&value, &bits, sizeof(value));
    vector->Add(value);
  }
}

void Draw(std::mt19937& random, google::protobuf::RepeatedField<uint32_t>* ranks) {
  for (uint32_t i = random() % 3; i > 0; --i) ranks->Add(static_cast<uint32_t>(random() >> (random() % 32)));
}

void Draw(std::mt19937& random, v1::RoundResult* result) {
  const std::string names[] = {"bn1", "layer4.1.bn2.with.a.long.name", "schicht-\xc3\xa4", ""};
  result->mutable_key()->set_layer(names[random() % 4]);
  result->mutable_key()->set_sequence(static_cast<uint64_t>(random()) << (random() % 33));
  result->mutable_key()->set_phase(static_cast<v1::Phase>(random() % 4));
  switch (random() % 5) {
    case 0:
    case 1:
      result->mutable_moments()->set_count(static_cast<int64_t>(random()) - (1 << 30));
      Draw(random, result->mutable_moments()->mutable_mean());
      Draw(random, result->mutable_moments()->mutable_var());
      result->mutable_moments()->set_backward_required(random() % 2 == 0);
      Draw(random, result->mutable_moments()->mutable_abstaining_ranks());
      break;
    case 2:
      result->mutable_gradient_sums()->set_count(static_cast<int64_t>(random()));
      Draw(random, result->mutable_gradient_sums()->mutable_sum_dy());
      Draw(random, result->mutable_gradient_sums()->mutable_sum_dy_xmu());
      break;
    case 3:
      Draw(random, result->mutable_vector()->mutable_value());
      break;
    default:
      result->mutable_error()->set_code(static_cast<int>(1 + random() % 16));
      result->mutable_error()->set_message("why");
      result->set_refused(random() % 2 == 0);
  }
  Draw(random, result->mutable_missing_ranks());
  result->set_digest(static_cast<uint64_t>(random()) << (random() % 33));
}

absl::StatusOr<session::ServerFrame> Decode(absl::string_view bytes) {
  VectorPool none(0);
  return DecodeFrame({bytes}, &none);
}

// Has protobuf read the bytes: it ignores a field that it does not know, and nothing else does.
absl::StatusOr<session::ServerFrame> DecodeByProtobuf(const std::string& bytes) {
  return Decode(bytes + std::string("\x78\x01", 2));
}

std::string Bits(const std::vector<double>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(double)};
}

void ExpectEqual(const session::Outcome& a, const session::Outcome& b) {
  EXPECT_TRUE(a.key == b.key);
  EXPECT_EQ(a.status, b.status);
  EXPECT_EQ(a.payload, b.payload);
  EXPECT_EQ(a.result.count, b.result.count);
  EXPECT_EQ(Bits(a.result.first), Bits(b.result.first));
  EXPECT_EQ(Bits(a.result.second), Bits(b.result.second));
  EXPECT_EQ(a.result.backward_required, b.result.backward_required);
  EXPECT_EQ(a.result.missing_ranks, b.result.missing_ranks);
  EXPECT_EQ(a.abstaining_ranks, b.abstaining_ranks);
  EXPECT_EQ(a.digest, b.digest);
  EXPECT_EQ(a.refused, b.refused);
}

void ExpectAsProtobuf(const std::string& bytes) {
  const auto frame = Decode(bytes), expected = DecodeByProtobuf(bytes);
  ASSERT_EQ(frame.ok(), expected.ok());
  if (!frame.ok()) return;
  ASSERT_EQ(frame->outcomes.size(), expected->outcomes.size());
  for (size_t i = 0; i < frame->outcomes.size(); ++i) ExpectEqual(frame->outcomes[i], expected->outcomes[i]);
  EXPECT_EQ(frame->membership.has_value(), expected->membership.has_value());
  EXPECT_EQ(frame->late_rounds.size(), expected->late_rounds.size());
}

std::string DrawFrame(std::mt19937& random) {
  v1::MasterFrame frame;
  for (uint32_t i = random() % 4; i > 0; --i) Draw(random, frame.add_results());
  if (random() % 8 == 0) frame.mutable_membership()->add_present_ranks(3);
  return frame.SerializeAsString();
}

TEST(DecodeFrameTest, ReadsWhatProtobufWould) {
  std::mt19937 random(1);
  for (int i = 0; i < 500; ++i) ExpectAsProtobuf(DrawFrame(random));
}

TEST(DecodeFrameTest, ReadsDamagedFramesAsProtobufWould) {
  std::mt19937 random(2);
  for (int i = 0; i < 20000; ++i) {
    std::string bytes = DrawFrame(random);
    if (bytes.empty()) continue;
    const size_t place = random() % std::min<size_t>(bytes.size(), random() % 2 == 0 ? 24 : bytes.size());
    switch (random() % 3) {
      case 0:
        bytes[place] = static_cast<char>(random());
        break;
      case 1:
        bytes.erase(place, 1);
        break;
      default:
        bytes.insert(place, 1 + random() % 3, static_cast<char>(random()));
    }
    // Damage to a length may take in the field that DecodeByProtobuf adds.
    v1::MasterFrame parsed;
    if (parsed.ParseFromString(bytes)) {
      ExpectAsProtobuf(bytes);
    } else {
      EXPECT_FALSE(Decode(bytes).ok());
    }
  }
}

TEST(DecodeFrameTest, PartsAreOneFrame) {
  std::mt19937 random(3);
  for (int i = 0; i < 100; ++i) {
    const std::string bytes = DrawFrame(random);
    const absl::string_view whole = bytes;
    const size_t cut = random() % (whole.size() + 1);
    VectorPool spare(10000);
    for (size_t size = 1; size < 40; size *= 2) spare.Keep(std::vector<double>(size, 7.0));
    const auto frame = DecodeFrame({whole.substr(0, cut), "", whole.substr(cut)}, &spare);
    const auto expected = Decode(whole);
    ASSERT_TRUE(frame.ok() && expected.ok());
    ASSERT_EQ(frame->outcomes.size(), expected->outcomes.size());
    for (size_t j = 0; j < frame->outcomes.size(); ++j) ExpectEqual(frame->outcomes[j], expected->outcomes[j]);
  }
}

TEST(DecodeFrameTest, ResultsTakeTheMemoryOfThoseBefore) {
  v1::MasterFrame message;
  v1::RoundResult* const result = message.add_results();
  result->mutable_key()->set_layer("bn");
  result->mutable_key()->set_phase(v1::PHASE_FORWARD);
  for (int i = 0; i < 100; ++i) result->mutable_moments()->add_mean(i);
  for (int i = 0; i < 80; ++i) result->mutable_moments()->add_var(-i);
  const std::string bytes = message.SerializeAsString();
  std::vector<double> first(100, 7.0), second(100, 7.0);
  const double* const memory = second.data();
  VectorPool spare(10000);
  spare.Keep(std::move(first));
  spare.Keep(std::move(second));
  auto frame = DecodeFrame({bytes}, &spare);
  ASSERT_TRUE(frame.ok());
  const RoundResult& read = frame->outcomes.at(0).result;
  ASSERT_EQ(read.mean().size(), 100u);
  ASSERT_EQ(read.var().size(), 80u);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(read.mean()[i], i);
  for (int i = 0; i < 80; ++i) EXPECT_EQ(read.var()[i], -i);
  EXPECT_EQ(read.mean().data(), memory);
}

}  // namespace
}  // namespace syncbn
