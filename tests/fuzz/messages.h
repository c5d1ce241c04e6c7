// Parts of frames that a script chooses: mostly such as an honest peer would send, and then ones that it would not.

#ifndef SYNCBN_TESTS_FUZZ_MESSAGES_H_
#define SYNCBN_TESTS_FUZZ_MESSAGES_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "google/protobuf/duration.pb.h"
#include "google/protobuf/repeated_field.h"
#include "google/rpc/status.pb.h"
#include "syncbn/v1/statistics.pb.h"
#include "tests/fuzz/script.h"

namespace syncbn::fuzz {

// The layers that most frames speak of.
struct KnownLayer {
  const char* name;
  uint32_t channels;
  v1::LayerKind kind;
};
inline constexpr KnownLayer kLayers[] = {
    {"a", 3, v1::LAYER_KIND_BATCH_NORM}, {"b", 1, v1::LAYER_KIND_BATCH_NORM}, {"s", 2, v1::LAYER_KIND_SUM}};

// Returns a layer's name: one of kLayers, or another, or none that a layer could have.
std::string MakeName(Script& script);
void MakeKey(Script& script, v1::RoundKey* key);
void MakeSpec(Script& script, v1::LayerSpec* spec);
void MakeDuration(Script& script, google::protobuf::Duration* duration);
void MakeConfig(Script& script, v1::GroupConfig* config);
void MakeRanks(Script& script, google::protobuf::RepeatedField<uint32_t>* ranks);
// Fills the vector with numbers: as many as the layer of this name has, or others.
void MakeVector(Script& script, const std::string& layer, google::protobuf::RepeatedField<double>* vector);
// Makes an error, with details or without.
void MakeStatus(Script& script, google::rpc::Status* status);

// Returns the bytes, of which the script may have changed, dropped or added some.
std::string Damage(Script& script, std::string bytes);

}  // namespace syncbn::fuzz

#endif  // SYNCBN_TESTS_FUZZ_MESSAGES_H_
