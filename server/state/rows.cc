#include "server/state/rows.h"

#include <cstring>
#include <vector>

#include "absl/base/config.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "plumbing/check.h"
#include "syncbn/v1/statistics.pb.h"
#include "vocabulary/wire/convert.h"

namespace syncbn::state {
namespace {

#ifndef ABSL_IS_LITTLE_ENDIAN
#error "vectors are stored as they lie in memory"
#endif

// More workers than any group can have.
constexpr uint64_t kMostWorkers = uint64_t{1} << 20;

// Adds fields to a checksum of 64 bits. Each step is a permutation of the sum, so that a change of one field, or of up
// to eight neighbouring bytes, always changes the result.
class Checksum {
 public:
  Checksum& Add(uint64_t word) {
    sum_ = (sum_ ^ word) * 0x9e3779b97f4a7c15u;
    sum_ ^= sum_ >> 32;
    return *this;
  }
  Checksum& Add(const std::optional<uint64_t>& word) { return Add(word.has_value() ? 1 : 0).Add(word.value_or(0)); }
  Checksum& Add(absl::string_view bytes) {
    Add(bytes.size());
    while (!bytes.empty()) {
      uint64_t word = 0;
      const size_t size = std::min(bytes.size(), sizeof(word));
      std::memcpy(&word, bytes.data(), size);
      Add(word);
      bytes.remove_prefix(size);
    }
    return *this;
  }
  uint64_t sum() const { return sum_; }

 private:
  uint64_t sum_ = 0x53796e63424e0001u;
};

// ---- Vectors --------------------------------------------------------------------------------------------------------

std::string FromDoubles(const std::vector<double>& numbers) {
  std::string bytes(numbers.size() * sizeof(double), '\0');
  if (!bytes.empty()) std::memcpy(bytes.data(), numbers.data(), bytes.size());
  return bytes;
}

std::vector<double> ToDoubles(absl::string_view bytes) {
  std::vector<double> numbers(bytes.size() / sizeof(double));
  if (!numbers.empty()) std::memcpy(numbers.data(), bytes.data(), numbers.size() * sizeof(double));
  return numbers;
}

// Sequences are stored as the differences from one to the next, modulo 2^64, each in groups of 7 bits, the lowest
// first: a byte for each of those that count up.
std::string FromSequences(const std::vector<uint64_t>& sequences) {
  std::string bytes;
  uint64_t last = 0;
  for (const uint64_t sequence : sequences) {
    uint64_t difference = sequence - last;
    last = sequence;
    for (; difference >= 0x80; difference >>= 7) bytes.push_back(static_cast<char>(difference | 0x80));
    bytes.push_back(static_cast<char>(difference));
  }
  return bytes;
}

// Returns nothing if the bytes are no sequences.
std::optional<std::vector<uint64_t>> ToSequences(absl::string_view bytes) {
  std::vector<uint64_t> sequences;
  uint64_t last = 0, difference = 0;
  int shift = 0;
  for (const char byte : bytes) {
    if (shift > 63) return std::nullopt;
    difference |= static_cast<uint64_t>(byte & 0x7f) << shift;
    shift += 7;
    if ((byte & 0x80) != 0) continue;
    last += difference;
    sequences.push_back(last);
    difference = 0;
    shift = 0;
  }
  if (shift != 0) return std::nullopt;
  return sequences;
}

}  // namespace

// ---- Checksums ------------------------------------------------------------------------------------------------------

uint64_t ChecksumOf(const GroupRow& row) {
  return Checksum()
      .Add(row.job)
      .Add(row.name)
      .Add(row.generation)
      .Add(row.run_id)
      .Add(row.world_size)
      .Add(row.config)
      .sum();
}

uint64_t ChecksumOf(const LayerRow& row) {
  return Checksum()
      .Add(row.job)
      .Add(row.group)
      .Add(row.name)
      .Add(row.spec)
      .Add(row.updates)
      .Add(row.newest_sequence)
      .Add(row.recent)
      .Add(row.missing_after)
      .Add(row.missing_before)
      .Add(row.mean)
      .Add(row.var)
      .sum();
}

// ---- Groups ---------------------------------------------------------------------------------------------------------

GroupRow ToRow(const core::GroupState& group) {
  v1::GroupConfig config;
  wire::ToProto(group.config, &config);
  GroupRow row;
  row.job = group.id.job;
  row.name = group.id.group;
  row.generation = group.generation;
  row.run_id = group.run_id;
  row.world_size = group.world_size;
  row.config = config.SerializeAsString();
  row.checksum = ChecksumOf(row);
  return row;
}

absl::StatusOr<core::GroupState> FromRow(const GroupRow& row) {
  const auto damaged = [&row](absl::string_view what) {
    return absl::DataLossError(absl::StrCat("group \"", row.name, "\" of job \"", row.job, "\": ", what));
  };
  if (row.checksum != ChecksumOf(row)) return damaged("its checksum is wrong");
  core::GroupState group;
  group.id = {row.job, row.name};
  group.generation = row.generation;
  group.run_id = row.run_id;
  v1::GroupConfig config;
  if (!config.ParseFromString(row.config) || !wire::FromProto(config, &group.config).ok()) {
    return damaged("its configuration cannot be read");
  }
  if (row.run_id == 0 || row.world_size == 0 || row.world_size > kMostWorkers ||
      !group.config.round_timeout.has_value() || !group.config.rejoin_grace.has_value()) {
    return damaged("it lacks its run, its workers or its deadlines");
  }
  group.world_size = static_cast<uint32_t>(row.world_size);
  return group;
}

// ---- Layers ---------------------------------------------------------------------------------------------------------

LayerRow ToRow(const core::GroupId& id, const core::LayerState& layer) {
  v1::LayerSpec spec;
  wire::ToProto(layer.spec, &spec);
  LayerRow row;
  row.job = id.job;
  row.group = id.group;
  row.name = layer.spec.name;
  row.spec = spec.SerializeAsString();
  row.updates = layer.updates;
  row.newest_sequence = layer.newest_sequence;
  row.recent = FromSequences(layer.recent);
  if (layer.missing.has_value()) {
    row.missing_after = layer.missing->after;
    row.missing_before = layer.missing->before;
  }
  row.mean = FromDoubles(layer.mean);
  row.var = FromDoubles(layer.var);
  row.checksum = ChecksumOf(row);
  return row;
}

absl::StatusOr<core::LayerState> FromRow(const LayerRow& row) {
  const auto damaged = [&row](absl::string_view what) {
    return absl::DataLossError(
        absl::StrCat("layer \"", row.name, "\" of group \"", row.group, "\" of job \"", row.job, "\": ", what));
  };
  if (row.checksum != ChecksumOf(row)) return damaged("its checksum is wrong");
  core::LayerState layer;
  v1::LayerSpec spec;
  if (!spec.ParseFromString(row.spec) || !wire::FromProto(spec, &layer.spec).ok() || layer.spec.name != row.name) {
    return damaged("its declaration cannot be read");
  }
  auto recent = ToSequences(row.recent);
  if (!recent.has_value() || recent->empty() || recent->size() > core::kRecentRounds) {
    return damaged("its sequences cannot be read");
  }
  const size_t bytes = size_t{layer.spec.channels} * sizeof(double);
  if (bytes == 0 || row.mean.size() != bytes || row.var.size() != bytes) {
    return damaged("its vectors have not its channels");
  }
  if (row.missing_after.has_value() && !row.missing_before.has_value()) return damaged("its gap has no end");
  layer.updates = row.updates;
  layer.newest_sequence = row.newest_sequence;
  layer.recent = *std::move(recent);
  if (row.missing_before.has_value()) layer.missing = core::MissingRounds{row.missing_after, *row.missing_before};
  layer.mean = ToDoubles(row.mean);
  layer.var = ToDoubles(row.var);
  return layer;
}

}  // namespace syncbn::state
