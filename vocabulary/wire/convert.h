// Conversion between the vocabulary and the messages of syncbn.v1.

#ifndef SYNCBN_VOCABULARY_WIRE_CONVERT_H_
#define SYNCBN_VOCABULARY_WIRE_CONVERT_H_

#include "absl/status/status.h"
#include "syncbn/v1/statistics.pb.h"
#include "vocabulary/layer_spec.h"
#include "vocabulary/round_key.h"

namespace syncbn::wire {

// The numbers are the same: convert.cc asserts it.
inline v1::Phase ToProto(Phase phase) { return static_cast<v1::Phase>(phase); }
inline v1::BackwardRole ToProto(BackwardRole role) { return static_cast<v1::BackwardRole>(role); }

inline void ToProto(const RoundKey& key, v1::RoundKey* message) {
  message->set_layer(key.layer);
  message->set_sequence(key.sequence);
  message->set_phase(ToProto(key.phase));
}

// Both write to an empty message, every field of the table.
void ToProto(const LayerSpec& spec, v1::LayerSpec* message);
void ToProto(const GroupConfig& config, v1::GroupConfig* message);

// Read from a message. An enum of 0 stands for the default, but for the kind of a layer, which must be given.
// Errors: INVALID_ARGUMENT, naming field and value, for an enum's value that is not known.
absl::Status FromProto(v1::BackwardRole number, BackwardRole* role);
absl::Status FromProto(const v1::LayerSpec& message, LayerSpec* spec);
absl::Status FromProto(const v1::GroupConfig& message, GroupConfig* config);

}  // namespace syncbn::wire

#endif  // SYNCBN_VOCABULARY_WIRE_CONVERT_H_
