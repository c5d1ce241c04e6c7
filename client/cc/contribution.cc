#include "client/cc/contribution.h"

#include <cstddef>
#include <cstring>

#include "google/protobuf/io/coded_stream.h"
#include "plumbing/check.h"
#include "syncbn/v1/statistics.pb.h"

namespace syncbn {
namespace {

using google::protobuf::io::CodedOutputStream;

// The wire has doubles as the memory of all machines that this is built for has them.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

// A field's tag takes one byte: all field numbers of these messages are below 16.
constexpr size_t kTagBytes = 1;

// A field's type in its tag.
enum WireType { kVarint = 0, kLengthDelimited = 2 };

// The payload of a phase: a field of the contribution, whose message has one or two vectors.
struct PayloadFields {
  int payload;
  int first;
  int second;
};

PayloadFields FieldsOf(Phase phase) {
  switch (phase) {
    case Phase::kBackward:
      return {v1::Contribution::kGradientSumsFieldNumber, v1::GradientSums::kSumDyFieldNumber,
              v1::GradientSums::kSumDyXmuFieldNumber};
    case Phase::kSum:
      return {v1::Contribution::kVectorFieldNumber, v1::Vector::kValueFieldNumber, 0};
    default:
      return {v1::Contribution::kMomentsFieldNumber, v1::Moments::kMeanFieldNumber, v1::Moments::kM2FieldNumber};
  }
}

// Returns the bytes of a field with a length in front.
size_t DelimitedBytes(size_t length) { return kTagBytes + CodedOutputStream::VarintSize64(length) + length; }
// Returns the bytes of a number's field, which is absent if the number is 0, and of a vector's, which is absent if it
// is empty.
size_t VarintBytes(uint64_t value) { return value == 0 ? 0 : kTagBytes + CodedOutputStream::VarintSize64(value); }
size_t VectorBytes(absl::Span<const double> vector) {
  return vector.empty() ? 0 : DelimitedBytes(vector.size() * sizeof(double));
}

uint8_t* WriteTag(int field, WireType type, uint8_t* to) {
  *to = static_cast<uint8_t>(field << 3 | type);
  return to + kTagBytes;
}

uint8_t* WriteVarint(int field, uint64_t value, uint8_t* to) {
  if (value == 0) return to;
  return CodedOutputStream::WriteVarint64ToArray(value, WriteTag(field, kVarint, to));
}

uint8_t* WriteHead(int field, size_t length, uint8_t* to) {
  return CodedOutputStream::WriteVarint64ToArray(length, WriteTag(field, kLengthDelimited, to));
}

uint8_t* WriteBytes(int field, const void* from, size_t bytes, uint8_t* to) {
  if (bytes == 0) return to;
  to = WriteHead(field, bytes, to);
  std::memcpy(to, from, bytes);
  return to + bytes;
}

uint8_t* WriteVector(int field, absl::Span<const double> vector, uint8_t* to) {
  return WriteBytes(field, vector.data(), vector.size() * sizeof(double), to);
}

uint64_t NumberOf(Phase phase) { return static_cast<uint64_t>(phase); }

size_t KeyBytes(const RoundKey& key) {
  const size_t layer_bytes = key.layer.empty() ? 0 : DelimitedBytes(key.layer.size());
  return layer_bytes + VarintBytes(key.sequence) + VarintBytes(NumberOf(key.phase));
}

// Writes a v1::RoundKey, which takes KeyBytes.
uint8_t* WriteKey(const RoundKey& key, uint8_t* to) {
  to = WriteBytes(v1::RoundKey::kLayerFieldNumber, key.layer.data(), key.layer.size(), to);
  to = WriteVarint(v1::RoundKey::kSequenceFieldNumber, key.sequence, to);
  return WriteVarint(v1::RoundKey::kPhaseFieldNumber, NumberOf(key.phase), to);
}

}  // namespace

Buffer EncodeContribution(const RoundKey& key, const Payload& payload) {
  const PayloadFields fields = FieldsOf(key.phase);
  const bool forward = key.phase == Phase::kForward;
  const uint64_t count = forward ? static_cast<uint64_t>(payload.count) : 0;
  const uint64_t role = forward ? static_cast<uint64_t>(payload.backward_role) : 0;
  const size_t key_bytes = KeyBytes(key);
  const size_t payload_bytes =
      VarintBytes(count) + VectorBytes(payload.first) + VectorBytes(payload.second) + VarintBytes(role);
  const size_t contribution_bytes = DelimitedBytes(key_bytes) + DelimitedBytes(payload_bytes);

  Buffer buffer(DelimitedBytes(contribution_bytes));
  uint8_t* to = buffer.data();
  to = WriteHead(v1::WorkerFrame::kContributionsFieldNumber, contribution_bytes, to);
  to = WriteHead(v1::Contribution::kKeyFieldNumber, key_bytes, to);
  to = WriteKey(key, to);
  to = WriteHead(fields.payload, payload_bytes, to);
  to = WriteVarint(v1::Moments::kCountFieldNumber, count, to);
  to = WriteVector(fields.first, payload.first, to);
  to = WriteVector(fields.second, payload.second, to);
  to = WriteVarint(v1::Moments::kBackwardRoleFieldNumber, role, to);
  SYNCBN_CHECK(to == buffer.data() + buffer.size());
  return buffer;
}

Buffer EncodeBlockedOn(const RoundKey& key) {
  const size_t key_bytes = KeyBytes(key);
  Buffer buffer(DelimitedBytes(key_bytes));
  uint8_t* const to = WriteHead(v1::WorkerFrame::kBlockedOnFieldNumber, key_bytes, buffer.data());
  SYNCBN_CHECK(WriteKey(key, to) == buffer.data() + buffer.size());
  return buffer;
}

}  // namespace syncbn
