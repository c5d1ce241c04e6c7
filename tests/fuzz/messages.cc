#include "tests/fuzz/messages.h"

#include <iterator>

#include "google/protobuf/stubs/logging.h"
#include "google/rpc/error_details.pb.h"

namespace syncbn::fuzz {
namespace {

// Protobuf would log each text that is no UTF-8.
[[maybe_unused]] const auto quiet = google::protobuf::SetLogHandler(nullptr);

}  // namespace

std::string MakeName(Script& script) {
  const size_t kind = script.Choose(16);
  if (kind < 13) return kLayers[kind % std::size(kLayers)].name;
  if (kind == 13) return std::string(script.Choose(2) == 0 ? 255 : 256, 'x');
  if (kind == 14) return std::string("l") + std::to_string(script.Choose(16));
  return script.Bytes(16);
}

void MakeKey(Script& script, v1::RoundKey* key) {
  key->set_layer(MakeName(script));
  key->set_sequence(script.Number());
  const bool sum = key->layer() == "s";
  const size_t kind = script.Choose(16);
  if (kind == 15) {
    key->set_phase(static_cast<v1::Phase>(script.Number()));
  } else {
    key->set_phase(sum ? v1::PHASE_SUM : kind < 8 ? v1::PHASE_FORWARD : v1::PHASE_BACKWARD);
  }
}

void MakeSpec(Script& script, v1::LayerSpec* spec) {
  const KnownLayer& known = kLayers[script.Choose(std::size(kLayers))];
  spec->set_name(known.name);
  spec->set_channels(known.channels);
  spec->set_kind(known.kind);
  if (script.Choose(2) == 0) return;
  spec->set_momentum(script.Double());
  spec->set_numeric_policy(static_cast<v1::NumericPolicy>(script.Choose(4)));
  spec->set_biased_running_variance(script.OneIn(2));
  if (script.Choose(4) != 0) return;
  spec->set_name(MakeName(script));
  spec->set_channels(static_cast<uint32_t>(script.Number()));
  spec->set_kind(static_cast<v1::LayerKind>(script.Choose(4)));
  spec->set_eps(script.Double());
  spec->set_eps_mode(static_cast<v1::EpsMode>(script.Choose(4)));
}

void MakeDuration(Script& script, google::protobuf::Duration* duration) {
  duration->set_seconds(static_cast<int64_t>(script.Number()));
  duration->set_nanos(static_cast<int32_t>(script.Number()));
}

void MakeConfig(Script& script, v1::GroupConfig* config) {
  const uint8_t kinds = script.Byte();
  if (kinds & 1) MakeDuration(script, config->mutable_round_timeout());
  if (kinds & 2) MakeDuration(script, config->mutable_rejoin_grace());
  if (kinds & 4) config->set_missing_policy(static_cast<v1::MissingPolicy>(script.Choose(4)));
  if (kinds & 8) config->set_min_workers(static_cast<uint32_t>(script.Number()));
}

void MakeRanks(Script& script, google::protobuf::RepeatedField<uint32_t>* ranks) {
  const size_t count = script.Choose(8);
  for (size_t i = 4; i < count; ++i) ranks->Add(static_cast<uint32_t>(script.Number()));
}

void MakeVector(Script& script, const std::string& layer, google::protobuf::RepeatedField<double>* vector) {
  size_t length = 0;
  for (const KnownLayer& known : kLayers) {
    if (layer == known.name) length = known.channels;
  }
  if (script.OneIn(16)) length = script.Choose(8);
  for (size_t i = 0; i < length; ++i) vector->Add(script.Double());
}

void MakeStatus(Script& script, google::rpc::Status* status) {
  constexpr const char* kReasons[] = {
      "ROUND_TIMEOUT", "WORKER_LOST", "SHUTTING_DOWN", "RANK_TAKEN", "LIMIT_EXCEEDED", "FENCED", "", "NOT_A_REASON"};
  status->set_code(static_cast<int32_t>(script.Number()));
  if (script.OneIn(4)) status->set_message(script.Bytes(64));
  if (script.Choose(2) == 0) return;
  google::rpc::ErrorInfo info;
  info.set_domain(script.OneIn(8) ? "another" : "syncbn");
  info.set_reason(kReasons[script.Choose(std::size(kReasons))]);
  const uint8_t kinds = script.Byte();
  if (kinds & 1) (*info.mutable_metadata())["ranks"] = script.OneIn(2) ? "0,1,2" : script.Bytes(32);
  if (kinds & 2) (*info.mutable_metadata())["layer"] = script.Bytes(32);
  if (kinds & 4) (*info.mutable_metadata())["limit"] = "max_groups";
  status->add_details()->PackFrom(info);
  if (kinds & 8) status->mutable_details(0)->set_value(script.Bytes(64));
}

std::string Damage(Script& script, std::string bytes) {
  switch (script.Choose(16)) {
    case 13:
      if (!bytes.empty()) bytes[script.Number() % bytes.size()] ^= static_cast<char>(1 << script.Choose(8));
      return bytes;
    case 14:
      return bytes.substr(0, script.Number() % (bytes.size() + 1));
    case 15:
      return bytes + script.Bytes(64);
    default:
      return bytes;
  }
}

}  // namespace syncbn::fuzz
