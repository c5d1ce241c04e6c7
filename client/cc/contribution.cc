#include "client/cc/contribution.h"

#include <cstddef>
#include <cstring>

#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/wire_format_lite.h"
#include "grpc/slice.h"

namespace syncbn {
namespace {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedOutputStream;

// The wire has doubles as the memory of all machines that this is built for has them.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

// All of the protocol's numbers of fields here are below 16.
constexpr size_t kTagBytes = 1;

// The payload of a phase: a field of the contribution, whose message has one or two vectors.
struct PayloadFields {
  int payload;
  int first;
  int second;
};

PayloadFields FieldsOf(v1::Phase phase) {
  switch (phase) {
    case v1::PHASE_BACKWARD:
      return {v1::Contribution::kGradientSumsFieldNumber, v1::GradientSums::kSumDyFieldNumber,
              v1::GradientSums::kSumDyXmuFieldNumber};
    case v1::PHASE_SUM:
      return {v1::Contribution::kVectorFieldNumber, v1::Vector::kValueFieldNumber, 0};
    default:
      return {v1::Contribution::kMomentsFieldNumber, v1::Moments::kMeanFieldNumber, v1::Moments::kM2FieldNumber};
  }
}

size_t VarintBytes(size_t value) { return CodedOutputStream::VarintSize64(value); }
// Of a field whose value has a length in front.
size_t FieldBytes(size_t length) { return kTagBytes + VarintBytes(length) + length; }
// Absent if it is empty.
size_t VectorBytes(absl::Span<const double> vector) {
  return vector.empty() ? 0 : FieldBytes(vector.size() * sizeof(double));
}

uint8_t* WriteHead(int field, size_t length, uint8_t* to) {
  to = WireFormatLite::WriteTagToArray(field, WireFormatLite::WIRETYPE_LENGTH_DELIMITED, to);
  return CodedOutputStream::WriteVarint64ToArray(length, to);
}

uint8_t* WriteVector(int field, absl::Span<const double> vector, uint8_t* to) {
  if (vector.empty()) return to;
  const size_t bytes = vector.size() * sizeof(double);
  to = WriteHead(field, bytes, to);
  std::memcpy(to, vector.data(), bytes);
  return to + bytes;
}

}  // namespace

grpc::Slice Encode(const OutgoingContribution& contribution) {
  const PayloadFields fields = FieldsOf(contribution.key.phase());
  const size_t count_bytes = contribution.count == 0 ? 0 : kTagBytes + WireFormatLite::Int64Size(contribution.count);
  const size_t role_bytes =
      contribution.backward_role == 0 ? 0 : kTagBytes + WireFormatLite::EnumSize(contribution.backward_role);
  const size_t key_bytes = contribution.key.ByteSizeLong();
  const size_t payload_bytes =
      count_bytes + VectorBytes(contribution.first) + VectorBytes(contribution.second) + role_bytes;
  const size_t contribution_bytes = FieldBytes(key_bytes) + FieldBytes(payload_bytes);

  const grpc::Slice slice(grpc_slice_malloc(FieldBytes(contribution_bytes)), grpc::Slice::STEAL_REF);
  uint8_t* to = const_cast<uint8_t*>(slice.begin());
  to = WriteHead(v1::WorkerFrame::kContributionsFieldNumber, contribution_bytes, to);
  to = WriteHead(v1::Contribution::kKeyFieldNumber, key_bytes, to);
  to = contribution.key.SerializeWithCachedSizesToArray(to);
  to = WriteHead(fields.payload, payload_bytes, to);
  if (count_bytes != 0) to = WireFormatLite::WriteInt64ToArray(v1::Moments::kCountFieldNumber, contribution.count, to);
  to = WriteVector(fields.first, contribution.first, to);
  to = WriteVector(fields.second, contribution.second, to);
  if (role_bytes != 0) {
    WireFormatLite::WriteEnumToArray(v1::Moments::kBackwardRoleFieldNumber, contribution.backward_role, to);
  }
  return slice;
}

}  // namespace syncbn
