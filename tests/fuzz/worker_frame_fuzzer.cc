// Workers' frames of any kind, at a master: bytes to the frame reader, its events to the round engine, and the engine's
// effects to bytes again, which a client must be able to read.

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/time/time.h"
#include "google/rpc/status.pb.h"
#include "grpcpp/support/byte_buffer.h"
#include "plumbing/check.h"
#include "plumbing/messages.h"
#include "server/core/coordinator.h"
#include "server/rpc/convert.h"
#include "server/rpc/frame_reader.h"
#include "server/rpc/status.h"
#include "syncbn/v1/statistics.pb.h"
#include "tests/fuzz/messages.h"
#include "tests/fuzz/script.h"

namespace syncbn::fuzz {
namespace {

constexpr size_t kStreams = 5;
constexpr uint32_t kWorkers = 3;

// Small enough that a few frames exceed them.
core::Limits SmallLimits() {
  core::Limits limits;
  limits.max_groups = 3;
  limits.max_workers = 8;
  limits.max_layers = 6;
  limits.max_channels = 64;
  limits.max_vector_elements = 64;
  limits.max_rounds_in_flight = 16;
  limits.max_rounds_in_frame = 32;
  limits.max_turn_bytes = 128;
  limits.max_pending_bytes = 1024;
  limits.retained_rounds = 4;
  limits.retained_failures = 4;
  limits.max_retained_bytes = 1024;
  limits.max_awaited_bytes = 512;
  limits.group_linger = absl::Seconds(5);
  return limits;
}

// A message that is sent must be one that can be read: text that is no UTF-8 could not.
template <typename Message>
void CheckReadable(const Message& message) {
  Message read;
  SYNCBN_CHECK(read.ParseFromString(message.SerializeAsString()), message.GetTypeName());
}

void CheckError(const core::Error& error) {
  google::rpc::Status status;
  rpc::ToProto(error, "", &status);
  CheckReadable(status);
  SYNCBN_CHECK(!rpc::ToGrpc(error).ok());
}

class Master {
 public:
  explicit Master(Script& script) : script_(script) { Start(); }

  void Run() {
    while (!script_.done()) Step();
    View();
  }

 private:
  struct Stream {
    core::StreamId id = 0;  // 0: there is none.
    bool joined = false;
    uint32_t rank = 0;
    std::unique_ptr<rpc::FrameReader> frame;  // Not all of its slices have been handled.
  };
  // The life and the run that a master has told a rank's worker.
  struct Life {
    uint64_t incarnation = 0;
    uint64_t run_id = 0;
  };

  void Start() {
    std::vector<core::GroupState> groups;
    for (const auto& [id, group] : stored_) groups.push_back(group);
    coordinator_ = std::make_unique<core::Coordinator>(limits_, ++instance_);
    coordinator_->Restore(groups, now_);
    for (Stream& stream : streams_) stream = {};
    coordinator_->CheckInvariants();
  }

  void Step() {
    Stream& stream = streams_[script_.Choose(kStreams)];
    switch (script_.Choose(20)) {
      default:
        return OnFrame(stream, Damage(script_, MakeFrame(stream).SerializeAsString()));
      case 11:
        return OnFrame(stream, script_.Bytes(512));
      case 12:
        return Continue(stream);
      case 13:
        return Close(stream);
      case 14:
        if (stream.id != 0) Deliver(core::ReaderLags{stream.id, script_.OneIn(2)});
        return;
      case 15:
        now_ += absl::Milliseconds(script_.Byte());
        return Deliver(core::TimePassed{});
      case 16:
        now_ = std::max(now_, std::min(coordinator_->NextDeadline(), now_ + absl::Hours(25)));
        return Deliver(core::TimePassed{});
      case 17:
        Store();
        return View();
      case 18:
        if (!script_.OneIn(4)) return;
        return Start();
      case 19:
        if (script_.OneIn(16)) Deliver(core::Shutdown{});
        return;
    }
  }

  // ---- Frames

  v1::WorkerFrame MakeFrame(const Stream& stream) {
    v1::WorkerFrame frame;
    if (!stream.joined || script_.OneIn(32)) MakeJoin(frame.mutable_join());
    const uint8_t kinds = script_.Byte();
    if (kinds & 1) Repeat([&] { MakeSpec(script_, frame.add_layers()); });
    if (kinds & 6) Repeat([&] { MakeContribution(frame.add_contributions()); });
    if (kinds & 8) Repeat([&] { MakeKey(script_, frame.add_blocked_on()); });
    if (kinds & 16) Repeat([&] { MakeContribution(frame.add_repeats()); });
    if (kinds & 32) Repeat([&] { MakeEnded(frame.add_ended_rounds()); });
    if (kinds & 64) frame.set_caught_up(true);
    if ((kinds & 64) && script_.OneIn(4)) Repeat([&] { MakeKey(script_, frame.add_forgotten()); });
    if ((kinds & 128) && script_.OneIn(4)) frame.mutable_leave()->set_reason(script_.Bytes(16));
    return frame;
  }

  template <typename Action>
  void Repeat(const Action& action) {
    for (size_t i = script_.Choose(4); i < 4; ++i) action();
  }

  void MakeJoin(v1::Join* join) {
    join->set_min_protocol_version(1);
    join->set_max_protocol_version(1);
    join->set_rank(static_cast<uint32_t>(script_.Choose(kWorkers)));
    join->set_world_size(kWorkers);
    if (script_.OneIn(2)) join->set_life_key(std::string(1, static_cast<char>(join->rank())));
    if (script_.OneIn(2)) {
      join->set_incarnation(told_[join->rank()].incarnation);
      join->set_run_id(told_[join->rank()].run_id);
    }
    if (script_.OneIn(4)) MakeConfig(script_, join->mutable_config());
    if (script_.OneIn(8)) join->set_without_outcome(true);
    if (script_.OneIn(8)) Repeat([&] { MakeSpec(script_, join->add_layers()); });
    if (!script_.OneIn(8)) return;
    const uint8_t kinds = script_.Byte();
    if (kinds & 1) join->set_group(MakeName(script_));
    if (kinds & 2) join->set_generation(script_.Number());
    if (kinds & 4) join->set_token(script_.Bytes(4));
    if (kinds & 8) join->set_life_key(script_.Bytes(32));
    if (kinds & 16) MakeRanks(script_, join->mutable_left_ranks());
    if (kinds & 32) join->set_incarnation(script_.Number());
    if (kinds & 64) join->set_world_size(static_cast<uint32_t>(script_.Number()));
    if (!(kinds & 128)) return;
    join->set_rank(static_cast<uint32_t>(script_.Number()));
    join->set_run_id(script_.Number());
    join->set_description(script_.Bytes(2000));
    join->set_job(script_.Bytes(300));
    join->set_max_protocol_version(static_cast<uint32_t>(script_.Number()));
  }

  void MakeContribution(v1::Contribution* contribution) {
    MakeKey(script_, contribution->mutable_key());
    const std::string& layer = contribution->key().layer();
    const bool honest = !script_.OneIn(16);
    const size_t kind = honest ? static_cast<size_t>(contribution->key().phase()) : script_.Choose(4);
    if (kind == v1::PHASE_FORWARD) {
      v1::Moments* const moments = contribution->mutable_moments();
      moments->set_count(static_cast<int64_t>(script_.Number()));
      MakeVector(script_, layer, moments->mutable_mean());
      MakeVector(script_, layer, moments->mutable_m2());
      moments->set_backward_role(static_cast<v1::BackwardRole>(script_.Choose(5)));
    } else if (kind == v1::PHASE_BACKWARD) {
      MakeVector(script_, layer, contribution->mutable_gradient_sums()->mutable_sum_dy());
      MakeVector(script_, layer, contribution->mutable_gradient_sums()->mutable_sum_dy_xmu());
    } else if (kind == v1::PHASE_SUM) {
      MakeVector(script_, layer, contribution->mutable_vector()->mutable_value());
    }
  }

  void MakeEnded(v1::EndedRound* ended) {
    MakeKey(script_, ended->mutable_key());
    if (script_.OneIn(3)) return MakeStatus(script_, ended->mutable_error());
    MakeRanks(script_, ended->mutable_missing_ranks());
    MakeRanks(script_, ended->mutable_abstaining_ranks());
    ended->set_digest(script_.Number());
    ended->set_count(static_cast<int64_t>(script_.Number()));
    ended->set_backward_required(script_.OneIn(2));
  }

  // ---- What server/rpc/sessions.cc does with them

  void OnFrame(Stream& stream, const std::string& bytes) {
    if (stream.id == 0) stream.id = ++last_stream_;
    while (stream.frame != nullptr) Continue(stream);
    if (stream.id == 0) return;
    const size_t cut = bytes.size() / 2;  // Frames come in pieces.
    const grpc::Slice slices[] = {grpc::Slice(bytes.substr(0, cut)), grpc::Slice(bytes.substr(cut))};
    stream.frame = std::make_unique<rpc::FrameReader>(grpc::ByteBuffer(slices, 2), limits_);
    if (const auto error = stream.frame->Open()) return Refuse(stream, *error);
    if (stream.frame->head().join.has_value()) {
      stream.joined = true;
      stream.rank = stream.frame->head().join->rank;
    }
    Continue(stream);
  }

  void Continue(Stream& stream) {
    if (stream.frame == nullptr) return;
    rpc::SliceLimits slice;
    slice.contributions = 1 + script_.Choose(4);
    slice.bytes = 256;
    slice.longest_contribution = 1024;
    FrameArena arena;
    core::FrameReceived event;
    event.stream = stream.id;
    if (const auto error = stream.frame->Next(slice, arena.get(), &event)) return Refuse(stream, *error);
    if (stream.frame->done()) stream.frame.reset();
    Deliver(event);
  }

  void Refuse(Stream& stream, const core::Error& error) {
    CheckError(error);
    Close(stream);
  }

  void Close(Stream& stream) {
    if (stream.id == 0) return;
    const core::StreamId id = std::exchange(stream, {}).id;
    Deliver(core::StreamClosed{id});
  }

  // ---- Events and effects

  void Deliver(const core::Event& event) {
    const core::Effects effects = coordinator_->On(event, now_);
    coordinator_->CheckInvariants();
    for (const core::Effect& effect : effects) {
      std::visit([this](const auto& kind) { Apply(kind); }, effect);
    }
  }

  Stream* Find(core::StreamId id) {
    for (Stream& stream : streams_) {
      if (stream.id == id) return &stream;
    }
    return nullptr;
  }

  void CheckOpen(const std::vector<core::StreamId>& ids) {
    for (const core::StreamId id : ids) SYNCBN_CHECK(Find(id) != nullptr, "something is sent to a stream that is gone");
  }

  void Apply(const core::SendJoined& joined) {
    CheckOpen({joined.stream});
    v1::MasterFrame frame;
    rpc::ToProto(joined, "master", frame.mutable_joined());
    CheckReadable(frame);
    told_[Find(joined.stream)->rank % kWorkers] = {joined.incarnation, joined.run_id};
  }

  void Apply(const core::SendResults& results) {
    CheckOpen(results.streams);
    SYNCBN_CHECK(!results.streams.empty() && !results.outcomes.empty());
    v1::MasterFrame frame;
    for (const auto& outcome : results.outcomes) rpc::ToProto(*outcome, frame.add_results());
    CheckReadable(frame);
  }

  void Apply(const core::SendLayerError& error) {
    CheckOpen(error.streams);
    v1::MasterFrame frame;
    rpc::ToProto(error, frame.add_layer_errors());
    CheckReadable(frame);
  }

  void Apply(const core::SendMembership& change) {
    CheckOpen(change.streams);
    v1::MasterFrame frame;
    rpc::ToProto(change.membership, frame.mutable_membership());
    CheckReadable(frame);
  }

  void Apply(const core::SendLateRounds& late) {
    CheckOpen(late.streams);
    v1::MasterFrame frame;
    for (const core::LateRound& round : late.rounds) rpc::ToProto(round, frame.add_late_rounds());
    CheckReadable(frame);
  }

  void Apply(const core::CloseStream& close) {
    if (close.error.has_value()) CheckError(*close.error);
    if (Stream* const stream = Find(close.stream)) *stream = {};
  }

  void Apply(const core::RoundEnded& ended) {
    v1::WatchRoundsResponse event;
    rpc::ToProto(ended, now_, &event);
    CheckReadable(event);
    const core::RoundOutcome& outcome = *ended.outcome;
    SYNCBN_CHECK(!outcome.error.has_value() || (outcome.first.empty() && outcome.second.empty()));
    SYNCBN_CHECK(outcome.count >= 0);
  }

  void Apply(const core::MemberChanged&) {}
  void Apply(const core::JoinRefused& refused) { CheckError(refused.error); }
  void Apply(const core::GroupEnded&) {}

  // ---- Views, and the state that is stored

  void View() {
    for (const core::GroupSummary& summary : coordinator_->ListGroups()) {
      v1::GetGroupResponse group;
      rpc::ToProto(*coordinator_->GetGroup(summary.id, now_), now_, &group);
      CheckReadable(group);
      const auto layers = coordinator_->ListLayers(summary.id);
      SYNCBN_CHECK(layers.ok());
      for (const core::LayerSummary& layer : *layers) {
        v1::GetLayerResponse response;
        rpc::ToProto(*coordinator_->GetLayer(summary.id, layer.spec.name), &response);
        CheckReadable(response);
      }
    }
  }

  void Store() {
    while (coordinator_->journal().has_changes()) {
      const core::StateChanges changes = coordinator_->TakeChanges(1 + script_.Byte());
      for (const core::GroupId& id : changes.ended) stored_.erase(id);
      for (const core::GroupState& group : changes.groups) {
        core::GroupState& stored = stored_[group.id];
        std::vector<core::LayerState> layers = std::exchange(stored.layers, {});
        for (const core::LayerState& layer : group.layers) {
          const auto same = [&layer](const core::LayerState& other) { return other.spec.name == layer.spec.name; };
          layers.erase(std::remove_if(layers.begin(), layers.end(), same), layers.end());
          layers.push_back(layer);
        }
        stored = group;
        stored.layers = std::move(layers);
      }
    }
  }

  Script& script_;
  const core::Limits limits_ = SmallLimits();
  absl::Time now_ = absl::FromUnixSeconds(1'700'000'000);
  uint64_t instance_ = 0;
  std::unique_ptr<core::Coordinator> coordinator_;
  core::StreamId last_stream_ = 0;
  std::array<Stream, kStreams> streams_;
  std::array<Life, kWorkers> told_;
  std::map<core::GroupId, core::GroupState> stored_;
};

}  // namespace
}  // namespace syncbn::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  syncbn::fuzz::Script script(data, size);
  syncbn::fuzz::Master(script).Run();
  return 0;
}
