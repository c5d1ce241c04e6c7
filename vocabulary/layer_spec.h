// The declarations of a group's workers: its layers and its configuration.

#ifndef SYNCBN_VOCABULARY_LAYER_SPEC_H_
#define SYNCBN_VOCABULARY_LAYER_SPEC_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "absl/time/time.h"
#include "vocabulary/enums.h"
#include "vocabulary/fields.h"

namespace syncbn {

// A layer as its workers must agree upon it. LayerSpec in statistics.proto documents the fields.
struct LayerSpec {
  std::string name;
  uint32_t channels = 0;
  LayerKind kind = LayerKind::kBatchNorm;
  double eps = 0.0;
  EpsMode eps_mode = EpsMode::kAdd;
  NumericPolicy numeric_policy = NumericPolicy::kRefuse;
  std::optional<double> momentum;  // For the master's running statistics; without one, they are the cumulative average.
  bool biased_running_variance = false;
};

// Every field of a LayerSpec. Conversion and comparison follow this table.
inline constexpr std::tuple kLayerSpecFields = {
    Field{"name", &LayerSpec::name},
    Field{"channels", &LayerSpec::channels},
    Field{"kind", &LayerSpec::kind},
    Field{"eps", &LayerSpec::eps},
    Field{"eps_mode", &LayerSpec::eps_mode},
    Field{"numeric_policy", &LayerSpec::numeric_policy},
    Field{"momentum", &LayerSpec::momentum, Agreement::kNotNeeded},
    Field{"biased_running_variance", &LayerSpec::biased_running_variance},
};

inline bool operator==(const LayerSpec& a, const LayerSpec& b) { return Equal(kLayerSpecFields, a, b); }
inline bool operator!=(const LayerSpec& a, const LayerSpec& b) { return !(a == b); }

// A group's configuration. GroupConfig in statistics.proto documents the fields.
struct GroupConfig {
  std::optional<absl::Duration> round_timeout;
  MissingPolicy missing_policy = MissingPolicy::kFail;
  uint32_t min_workers = 0;
  std::optional<absl::Duration> rejoin_grace;
};

// Every field of a GroupConfig.
inline constexpr std::tuple kGroupConfigFields = {
    Field{"missing_policy", &GroupConfig::missing_policy},
    Field{"min_workers", &GroupConfig::min_workers},
    Field{"round_timeout", &GroupConfig::round_timeout},
    Field{"rejoin_grace", &GroupConfig::rejoin_grace},
};

namespace internal {

// A struct with a field more or less does not compile here, and one whose table lacks a field not below.
inline auto TieFields(const LayerSpec& spec) {
  const auto& [name, channels, kind, eps, eps_mode, numeric_policy, momentum, biased_running_variance] = spec;
  return std::tie(name, channels, kind, eps, eps_mode, numeric_policy, momentum, biased_running_variance);
}
inline auto TieFields(const GroupConfig& config) {
  const auto& [round_timeout, missing_policy, min_workers, rejoin_grace] = config;
  return std::tie(round_timeout, missing_policy, min_workers, rejoin_grace);
}
template <typename Struct>
inline constexpr size_t kFieldCount = std::tuple_size_v<decltype(TieFields(std::declval<const Struct&>()))>;

static_assert(std::tuple_size_v<decltype(kLayerSpecFields)> == kFieldCount<LayerSpec>, "a field is not in the table");
static_assert(std::tuple_size_v<decltype(kGroupConfigFields)> == kFieldCount<GroupConfig>,
              "a field is not in the table");

}  // namespace internal

}  // namespace syncbn

#endif  // SYNCBN_VOCABULARY_LAYER_SPEC_H_
