#include "vocabulary/wire/read.h"

#include <cstddef>
#include <string>

#include "absl/strings/string_view.h"
#include "plumbing/utf8.h"
#include "plumbing/wire_reader.h"
#include "syncbn/v1/statistics.pb.h"

namespace syncbn::wire {

bool ReadRoundKey(const BytePieces& bytes, RoundKey* key) {
  WireReader fields(bytes);
  uint64_t phase = 0;
  while (fields.NextInOrder()) {
    if (fields.number() == v1::RoundKey::kLayerFieldNumber && fields.type() == WireType::kBytes) {
      std::string copy;
      const absl::string_view name = fields.bytes().Join(&copy);
      if (!IsUtf8(name)) return false;
      key->layer.assign(name.data(), name.size());
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

bool ReadNumbers(const BytePieces& packed, std::vector<uint32_t>* numbers) {
  numbers->reserve(numbers->size() + packed.size());  // A number takes a byte or more.
  std::string copy;
  absl::string_view rest = packed.Join(&copy);
  while (!rest.empty()) {
    uint64_t number = 0;
    if (!TakeVarint(&rest, &number)) return false;
    numbers->push_back(static_cast<uint32_t>(number));
  }
  return true;
}

}  // namespace syncbn::wire
