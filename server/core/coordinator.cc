#include "server/core/coordinator.h"

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "plumbing/check.h"
#include "server/core/error.h"
#include "server/core/group.h"
#include "server/core/layer.h"
#include "vocabulary/protocol_version.h"

namespace syncbn::core {
namespace {

// Masters count incarnations from 0, or from a time in microseconds, and stay far below this.
constexpr uint64_t kGreatestIncarnation = uint64_t{1} << 62;

constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u;

// Returns a number that looks random, and is not 0 (splitmix64's finalizer).
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  x ^= x >> 31;
  return x == 0 ? 1 : x;
}

std::optional<Error> CheckVersions(const Join& join) {
  if (join.min_protocol_version > join.max_protocol_version) {
    return MalformedError(absl::StrCat("min_protocol_version ", join.min_protocol_version,
                                       " exceeds max_protocol_version ", join.max_protocol_version));
  }
  if (join.min_protocol_version <= kProtocolVersion && kProtocolVersion <= join.max_protocol_version)
    return std::nullopt;
  return VersionError(join, kProtocolVersion);
}

// Checks what needs no knowledge of the join's group.
std::optional<Error> CheckAlone(const Join& join, const Limits& limits) {
  if (auto error = CheckVersions(join)) return error;
  for (const std::string* name : {&join.id.job, &join.id.group}) {
    if (name->size() > limits.max_name_bytes) {
      return LimitError(name->size(), "bytes of a job's or group's name", "max_name_bytes", limits.max_name_bytes);
    }
  }
  if (join.description.size() > limits.max_description_bytes) {
    return LimitError(join.description.size(), "bytes of description", "max_description_bytes",
                      limits.max_description_bytes);
  }
  if (join.world_size == 0) return MalformedError("world_size is 0; a group has at least 1 worker");
  if (join.world_size > limits.max_workers) {
    return LimitError(join.world_size, "workers", "max_workers", limits.max_workers);
  }
  if (join.rank >= join.world_size) {
    return MalformedError(absl::StrCat("rank ", join.rank, " is not below the world size of ", join.world_size));
  }
  if (join.incarnation > kGreatestIncarnation) {
    return MalformedError(
        absl::StrCat("incarnation ", join.incarnation, " was never given; none is greater than 2^62"));
  }
  if (join.layers.size() > limits.max_layers) {
    return LimitError(join.layers.size(), "layers", "max_layers", limits.max_layers);
  }
  for (const LayerSpec& spec : join.layers) {
    if (auto error = CheckSpec(spec, limits)) return error;
  }
  return std::nullopt;
}

// Appends the effect's rounds to the newest effect if that is a SendLateRounds to the same streams of the same group.
// Returns whether it did.
bool AddToLate(Effect& effect, Effects& joined) {
  auto* const late = std::get_if<SendLateRounds>(&effect);
  auto* const newest = joined.empty() ? nullptr : std::get_if<SendLateRounds>(&joined.back());
  if (late == nullptr || newest == nullptr || !(newest->group == late->group) || newest->streams != late->streams) {
    return false;
  }
  std::move(late->rounds.begin(), late->rounds.end(), std::back_inserter(newest->rounds));
  return true;
}

// Returns whether no two effects are of a kind that may be joined, as after most events.
bool NothingToJoin(const Effects& effects) {
  size_t results = 0, late = 0;
  for (const Effect& effect : effects) {
    results += std::holds_alternative<SendResults>(effect) ? 1 : 0;
    late += std::holds_alternative<SendLateRounds>(effect) ? 1 : 0;
  }
  return results < 2 && late < 2;
}

// Joins neighbouring results for the same streams into one frame, and late rounds likewise. Effects that are not sent
// to workers do not separate neighbours.
Effects Coalesce(Effects effects) {
  if (NothingToJoin(effects)) return effects;
  constexpr size_t kNone = SIZE_MAX;
  Effects joined;
  size_t open = kNone;  // Where the newest SendResults lies, while it may still grow.
  for (Effect& effect : effects) {
    if (AddToLate(effect, joined)) continue;
    auto* const results = std::get_if<SendResults>(&effect);
    if (results == nullptr) {
      if (!std::holds_alternative<RoundEnded>(effect)) open = kNone;
    } else if (open != kNone && std::get<SendResults>(joined[open]).streams == results->streams) {
      std::move(results->outcomes.begin(), results->outcomes.end(),
                std::back_inserter(std::get<SendResults>(joined[open]).outcomes));
      continue;
    } else {
      open = joined.size();
    }
    joined.push_back(std::move(effect));
  }
  return joined;
}

}  // namespace

Coordinator::Coordinator(Limits limits, uint64_t instance) : limits_(limits), instance_(instance), journal_(limits_) {}
Coordinator::~Coordinator() = default;

Effects Coordinator::On(const Event& event, absl::Time now) {
  Effects effects;
  std::visit([&](const auto& e) { Handle(e, now, effects); }, event);
  LimitRetained(now, effects);
  for (const Effect& effect : effects) {
    if (const auto* close = std::get_if<CloseStream>(&effect)) streams_.erase(close->stream);
  }
  // Groups that a shutdown ends go on at the next master.
  if (journal_.begun() && !shutting_down_) journal_.Note(effects);
  return Coalesce(std::move(effects));
}

absl::Time Coordinator::NextDeadline() const {
  return std::min(alarms_.empty() ? absl::InfiniteFuture() : alarms_.begin()->first, journal_.NextDeadline());
}

StateChanges Coordinator::TakeChanges(size_t max_bytes) {
  return journal_.Take(max_bytes, [this](const GroupId& id) -> const Group* {
    const auto slot = groups_.find(id);
    return slot == groups_.end() ? nullptr : slot->second.group.get();
  });
}

Coordinator::Groups::iterator Coordinator::SlotOf(StreamId stream, const GroupId& id) {
  const auto slot = groups_.find(id);
  SYNCBN_CHECK(slot != groups_.end(), "stream ", stream, " belongs to group \"", id.group, "\", which is gone");
  return slot;
}

// ---- Frames ---------------------------------------------------------------------------------------------------------

void Coordinator::Handle(const FrameReceived& frame, absl::Time now, Effects& effects) {
  const auto known = streams_.find(frame.stream);
  if (known == streams_.end()) {
    HandleFirstFrame(frame, now, effects);
    return;
  }
  const Groups::iterator slot = SlotOf(frame.stream, known->second);
  if (frame.join.has_value()) {
    effects.push_back(CloseStream{frame.stream, SecondJoinError()});
    slot->second.group->OnStreamClosed(frame.stream, now, effects);
  } else {
    slot->second.group->OnFrame(frame.stream, frame, now, effects);
  }
  Update(slot);
}

void Coordinator::HandleFirstFrame(const FrameReceived& frame, absl::Time now, Effects& effects) {
  const auto close = [&](Error error) { effects.push_back(CloseStream{frame.stream, std::move(error)}); };
  if (shutting_down_) return close(ShuttingDownError());
  if (!frame.join.has_value()) return close(NoJoinError());
  const Join& join = *frame.join;
  const auto refuse = [&](Error error) {
    effects.push_back(JoinRefused{join.id, join.rank, frame.stream, error});
    close(std::move(error));
  };
  GroupConfig filled;
  if (auto error = CheckAlone(join, limits_)) return refuse(std::move(*error));
  if (auto error = FillConfig(join.config, join.world_size, limits_, filled)) return refuse(std::move(*error));
  if (auto error = CheckToken(join)) return refuse(std::move(*error));
  uint64_t ended_run = 0;
  if (auto error = EndSuperseded(join, now, &ended_run, effects)) return refuse(std::move(*error));
  if (auto error = journal_.CheckGeneration(join)) return refuse(std::move(*error));
  Groups::iterator slot = groups_.find(join.id);
  const bool first = slot == groups_.end();
  if (first) {
    if (auto error = MakeRoom(join, now, effects)) return refuse(std::move(*error));
    // A worker that comes back to a restarted master brings its run along.
    const uint64_t run_id = join.run_id != 0 ? join.run_id : NewRunId(now);
    auto group = std::make_unique<Group>(join, filled, run_id, NewMemory(), limits_, now);
    group->NoteOver(ended_run);
    slot = Begin(join, std::move(group));
  }
  Group& group = *slot->second.group;
  const uint64_t run_before = first ? 0 : group.run_id();
  if (auto error = group.OnJoin(frame.stream, join, filled, now, effects)) {
    refuse(*std::move(error));
    if (first) {
      Erase(slot);  // It has never had a member, and its run would refuse the workers of the real one.
      return;
    }
  } else {
    streams_[frame.stream] = join.id;
    // The run of an earlier master goes on.
    if (join.run_id == group.run_id() && join.run_id != run_before) {
      group.Resume(journal_.Claim(join.id, join.run_id));
    }
    group.OnFrame(frame.stream, frame, now, effects);
  }
  Update(slot);
}

std::optional<Error> Coordinator::CheckToken(const Join& join) const {
  const auto of_job = groups_.lower_bound(GroupId{join.id.job, ""});  // Any group of the job: they all have its token.
  if (of_job == groups_.end() || of_job->first.job != join.id.job) return std::nullopt;
  if (of_job->second.group->token() == join.token) return std::nullopt;
  return TokenError(join);
}

std::optional<Error> Coordinator::EndSuperseded(const Join& join, absl::Time now, uint64_t* ended_run,
                                                Effects& effects) {
  const auto slot = groups_.find(join.id);
  if (slot == groups_.end()) return std::nullopt;
  const Group& group = *slot->second.group;
  if (join.generation < group.generation()) return OutdatedGenerationError(join, group.generation());
  *ended_run = group.run_id();
  if (join.generation > group.generation()) {
    const uint64_t most = limits_.max_generation_jump;
    if (join.generation - group.generation() > most) return GenerationJumpError(join, group.generation(), most);
    EndGroup(slot, NewGenerationError(join), now, effects);
  } else if (group.empty() && join.incarnation == 0 && !group.AwaitsSuccessors()) {
    EndGroup(slot, NewRunError(join), now, effects);
  }
  return std::nullopt;
}

// The time mixes in what an earlier master cannot have used.
uint64_t Coordinator::NewRunId(absl::Time now) {
  return Mix(static_cast<uint64_t>(absl::ToUnixNanos(now)) + ++runs_ * kOdd);
}

uint64_t Coordinator::NewMemory() { return instance_ == 0 ? 0 : Mix(instance_ + ++memories_ * kOdd); }

// ---- Other events ---------------------------------------------------------------------------------------------------

void Coordinator::Handle(const StreamClosed& closed, absl::Time now, Effects& effects) {
  const auto known = streams_.find(closed.stream);
  if (known == streams_.end()) return;
  const Groups::iterator slot = SlotOf(closed.stream, known->second);
  streams_.erase(known);
  slot->second.group->OnStreamClosed(closed.stream, now, effects);
  Update(slot);
}

void Coordinator::Handle(const ReaderLags& reader, absl::Time, Effects&) {
  const auto known = streams_.find(reader.stream);
  if (known == streams_.end()) return;
  const Groups::iterator slot = SlotOf(reader.stream, known->second);
  slot->second.group->OnReaderLags(reader.stream, reader.lags);
  Update(slot);
}

// Gives one turn to each group for which something is due. A group that does not finish in its turn stays due.
void Coordinator::Handle(const TimePassed&, absl::Time now, Effects& effects) {
  journal_.OnTimePassed(now);
  std::vector<GroupId> due;
  for (auto alarm = alarms_.begin(); alarm != alarms_.end() && alarm->first <= now; ++alarm) {
    due.push_back(alarm->second);
  }
  for (const GroupId& id : due) {
    const Groups::iterator slot = groups_.find(id);
    SYNCBN_CHECK(slot != groups_.end(), "an alarm is set for group \"", id.group, "\", which is gone");
    Group& group = *slot->second.group;
    group.OnTimePassed(now, effects);
    if (group.linger_until() <= now) {
      EndGroup(slot, AbandonedError(slot->first), now, effects);
    } else {
      Update(slot);
    }
  }
}

// Rounds in flight do not fail: their workers resend them to the next master.
void Coordinator::Handle(const Shutdown&, absl::Time, Effects& effects) {
  shutting_down_ = true;
  for (const auto& [id, slot] : groups_) {
    slot.group->ShutDown(ShuttingDownError(), effects);
  }
  groups_.clear();
  begun_by_.clear();
  alarms_.clear();
  retained_ = 0;
}

void Coordinator::Update(Groups::iterator slot) {
  const size_t retained = slot->second.group->retained_bytes();
  retained_ += retained - std::exchange(slot->second.retained, retained);
  const absl::Time next = slot->second.group->NextDeadline();
  if (next == slot->second.alarm) return;
  alarms_.erase({slot->second.alarm, slot->first});
  slot->second.alarm = next;
  if (next != absl::InfiniteFuture()) alarms_.insert({next, slot->first});
}

// ---- Views ----------------------------------------------------------------------------------------------------------

absl::StatusOr<const Group*> Coordinator::Find(const GroupId& id) const {
  const auto it = groups_.find(id);
  if (it != groups_.end()) return it->second.group.get();
  const auto unclaimed = journal_.unclaimed().find(id);
  if (unclaimed != journal_.unclaimed().end()) return unclaimed->second.get();
  constexpr size_t kShown = 10;
  std::vector<std::string> names;
  for (const GroupSummary& known : ListGroups()) {
    if (names.size() == kShown) {
      names.push_back("...");
      break;
    }
    names.push_back(absl::StrCat("\"", known.id.job, "\"/\"", known.id.group, "\""));
  }
  return absl::NotFoundError(absl::StrCat("there is no group \"", id.group, "\" of job \"", id.job,
                                          "\"; there are: ", names.empty() ? "none" : absl::StrJoin(names, ", ")));
}

size_t Coordinator::LongestResult(const GroupId& id) const {
  const auto it = groups_.find(id);
  return it == groups_.end() ? 0 : it->second.group->longest_result();
}

std::vector<GroupSummary> Coordinator::ListGroups() const {
  std::vector<GroupSummary> summaries;
  for (const auto& [id, slot] : groups_) summaries.push_back(slot.group->Summary());
  for (const auto& [id, group] : journal_.unclaimed()) {
    if (!groups_.contains(id)) summaries.push_back(group->Summary());
  }
  std::sort(summaries.begin(), summaries.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  return summaries;
}

absl::StatusOr<GroupView> Coordinator::GetGroup(const GroupId& id, absl::Time now, const GroupParts& parts) const {
  const absl::StatusOr<const Group*> group = Find(id);
  if (!group.ok()) return group.status();
  return (*group)->View(now, parts);
}

absl::StatusOr<std::vector<LayerSummary>> Coordinator::ListLayers(const GroupId& id) const {
  const absl::StatusOr<const Group*> group = Find(id);
  if (!group.ok()) return group.status();
  return (*group)->LayerSummaries();
}

absl::StatusOr<LayerView> Coordinator::GetLayer(const GroupId& id, absl::string_view layer) const {
  const absl::StatusOr<const Group*> group = Find(id);
  if (!group.ok()) return group.status();
  if (const Layer* const found = (*group)->FindLayer(layer)) return found->View();
  return absl::NotFoundError(absl::StrCat("group \"", id.group, "\" of job \"", id.job, "\" has no layer \"", layer,
                                          "\" among its ", (*group)->LayerSummaries().size()));
}

void Coordinator::CheckInvariants() const {
  size_t streams = 0, alarms = 0, retained = 0;
  absl::flat_hash_map<std::string, size_t> begun_by;
  for (const auto& [id, slot] : groups_) {
    for (const std::string* name : {&slot.connection, &slot.address}) {
      if (!name->empty()) ++begun_by[*name];
    }
    slot.group->CheckInvariants();
    SYNCBN_CHECK(slot.group->id() == id, "group \"", id.group, "\"");
    SYNCBN_CHECK(slot.alarm == slot.group->NextDeadline(), "group \"", id.group, "\"");
    if (slot.alarm != absl::InfiniteFuture()) {
      SYNCBN_CHECK(alarms_.contains({slot.alarm, id}), "group \"", id.group, "\"");
      ++alarms;
    }
    SYNCBN_CHECK(slot.retained == slot.group->retained_bytes(), "group \"", id.group, "\"");
    streams += slot.group->streams();
    retained += slot.retained;
  }
  SYNCBN_CHECK(begun_by_ == begun_by, begun_by_.size(), " connections and addresses, not ", begun_by.size());
  SYNCBN_CHECK(alarms_.size() == alarms, alarms_.size(), ", not ", alarms);
  SYNCBN_CHECK(retained_ == retained, retained_, ", not ", retained);
  SYNCBN_CHECK(streams_.size() == streams, streams_.size(), ", not ", streams);
  auto slot = groups_.end();  // Of the stream before: most have the same.
  for (const auto& [stream, id] : streams_) {
    if (slot == groups_.end() || !(slot->first == id)) slot = groups_.find(id);
    SYNCBN_CHECK(slot != groups_.end() && slot->second.group->Owns(stream), "stream ", stream);
  }
}

}  // namespace syncbn::core
