#include "vocabulary/wire/read.h"

#include <cstddef>

#include "plumbing/utf8.h"
#include "plumbing/wire_reader.h"
#include "syncbn/v1/statistics.pb.h"

namespace syncbn::wire {

bool ReadRoundKey(absl::string_view bytes, RoundKey* key) {
  WireReader fields(bytes);
  uint64_t phase = 0;
  while (fields.NextInOrder()) {
    if (fields.number() == v1::RoundKey::kLayerFieldNumber && fields.type() == WireType::kBytes) {
      if (!IsUtf8(fields.bytes())) return false;
      key->layer.assign(fields.bytes().data(), fields.bytes().size());
    } else if (fields.number() == v1::RoundKey::kSequenceFieldNumber && fields.type() == WireType::kVarint) {
      key->sequence = fields.integer();
    } else if (fields.number() == v1::RoundKey::kPhaseFieldNumber && fields.type() == WireType::kVarint) {
      phase = fields.integer();
    } else {
      return false;
    }
  }
  if (!fields.well_formed() || phase == v1::PHASE_UNSPECIFIED || phase > v1::Phase_MAX) return false;
  key->phase = static_cast<Phase>(phase);
  return true;
}

bool ReadBackwardRole(uint64_t number, BackwardRole* role) {
  if (number > v1::BackwardRole_MAX) return false;
  if (number != v1::BACKWARD_ROLE_UNSPECIFIED) *role = static_cast<BackwardRole>(number);
  return true;
}

bool ReadNumbers(absl::string_view packed, std::vector<uint32_t>* numbers) {
  numbers->reserve(numbers->size() + packed.size());  // A number takes a byte or more.
  while (!packed.empty()) {
    uint64_t number = 0;
    if (!TakeVarint(&packed, &number)) return false;
    numbers->push_back(static_cast<uint32_t>(number));
  }
  return true;
}

}  // namespace syncbn::wire
