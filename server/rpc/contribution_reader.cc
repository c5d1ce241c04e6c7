#include "server/rpc/contribution_reader.h"

#include <cstdint>
#include <utility>

#include "plumbing/wire_reader.h"
#include "syncbn/v1/statistics.pb.h"
#include "vocabulary/wire/read.h"

namespace syncbn::rpc {
namespace {

using google::protobuf::Arena;

// The fields of a payload that a contribution has; 0 for what a phase has not.
struct PayloadFields {
  uint32_t payload;
  uint32_t first;
  uint32_t second;
};

PayloadFields FieldsOf(core::Phase phase) {
  switch (phase) {
    case core::Phase::kForward:
      return {v1::Contribution::kMomentsFieldNumber, v1::Moments::kMeanFieldNumber, v1::Moments::kM2FieldNumber};
    case core::Phase::kBackward:
      return {v1::Contribution::kGradientSumsFieldNumber, v1::GradientSums::kSumDyFieldNumber,
              v1::GradientSums::kSumDyXmuFieldNumber};
    case core::Phase::kSum:
      return {v1::Contribution::kVectorFieldNumber, v1::Vector::kValueFieldNumber, 0};
  }
  return {};
}

absl::Span<const double> CopyVector(const BytePieces& packed, Arena* arena) {
  const size_t size = packed.size() / sizeof(double);
  auto* const values = Arena::CreateArray<double>(arena, size);
  wire::CopyDoubles(packed, values);
  return {values, size};
}

bool ReadPayload(const BytePieces& bytes, const PayloadFields& numbers, Arena* arena, core::Contribution* read) {
  const bool moments = numbers.payload == v1::Contribution::kMomentsFieldNumber;
  WireReader fields(bytes);
  while (fields.NextInOrder()) {
    const uint32_t number = fields.number();
    const bool vector = fields.type() == WireType::kBytes && wire::AreDoubles(fields.bytes());
    const bool integer = moments && fields.type() == WireType::kVarint;
    if (vector && number == numbers.first) {
      read->first = CopyVector(fields.bytes(), arena);
    } else if (vector && number == numbers.second) {
      read->second = CopyVector(fields.bytes(), arena);
    } else if (integer && number == v1::Moments::kCountFieldNumber) {
      read->count = static_cast<int64_t>(fields.integer());
    } else if (!integer || number != v1::Moments::kBackwardRoleFieldNumber ||
               !wire::ReadBackwardRole(fields.integer(), &read->backward_role)) {
      return false;
    }
  }
  return fields.well_formed();
}

}  // namespace

bool ReadContribution(const BytePieces& bytes, Arena* arena, core::Contribution* contribution) {
  WireReader fields(bytes);
  core::Contribution read;
  const bool has_key = fields.NextInOrder() && fields.number() == v1::Contribution::kKeyFieldNumber &&
                       fields.type() == WireType::kBytes && wire::ReadRoundKey(fields.bytes(), &read.key);
  if (!has_key) return false;
  const PayloadFields numbers = FieldsOf(read.key.phase);
  const bool has_payload = fields.NextInOrder() && fields.number() == numbers.payload &&
                           fields.type() == WireType::kBytes && ReadPayload(fields.bytes(), numbers, arena, &read);
  if (!has_payload || fields.Next() || !fields.well_formed()) return false;
  *contribution = std::move(read);
  return true;
}

}  // namespace syncbn::rpc
