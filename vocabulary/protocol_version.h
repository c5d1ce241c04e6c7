// The version of the protocol that this tree speaks; the only one there is.

#ifndef SYNCBN_VOCABULARY_PROTOCOL_VERSION_H_
#define SYNCBN_VOCABULARY_PROTOCOL_VERSION_H_

#include <cstdint>

namespace syncbn {

inline constexpr uint32_t kProtocolVersion = 1;

}  // namespace syncbn

#endif  // SYNCBN_VOCABULARY_PROTOCOL_VERSION_H_
