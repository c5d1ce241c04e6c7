#include "client/cc/contribution.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "syncbn/v1/statistics.pb.h"

namespace syncbn {
namespace {

std::string Bytes(const Buffer& buffer) { return {buffer.data(), buffer.data() + buffer.size()}; }

// The same contribution, serialized by protobuf.
std::string Serialized(const RoundKey& key, const Payload& payload) {
  v1::WorkerFrame frame;
  v1::Contribution* const out = frame.add_contributions();
  out->mutable_key()->set_layer(key.layer);
  out->mutable_key()->set_sequence(key.sequence);
  out->mutable_key()->set_phase(static_cast<v1::Phase>(key.phase));
  const auto assign = [](absl::Span<const double> from, auto* to) { to->Add(from.begin(), from.end()); };
  switch (key.phase) {
    case Phase::kBackward:
      assign(payload.first, out->mutable_gradient_sums()->mutable_sum_dy());
      assign(payload.second, out->mutable_gradient_sums()->mutable_sum_dy_xmu());
      break;
    case Phase::kSum:
      assign(payload.first, out->mutable_vector()->mutable_value());
      break;
    default:
      out->mutable_moments()->set_count(payload.count);
      assign(payload.first, out->mutable_moments()->mutable_mean());
      assign(payload.second, out->mutable_moments()->mutable_m2());
      out->mutable_moments()->set_backward_role(static_cast<v1::BackwardRole>(payload.backward_role));
  }
  return frame.SerializeAsString();
}

// Lengths on both sides of where a length takes another byte.
class EncodeTest : public ::testing::TestWithParam<size_t> {};

TEST_P(EncodeTest, WritesWhatProtobufWould) {
  std::vector<double> first(GetParam()), second(GetParam());
  for (size_t i = 0; i < first.size(); ++i) {
    first[i] = 1.0 / static_cast<double>(i + 1);
    second[i] = -3.5 * static_cast<double>(i);
  }
  for (const std::string& layer : {std::string("bn"), std::string(200, 'x')}) {
    for (const uint64_t sequence : {uint64_t{0}, uint64_t{127}, uint64_t{1} << 40}) {
      const RoundKey forward = {layer, sequence, Phase::kForward};
      for (const int64_t count : {int64_t{-1}, int64_t{0}, int64_t{1}, int64_t{128}, int64_t{1} << 40}) {
        for (const auto role : {BackwardRole::kRequired, BackwardRole::kNone}) {
          const Payload moments = {count, role, first, second};
          EXPECT_EQ(Bytes(EncodeContribution(forward, moments)), Serialized(forward, moments)) << "count " << count;
        }
      }
      const Payload sums = {0, BackwardRole::kNone, first, second}, vector = {0, BackwardRole::kNone, first, {}};
      const RoundKey backward = {layer, sequence, Phase::kBackward}, sum = {layer, sequence, Phase::kSum};
      EXPECT_EQ(Bytes(EncodeContribution(backward, sums)), Serialized(backward, sums));
      EXPECT_EQ(Bytes(EncodeContribution(sum, vector)), Serialized(sum, vector));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Lengths, EncodeTest, ::testing::Values(0, 1, 7, 8, 15, 16, 64, 1023, 2047, 2048, 5000));

TEST(EncodeBlockedOnTest, ABlockIsWrittenAsProtobufWould) {
  for (const std::string& layer : {std::string("bn"), std::string(200, 'x')}) {
    for (const uint64_t sequence : {uint64_t{0}, uint64_t{127}, uint64_t{1} << 40}) {
      v1::WorkerFrame frame;
      frame.add_blocked_on()->set_layer(layer);
      frame.mutable_blocked_on(0)->set_sequence(sequence);
      frame.mutable_blocked_on(0)->set_phase(v1::PHASE_BACKWARD);
      EXPECT_EQ(Bytes(EncodeBlockedOn({layer, sequence, Phase::kBackward})), frame.SerializeAsString());
    }
  }
}

}  // namespace
}  // namespace syncbn
