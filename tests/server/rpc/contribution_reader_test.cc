// Contributions that are read without protobuf, against what protobuf makes of the same bytes.

#include "server/rpc/contribution_reader.h"

#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "server/rpc/convert.h"
#include "syncbn/v1/statistics.pb.h"

namespace syncbn::rpc {
namespace {

using google::protobuf::Arena;

std::vector<double> Doubles(std::mt19937& random, size_t size) {
  std::vector<double> values(size);
  for (double& value : values) {
    const uint64_t bits = static_cast<uint64_t>(random()) << 32 | random();
    std::memcpy(&value, &bits, sizeof(value));
  }
  return values;
}

void Assign(const std::vector<double>& from, google::protobuf::RepeatedField<double>* to) {
  to->Add(from.begin(), from.end());
}

v1::Contribution Draw(std::mt19937& random) {
  const std::string names[] = {"bn1", "layer4.1.bn2.with.a.long.name", "schicht-\xc3\xa4", ""};
  const uint64_t numbers[] = {0, 1, 127, 128, uint64_t{1} << 40, std::numeric_limits<uint64_t>::max()};
  const size_t sizes[] = {0, 1, 15, 16, 300};
  v1::Contribution contribution;
  contribution.mutable_key()->set_layer(names[random() % 4]);
  contribution.mutable_key()->set_sequence(numbers[random() % 6]);
  contribution.mutable_key()->set_phase(static_cast<v1::Phase>(1 + random() % 3));
  const std::vector<double> first = Doubles(random, sizes[random() % 5]), second = Doubles(random, sizes[random() % 5]);
  switch (contribution.key().phase()) {
    case v1::PHASE_FORWARD:
      contribution.mutable_moments()->set_count(static_cast<int64_t>(numbers[random() % 6]));
      contribution.mutable_moments()->set_backward_role(static_cast<v1::BackwardRole>(random() % 4));
      Assign(first, contribution.mutable_moments()->mutable_mean());
      Assign(second, contribution.mutable_moments()->mutable_m2());
      break;
    case v1::PHASE_BACKWARD:
      Assign(first, contribution.mutable_gradient_sums()->mutable_sum_dy());
      Assign(second, contribution.mutable_gradient_sums()->mutable_sum_dy_xmu());
      break;
    default:
      Assign(first, contribution.mutable_vector()->mutable_value());
  }
  return contribution;
}

std::string Bytes(absl::Span<const double> values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(double)};
}

void ExpectEqual(const core::Contribution& a, const core::Contribution& b) {
  EXPECT_TRUE(a.key == b.key);
  EXPECT_EQ(a.count, b.count);
  EXPECT_EQ(a.backward_role, b.backward_role);
  EXPECT_EQ(Bytes(a.first), Bytes(b.first));
  EXPECT_EQ(Bytes(a.second), Bytes(b.second));
}

// Expects what protobuf reads from the bytes, if they are read at all. Returns whether they are. The bytes are in
// three pieces.
bool ReadAsProtobuf(const std::string& bytes, size_t cut = 0, size_t second_cut = 0) {
  const absl::string_view all = bytes;
  const absl::string_view pieces[] = {all.substr(0, cut), all.substr(cut, second_cut - cut), all.substr(second_cut)};
  Arena arena;
  core::Contribution read;
  if (!ReadContribution(BytePieces(pieces), &arena, &read)) {
    EXPECT_TRUE(read.key == core::RoundKey() && read.first.empty()) << "changed, though it is not read";
    return false;
  }
  v1::Contribution parsed;
  core::Contribution expected;
  EXPECT_TRUE(parsed.ParseFromString(bytes));
  EXPECT_FALSE(FromProto(parsed, &expected).has_value());
  ExpectEqual(read, expected);
  return true;
}

TEST(ContributionReaderTest, ReadsWhatSerializersWrite) {
  std::mt19937 random(1);
  for (int i = 0; i < 300; ++i) {
    const v1::Contribution contribution = Draw(random);
    EXPECT_TRUE(ReadAsProtobuf(contribution.SerializeAsString())) << contribution.ShortDebugString();
  }
}

TEST(ContributionReaderTest, ReadsThemWhereverTheyAreCut) {
  std::mt19937 random(3);
  for (int i = 0; i < 100; ++i) {
    const std::string bytes = Draw(random).SerializeAsString();
    for (size_t cut = 0; cut <= bytes.size(); cut += 1 + random() % 8) {
      const size_t second = cut + random() % (bytes.size() - cut + 1);
      ASSERT_TRUE(ReadAsProtobuf(bytes, cut, second)) << cut << " " << second;
    }
  }
}

TEST(ContributionReaderTest, AgreesWithProtobufOnDamagedBytes) {
  std::mt19937 random(2);
  int read = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string bytes = Draw(random).SerializeAsString();
    // Damage mostly to the beginning, where the structure is.
    const size_t place = random() % std::min<size_t>(bytes.size(), random() % 2 == 0 ? 24 : bytes.size());
    switch (random() % 4) {
      case 0:
        bytes[place] = static_cast<char>(random());
        break;
      case 1:
        bytes.resize(place);
        break;
      case 2:
        bytes.insert(place, 1 + random() % 3, static_cast<char>(random()));
        break;
      default:
        bytes += Draw(random).SerializeAsString();
    }
    const size_t cut = random() % (bytes.size() + 1);
    read += ReadAsProtobuf(bytes, cut, cut) ? 1 : 0;
  }
  EXPECT_GT(read, 100) << "damage within numbers does not show";
  EXPECT_LT(read, 10000);
}

// Input that protobuf reads in another way than it stands there, or refuses.
TEST(ContributionReaderTest, LeavesOtherFormsToProtobuf) {
  v1::Contribution whole;
  whole.mutable_key()->set_layer("bn");
  whole.mutable_key()->set_phase(v1::PHASE_FORWARD);
  whole.mutable_moments()->add_mean(1.0);
  whole.mutable_moments()->add_m2(2.0);
  ASSERT_TRUE(ReadAsProtobuf(whole.SerializeAsString()));
  v1::Contribution key = whole, moments = whole;
  key.clear_moments();
  moments.clear_key();
  EXPECT_FALSE(ReadAsProtobuf(moments.SerializeAsString() + key.SerializeAsString())) << "out of order";
  EXPECT_FALSE(ReadAsProtobuf(whole.SerializeAsString() + moments.SerializeAsString())) << "merged";
  EXPECT_FALSE(ReadAsProtobuf(whole.SerializeAsString() + std::string("\x78\x01", 2))) << "an unknown field";
  EXPECT_FALSE(ReadAsProtobuf(key.SerializeAsString())) << "no payload";
  EXPECT_FALSE(ReadAsProtobuf(""));
  v1::Contribution other = whole;
  other.mutable_key()->set_phase(v1::PHASE_SUM);
  EXPECT_FALSE(ReadAsProtobuf(other.SerializeAsString())) << "the payload of another phase";
  other.mutable_key()->set_phase(static_cast<v1::Phase>(4));
  EXPECT_FALSE(ReadAsProtobuf(other.SerializeAsString())) << "an unknown phase";
  other = whole;
  other.mutable_moments()->set_backward_role(static_cast<v1::BackwardRole>(4));
  EXPECT_FALSE(ReadAsProtobuf(other.SerializeAsString())) << "an unknown role";
  std::string bytes = whole.SerializeAsString();
  bytes[bytes.find("bn")] = '\xff';
  EXPECT_FALSE(ReadAsProtobuf(bytes)) << "a name that is not UTF-8";
}

}  // namespace
}  // namespace syncbn::rpc
