// State files of any kind, at a master: bytes as a file of SQLite's, and rows whose checksums are right. What is loaded
// goes to the round engine.

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "plumbing/check.h"
#include "server/core/coordinator.h"
#include "server/state/rows.h"
#include "server/state/sqlite_store.h"
#include "syncbn/v1/statistics.pb.h"
#include "tests/fuzz/messages.h"
#include "tests/fuzz/script.h"
#include "tests/testing/temporary_directory.h"

namespace syncbn::fuzz {
namespace {

using core::GroupState;
using core::LayerState;

GroupState SmallGroup() {
  GroupState group;
  group.id = {"job", "group"};
  group.generation = 3;
  group.run_id = 77;
  group.world_size = 2;
  group.config.round_timeout = absl::Minutes(10);
  group.config.rejoin_grace = absl::Milliseconds(50);
  for (const char* name : {"a", "b"}) {
    LayerState layer;
    layer.spec.name = name;
    layer.spec.channels = 3;
    layer.spec.momentum = 0.1;
    layer.updates = 5;
    layer.mean = {1.0, 2.0, 3.0};
    layer.var = {4.0, 5.0, 6.0};
    layer.newest_sequence = 9;
    layer.recent = {7, 8, 9};
    group.layers.push_back(layer);
  }
  return group;
}

// ---- Files ----------------------------------------------------------------------------------------------------------

std::string ReadFile(const std::string& name) {
  std::ifstream stream(name, std::ios::binary | std::ios::ate);
  std::string bytes(stream.good() ? static_cast<size_t>(stream.tellg()) : 0, '\0');
  stream.seekg(0).read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return bytes;
}

void WriteFile(const std::string& name, const std::string& bytes) {
  std::ofstream(name, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

const std::string& Directory() {
  static const testing::TemporaryDirectory directory;
  static const std::string path = directory.path();
  return path;
}

std::string FileAt(const char* suffix) { return Directory() + "/state.db" + suffix; }

void RemoveFiles() {
  for (const char* suffix : {"", "-wal", "-journal", "-shm"}) std::filesystem::remove(FileAt(suffix));
}

// Returns a file that a master has stored.
std::string MakeFile() {
  RemoveFiles();
  {
    auto store = state::OpenSqliteStore(Directory());
    SYNCBN_CHECK(store.ok(), store.status().ToString());
    SYNCBN_CHECK((*store)->Load().ok() && (*store)->Save({{}, {SmallGroup()}}).ok());
  }
  return ReadFile(FileAt(""));
}

// Returns the file with bytes of the script at places of its own, in the pages' headers above all.
std::string Patch(Script& script, std::string bytes) {
  constexpr size_t kPage = 4096;
  for (size_t patches = script.Choose(16); patches > 0; --patches) {
    const size_t page = kPage * script.Choose(bytes.size() / kPage);
    const size_t place = (page + (script.Byte() | script.Choose(16) << 8)) % bytes.size();
    const std::string patch = script.Bytes(16);
    bytes.replace(place, patch.size(), patch);
  }
  if (script.OneIn(8)) bytes.resize(script.Number() * 128 % bytes.size());
  return bytes;
}

std::vector<GroupState> LoadFile(const std::string& bytes, const std::string& log) {
  RemoveFiles();
  WriteFile(FileAt(""), bytes);
  if (!log.empty()) WriteFile(FileAt("-wal"), log);
  auto store = state::OpenSqliteStore(Directory());
  auto loaded = store.ok() ? (*store)->Load() : absl::StatusOr<std::vector<GroupState>>(store.status());
  if (!loaded.ok()) {
    SYNCBN_CHECK(ReadFile(FileAt("")) == bytes, "a file that is refused does not stay as it is");
    return {};
  }
  (*store)->Save({{}, {SmallGroup()}}).IgnoreError();
  return *std::move(loaded);
}

// ---- Rows -----------------------------------------------------------------------------------------------------------

std::string BytesOf(const std::vector<double>& numbers) {
  return std::string(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(double));
}

std::vector<double> MakeNumbers(Script& script, uint32_t channels) {
  std::vector<double> numbers;
  const size_t length = script.OneIn(16) ? script.Choose(8) : channels;
  for (size_t i = 0; i < length && i < 64; ++i) numbers.push_back(script.Double());
  return numbers;
}

std::optional<GroupState> MakeGroup(Script& script) {
  state::GroupRow row = state::ToRow(SmallGroup());
  if (script.OneIn(4)) row.job = script.Bytes(300);
  if (script.OneIn(4)) row.name = MakeName(script);
  if (script.OneIn(4)) row.generation = script.Number();
  if (script.OneIn(4)) row.run_id = script.Number();
  if (script.OneIn(4)) row.world_size = script.Number();
  if (script.OneIn(4)) {
    v1::GroupConfig config;
    MakeConfig(script, &config);
    row.config = Damage(script, config.SerializeAsString());
  }
  row.checksum = state::ChecksumOf(row);
  auto group = state::FromRow(row);
  if (!group.ok()) return std::nullopt;
  SYNCBN_CHECK(state::FromRow(state::ToRow(*group)).ok(), "what was loaded cannot be stored");
  return *std::move(group);
}

std::optional<LayerState> MakeLayer(Script& script, const core::GroupId& group) {
  v1::LayerSpec spec;
  MakeSpec(script, &spec);
  state::LayerRow row;
  row.job = group.job;
  row.group = group.group;
  row.name = spec.name();
  row.spec = Damage(script, spec.SerializeAsString());
  row.updates = script.Number();
  row.newest_sequence = script.Number();
  row.recent = script.OneIn(2) ? script.Bytes(80) : std::string("\x05\x01\x01");
  if (script.OneIn(4)) row.missing_after = script.Number();
  if (script.OneIn(4)) row.missing_before = script.Number();
  row.mean = BytesOf(MakeNumbers(script, spec.channels()));
  row.var = BytesOf(MakeNumbers(script, spec.channels()));
  row.checksum = state::ChecksumOf(row);
  auto layer = state::FromRow(row);
  if (!layer.ok()) return std::nullopt;
  SYNCBN_CHECK(BytesOf(layer->mean) == row.mean && BytesOf(layer->var) == row.var);
  const auto again = state::FromRow(state::ToRow(group, *layer));
  SYNCBN_CHECK(again.ok() && again->recent == layer->recent && again->missing == layer->missing);
  return *std::move(layer);
}

// As SqliteStore::Load: no group and no layer is there twice.
std::vector<GroupState> MakeRows(Script& script) {
  std::vector<GroupState> groups;
  auto group = MakeGroup(script);
  if (!group.has_value()) return {};
  while (!script.done() && group->layers.size() < 8) {
    auto layer = MakeLayer(script, group->id);
    if (!layer.has_value()) continue;
    const auto same = [&layer](const LayerState& other) { return other.spec.name == layer->spec.name; };
    if (std::none_of(group->layers.begin(), group->layers.end(), same)) group->layers.push_back(*std::move(layer));
  }
  groups.push_back(*std::move(group));
  return groups;
}

// ---- The engine -----------------------------------------------------------------------------------------------------

core::Join MakeJoin(const GroupState& group, core::Rank rank) {
  core::Join join;
  join.min_protocol_version = join.max_protocol_version = 1;
  join.id = group.id;
  join.rank = rank;
  join.world_size = group.world_size;
  join.generation = group.generation;
  join.run_id = group.run_id;
  join.incarnation = 1;
  join.config = group.config;
  return join;
}

void ViewAll(const core::Coordinator& coordinator, absl::Time now) {
  for (const core::GroupSummary& group : coordinator.ListGroups()) {
    SYNCBN_CHECK(coordinator.GetGroup(group.id, now).ok());
    const auto layers = coordinator.ListLayers(group.id);
    SYNCBN_CHECK(layers.ok());
    for (const core::LayerSummary& layer : *layers) {
      SYNCBN_CHECK(coordinator.GetLayer(group.id, layer.spec.name).ok());
    }
  }
}

// Its workers come back, and complete a round of each layer.
void Restore(const std::vector<GroupState>& groups) {
  absl::Time now = absl::FromUnixSeconds(1'700'000'000);
  core::Coordinator coordinator(core::Limits(), 1);
  coordinator.Restore(groups, now);
  coordinator.CheckInvariants();
  ViewAll(coordinator, now);
  core::StreamId stream = 0;
  for (const GroupState& group : groups) {
    for (core::Rank rank = 0; rank < group.world_size && rank < 3; ++rank) {
      core::FrameReceived frame;
      frame.stream = ++stream;
      frame.join = MakeJoin(group, rank);
      for (const LayerState& layer : group.layers) {
        frame.layers.push_back(layer.spec);
        core::Contribution contribution;
        contribution.key = {layer.spec.name, layer.newest_sequence + 1, core::Phase::kForward};
        contribution.count = 2;
        contribution.backward_role = core::BackwardRole::kNone;
        contribution.first = layer.mean;
        contribution.second = layer.mean;
        frame.contributions.push_back(contribution);
      }
      frame.caught_up = true;
      coordinator.On(frame, now);
      coordinator.CheckInvariants();
    }
  }
  ViewAll(coordinator, now);
  while (coordinator.journal().has_changes()) {
    const core::StateChanges changes = coordinator.TakeChanges(64);
    for (const GroupState& group : changes.groups) {
      SYNCBN_CHECK(state::FromRow(state::ToRow(group)).ok());
      for (const LayerState& layer : group.layers) SYNCBN_CHECK(state::FromRow(state::ToRow(group.id, layer)).ok());
    }
  }
  now += absl::Hours(1);
  coordinator.On(core::TimePassed{}, now);
  coordinator.CheckInvariants();
}

}  // namespace
}  // namespace syncbn::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace syncbn::fuzz;
  static const std::string file = MakeFile();
  Script script(data, size);
  switch (script.Choose(8)) {
    default:
      Restore(MakeRows(script));
      break;
    case 1: {
      const std::string bytes = Patch(script, file);
      Restore(LoadFile(bytes, script.OneIn(4) ? script.Bytes(4096) : ""));
      break;
    }
    case 2:
      Restore(LoadFile(script.Bytes(65535), ""));
      break;
  }
  return 0;
}
