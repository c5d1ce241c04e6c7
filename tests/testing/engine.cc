#include "tests/testing/engine.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <variant>

#include "gtest/gtest.h"

namespace syncbn::testing {
namespace {

using core::StreamId;

bool SameBits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

core::LayerSpec Spec(const std::string& name, uint32_t channels, core::LayerKind kind) {
  core::LayerSpec spec;
  spec.name = name;
  spec.channels = channels;
  spec.kind = kind;
  return spec;
}

core::Contribution ContributionOf(const core::RoundKey& key, const Numbers& numbers) {
  return {key, numbers.count, numbers.role, numbers.first, numbers.second};
}

}  // namespace

std::string StreamLog::close_reason() const { return closed_with.has_value() ? closed_with->reason : ""; }

core::LayerSpec BatchNormLayer(const std::string& name, uint32_t channels) {
  core::LayerSpec spec = Spec(name, channels, core::LayerKind::kBatchNorm);
  spec.eps = 1e-5;
  return spec;
}

core::LayerSpec SumLayer(const std::string& name, uint32_t elements) {
  return Spec(name, elements, core::LayerKind::kSum);
}

core::RoundKey Forward(const std::string& layer, uint64_t sequence) { return {layer, sequence, core::Phase::kForward}; }
core::RoundKey Backward(const std::string& layer, uint64_t sequence) {
  return {layer, sequence, core::Phase::kBackward};
}
core::RoundKey Sum(const std::string& layer, uint64_t sequence) { return {layer, sequence, core::Phase::kSum}; }

core::Join MakeJoin(core::Rank rank, uint32_t world_size) {
  core::Join join;
  join.min_protocol_version = 1;
  join.max_protocol_version = 1;
  join.id = Engine::group();
  join.rank = rank;
  join.world_size = world_size;
  return join;
}

bool SameOutcome(const core::RoundOutcome& a, const core::RoundOutcome& b) {
  if (a.error.has_value() != b.error.has_value()) return false;
  if (a.error.has_value() &&
      (a.error->code != b.error->code || ReasonOf(a) != ReasonOf(b) || a.error->message != b.error->message ||
       a.error->ranks != b.error->ranks || a.error->resume_at != b.error->resume_at)) {
    return false;
  }
  return a.key == b.key && a.count == b.count && SameBits(a.first, b.first) && SameBits(a.second, b.second) &&
         a.backward_required == b.backward_required && a.missing_ranks == b.missing_ranks;
}

std::string ReasonOf(const core::RoundOutcome& outcome) {
  return outcome.error.has_value() ? outcome.error->reason : "";
}

Engine::Engine(core::Limits limits) : coordinator_(limits, 1), now_(absl::FromUnixSeconds(1'700'000'000)) {}

std::vector<core::StateChanges> Engine::TakeChanges(size_t max_bytes) {
  std::vector<core::StateChanges> taken;
  while (coordinator_.journal().has_changes()) taken.push_back(coordinator_.TakeChanges(max_bytes));
  return taken;
}

core::Effects Engine::On(const core::Event& event) {
  core::Effects effects = coordinator_.On(event, now_);
  coordinator_.CheckInvariants();
  for (const core::Effect& effect : effects) Record(effect);
  return effects;
}

core::Effects Engine::Advance(absl::Duration duration) {
  const absl::Time until = now_ + duration;
  core::Effects all;
  while (coordinator_.NextDeadline() <= until) {
    now_ = std::max(now_, coordinator_.NextDeadline());
    for (core::Effect& effect : On(core::TimePassed())) all.push_back(std::move(effect));
  }
  now_ = until;
  return all;
}

StreamId Engine::Join(const core::Join& join) {
  const StreamId stream = ++last_stream_;
  logs_[stream];
  joins_[stream] = join;
  core::FrameReceived frame;
  frame.stream = stream;
  frame.join = join;
  On(frame);
  return stream;
}

StreamId Engine::Join(core::Rank rank, uint32_t world_size, const std::vector<core::LayerSpec>& layers) {
  const StreamId stream = Join(MakeJoin(rank, world_size));
  if (!layers.empty()) Declare(stream, layers);
  return stream;
}

StreamId Engine::Reconnect(StreamId stream) {
  core::Join join = joins_.at(stream);
  join.incarnation = log(stream).joined->incarnation;
  join.run_id = log(stream).joined->run_id;
  return Join(join);
}

core::Effects Engine::Declare(StreamId stream, const std::vector<core::LayerSpec>& layers) {
  core::FrameReceived frame;
  frame.stream = stream;
  frame.layers = layers;
  return On(frame);
}

core::Effects Engine::Contribute(StreamId stream, const core::RoundKey& key, const Numbers& numbers) {
  core::FrameReceived frame;
  frame.stream = stream;
  frame.contributions.push_back(ContributionOf(key, numbers));
  return On(frame);
}

core::Effects Engine::ContributeAndBlock(StreamId stream, const core::RoundKey& key, const Numbers& numbers) {
  core::FrameReceived frame;
  frame.stream = stream;
  frame.contributions.push_back(ContributionOf(key, numbers));
  frame.blocked_on = {key};
  return On(frame);
}

core::Effects Engine::Leave(StreamId stream) {
  core::FrameReceived frame;
  frame.stream = stream;
  frame.leave = "finished";
  return On(frame);
}

core::Effects Engine::Read(StreamId stream, bool caught_up) {
  core::FrameReceived frame;
  frame.stream = stream;
  frame.caught_up = caught_up;
  const StreamLog& told = log(stream);
  frame.membership_read = told.memberships.empty() ? told.joined->membership.version : told.memberships.back().version;
  return On(frame);
}

core::Effects Engine::Close(StreamId stream) {
  gone_[stream] = true;
  return On(core::StreamClosed{stream});
}

core::Effects Engine::Shutdown() { return On(core::Shutdown()); }

std::vector<std::shared_ptr<const core::RoundOutcome>> Engine::Outcomes(StreamId stream,
                                                                        const core::RoundKey& key) const {
  std::vector<std::shared_ptr<const core::RoundOutcome>> outcomes;
  for (const auto& outcome : log(stream).outcomes) {
    if (outcome->key == key) outcomes.push_back(outcome);
  }
  return outcomes;
}

std::shared_ptr<const core::RoundOutcome> Engine::Outcome(StreamId stream, const core::RoundKey& key) const {
  const auto outcomes = Outcomes(stream, key);
  if (outcomes.size() == 1) return outcomes.front();
  ADD_FAILURE() << "stream " << stream << " was told " << outcomes.size() << " outcomes of layer " << key.layer
                << ", sequence " << key.sequence;
  auto none = std::make_shared<core::RoundOutcome>();
  none->error = core::Error{absl::StatusCode::kUnknown, "NONE", "no such outcome", {}, 0};
  return none;
}

core::GroupView Engine::View() const {
  absl::StatusOr<core::GroupView> view = coordinator_.GetGroup(group(), now_);
  EXPECT_TRUE(view.ok()) << view.status();
  return view.ok() ? *std::move(view) : core::GroupView();
}

core::LayerView Engine::Layer(const std::string& name) const {
  absl::StatusOr<core::LayerView> view = coordinator_.GetLayer(group(), name);
  EXPECT_TRUE(view.ok()) << view.status();
  return view.ok() ? *std::move(view) : core::LayerView();
}

void Engine::CheckOpen(StreamId stream) const {
  EXPECT_FALSE(log(stream).closed) << "something was sent to stream " << stream << " after it was closed";
  EXPECT_EQ(gone_.count(stream), 0u) << "something was sent to stream " << stream << " after the worker had gone";
}

void Engine::Record(const core::Effect& effect) {
  const auto to_each = [this](const std::vector<StreamId>& streams, const auto& note) {
    EXPECT_FALSE(streams.empty());
    for (const StreamId stream : streams) {
      CheckOpen(stream);
      EXPECT_TRUE(log(stream).joined.has_value()) << "stream " << stream << " was told something before joined";
      note(logs_.at(stream));
    }
  };
  if (const auto* joined = std::get_if<core::SendJoined>(&effect)) {
    CheckOpen(joined->stream);
    // It comes again where the group goes on with another run than it was taken for.
    const std::optional<core::SendJoined>& before = log(joined->stream).joined;
    EXPECT_TRUE(!before.has_value() || before->run_id != joined->run_id);
    logs_.at(joined->stream).joined = *joined;
  } else if (const auto* results = std::get_if<core::SendResults>(&effect)) {
    EXPECT_FALSE(results->outcomes.empty());
    to_each(results->streams, [&](StreamLog& log) {
      ++log.result_frames;
      log.outcomes.insert(log.outcomes.end(), results->outcomes.begin(), results->outcomes.end());
    });
  } else if (const auto* layer_error = std::get_if<core::SendLayerError>(&effect)) {
    to_each(layer_error->streams, [&](StreamLog& log) { log.layer_errors.push_back(*layer_error); });
  } else if (const auto* change = std::get_if<core::SendMembership>(&effect)) {
    to_each(change->streams, [&](StreamLog& log) { log.memberships.push_back(change->membership); });
  } else if (const auto* late = std::get_if<core::SendLateRounds>(&effect)) {
    EXPECT_FALSE(late->rounds.empty());
    for (const StreamId stream : late->streams) {
      CheckOpen(stream);
      auto& rounds = logs_.at(stream).late_rounds;
      rounds.insert(rounds.end(), late->rounds.begin(), late->rounds.end());
    }
  } else if (const auto* close = std::get_if<core::CloseStream>(&effect)) {
    if (log(close->stream).closed) return;  // A frame that was under way met a closed stream.
    logs_.at(close->stream).closed = true;
    logs_.at(close->stream).closed_with = close->error;
  } else if (const auto* ended = std::get_if<core::RoundEnded>(&effect)) {
    ended_.push_back(*ended);
  } else if (const auto* member = std::get_if<core::MemberChanged>(&effect)) {
    changes_.push_back(*member);
  } else if (const auto* refused = std::get_if<core::JoinRefused>(&effect)) {
    refused_.push_back(*refused);
  } else if (std::holds_alternative<core::GroupEnded>(effect)) {
    ++groups_ended_;
  }
}

}  // namespace syncbn::testing
