#include "client/cc/contribution.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace syncbn {
namespace {

std::string Bytes(const grpc::Slice& slice) { return {slice.begin(), slice.end()}; }

OutgoingContribution To(const std::string& layer, uint64_t sequence, v1::Phase phase) {
  OutgoingContribution contribution;
  contribution.key.set_layer(layer);
  contribution.key.set_sequence(sequence);
  contribution.key.set_phase(phase);
  return contribution;
}

// Returns protobuf's encoding of the same contribution.
std::string Serialized(const OutgoingContribution& contribution) {
  v1::WorkerFrame frame;
  v1::Contribution* const out = frame.add_contributions();
  *out->mutable_key() = contribution.key;
  const auto assign = [](absl::Span<const double> from, auto* to) { to->Add(from.begin(), from.end()); };
  switch (contribution.key.phase()) {
    case v1::PHASE_BACKWARD:
      assign(contribution.first, out->mutable_gradient_sums()->mutable_sum_dy());
      assign(contribution.second, out->mutable_gradient_sums()->mutable_sum_dy_xmu());
      break;
    case v1::PHASE_SUM:
      assign(contribution.first, out->mutable_vector()->mutable_value());
      break;
    default:
      out->mutable_moments()->set_count(contribution.count);
      assign(contribution.first, out->mutable_moments()->mutable_mean());
      assign(contribution.second, out->mutable_moments()->mutable_m2());
      out->mutable_moments()->set_backward_role(contribution.backward_role);
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
      OutgoingContribution forward = To(layer, sequence, v1::PHASE_FORWARD);
      forward.first = first;
      forward.second = second;
      for (const int64_t count : {int64_t{-1}, int64_t{0}, int64_t{1}, int64_t{128}, int64_t{1} << 40}) {
        for (const auto role : {v1::BACKWARD_ROLE_UNSPECIFIED, v1::BACKWARD_ROLE_NONE}) {
          forward.count = count;
          forward.backward_role = role;
          EXPECT_EQ(Bytes(Encode(forward)), Serialized(forward)) << "count " << count << ", role " << role;
        }
      }
      OutgoingContribution backward = To(layer, sequence, v1::PHASE_BACKWARD);
      backward.first = first;
      backward.second = second;
      EXPECT_EQ(Bytes(Encode(backward)), Serialized(backward));
      OutgoingContribution sum = To(layer, sequence, v1::PHASE_SUM);
      sum.first = first;
      EXPECT_EQ(Bytes(Encode(sum)), Serialized(sum));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Lengths, EncodeTest, ::testing::Values(0, 1, 7, 8, 15, 16, 64, 1023, 2047, 2048, 5000));

}  // namespace
}  // namespace syncbn
