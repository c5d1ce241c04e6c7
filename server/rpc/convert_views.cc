// Conversion of the engine's views to the messages of inspection.proto.

#include <string>

#include "plumbing/duration.h"
#include "server/rpc/convert.h"
#include "server/rpc/status.h"
#include "vocabulary/wire/convert.h"

namespace syncbn::rpc {

using syncbn::ToProto;
using wire::ToProto;

namespace {

void Assign(const std::vector<double>& values, google::protobuf::RepeatedField<double>* field) {
  field->Add(values.begin(), values.end());
}

void Assign(const std::vector<core::Rank>& values, google::protobuf::RepeatedField<uint32_t>* field) {
  field->Add(values.begin(), values.end());
}

void BatchToProto(const core::RoundOutcome& outcome, v1::MergedMoments* message) {
  message->set_count(outcome.count);
  Assign(outcome.first, message->mutable_mean());
  Assign(outcome.second, message->mutable_var());
  message->set_backward_required(outcome.backward_required);
}

void HistogramToProto(const core::DurationHistogram& histogram, v1::DurationHistogram* message) {
  message->set_count(histogram.count());
  ToProto(histogram.sum(), message->mutable_sum());
  if (histogram.count() == 0) return;
  ToProto(histogram.sum() / static_cast<int64_t>(histogram.count()), message->mutable_mean());
  ToProto(histogram.Quantile(0.5), message->mutable_p50());
  ToProto(histogram.Quantile(0.9), message->mutable_p90());
  ToProto(histogram.Quantile(0.99), message->mutable_p99());
  for (size_t bucket = 0; bucket <= core::DurationHistogram::kBounds; ++bucket) {
    v1::DurationHistogram::Bucket* const out = message->add_buckets();
    out->set_count(histogram.in_bucket(bucket));
    if (bucket < core::DurationHistogram::kBounds) {
      ToProto(core::DurationHistogram::Bound(bucket), out->mutable_up_to());
    }
  }
}

void Add(const std::string& name, uint64_t count, google::protobuf::RepeatedPtrField<v1::Count>* counts) {
  v1::Count* const out = counts->Add();
  out->set_name(name);
  out->set_count(count);
}

void StatisticsToProto(const core::GroupView& view, v1::GroupStatistics* message) {
  const core::RoundStatistics& statistics = view.statistics;
  for (size_t i = 0; i < statistics.phases.size(); ++i) {
    v1::PhaseStatistics* const phase = message->add_phases();
    phase->set_phase(static_cast<v1::Phase>(i + 1));
    HistogramToProto(statistics.phases[i].durations, phase->mutable_duration());
    ToProto(statistics.phases[i].failed, phase->mutable_failed());
  }
  Add("accepted", statistics.accepted, message->mutable_contributions());
  Add("repeated", statistics.repeated, message->mutable_contributions());
  Add("replayed", statistics.replayed, message->mutable_contributions());
  ToProto(statistics.rejected, message->mutable_contributions());
  Add("joined", view.joins, message->mutable_joins());
  ToProto(view.refused_joins, message->mutable_joins());
  message->set_present(view.summary.present);
  message->set_lost(view.lost);
  message->set_left(view.left);
  message->set_absent(view.summary.world_size - view.summary.present - view.lost - view.left);
  message->set_pending_bytes(view.pending_bytes);
  message->set_retained_bytes(view.retained_bytes);
}

void RecordToProto(const core::RecordedRound& round, v1::RecordedRound* message) {
  ToProto(round.key, message->mutable_key());
  message->set_result(*round.reason == '\0' ? "completed" : round.reason);
  ToProto(round.begun, message->mutable_began_at());
  ToProto(round.duration, message->mutable_duration());
  for (const core::Arrival& arrival : round.arrivals) {
    v1::Arrival* const out = message->add_arrivals();
    out->set_rank(arrival.rank);
    ToProto(arrival.after, out->mutable_after_first());
  }
  message->set_arrived(static_cast<uint32_t>(round.arrived));
  if (round.error.has_value()) ToProto(*round.error, &round.key, message->mutable_error());
}

}  // namespace

void ToProto(const core::ReasonCounts& counts, google::protobuf::RepeatedPtrField<v1::Count>* messages) {
  for (const auto& [reason, count] : counts.counts()) Add(reason, count, messages);
}

void ToProto(const core::GroupSummary& summary, absl::Time now, v1::GroupSummary* message) {
  message->set_job(summary.id.job);
  message->set_group(summary.id.group);
  message->set_generation(summary.generation);
  message->set_run_id(summary.run_id);
  message->set_world_size(summary.world_size);
  message->set_present(summary.present);
  message->set_layers(static_cast<uint32_t>(summary.layers));
  message->set_rounds_in_flight(static_cast<uint32_t>(summary.rounds_in_flight));
  message->set_rounds_completed(summary.rounds_completed);
  message->set_rounds_failed(summary.rounds_failed);
  if (summary.oldest_round.has_value()) ToProto(now - *summary.oldest_round, message->mutable_oldest_round_age());
}

void ToProto(const core::GroupView& view, absl::Time now, v1::GetGroupResponse* message) {
  ToProto(view.summary, now, message->mutable_summary());
  StatisticsToProto(view, message->mutable_statistics());
  for (const core::RecordedRound& round : view.recent) RecordToProto(round, message->add_recent());
  for (const core::RecordedRound& round : view.failures) RecordToProto(round, message->add_failures());
  ToProto(view.config, message->mutable_config());
  for (const core::MemberView& member : view.members) {
    v1::Member* const out = message->add_members();
    out->set_rank(member.rank);
    out->set_state(static_cast<v1::MemberState>(member.state));
    if (member.state == core::MemberState::kAbsent) continue;
    out->set_incarnation(member.incarnation);
    out->set_description(member.description);
    out->set_contributions(member.contributions);
    out->set_last_arrivals(member.last_arrivals);
    ToProto(member.joined_at, out->mutable_joined_at());
    for (const core::RoundKey& key : member.blocked_on) ToProto(key, out->add_blocked_on());
    out->set_blocked_on_count(static_cast<uint32_t>(member.blocked_on_count));
    if (!member.last_contribution.has_value()) continue;
    HistogramToProto(member.lateness, out->mutable_lateness());
    ToProto(member.last_contribution->key, out->mutable_last_contribution());
    ToProto(member.last_contribution->at, out->mutable_last_contribution_at());
    ToProto(now - member.last_contribution->at, out->mutable_since_last_contribution());
  }
  for (const core::PendingRoundView& round : view.pending) {
    v1::PendingRound* const out = message->add_pending();
    ToProto(round.key, out->mutable_key());
    Assign(round.arrived_ranks, out->mutable_arrived_ranks());
    Assign(round.missing_ranks, out->mutable_missing_ranks());
    out->set_arrived(static_cast<uint32_t>(round.arrived));
    out->set_missing(static_cast<uint32_t>(round.missing));
    ToProto(round.age, out->mutable_age());
    ToProto(round.time_left, out->mutable_time_left());
  }
}

void ToProto(const core::LayerSummary& summary, v1::LayerSummary* message) {
  ToProto(summary.spec, message->mutable_spec());
  if (summary.newest_sequence.has_value()) message->set_newest_sequence(*summary.newest_sequence);
  message->set_rounds_completed(summary.rounds_completed);
  message->set_rounds_failed(summary.rounds_failed);
  if (summary.conflict.has_value()) ToProto(*summary.conflict, summary.spec.name, message->mutable_conflict());
  if (!summary.channels.has_value()) return;
  v1::ChannelSummary* const channels = message->mutable_channels();
  channels->set_constant(summary.channels->constant);
  channels->set_exploding(summary.channels->exploding);
  Assign(summary.channels->constant_channels, channels->mutable_constant_channels());
  Assign(summary.channels->exploding_channels, channels->mutable_exploding_channels());
  channels->set_least_var(summary.channels->least_var);
  channels->set_greatest_var(summary.channels->greatest_var);
  channels->set_greatest_mean(summary.channels->greatest_mean);
}

void ToProto(const core::LayerView& view, v1::GetLayerResponse* message) {
  ToProto(view.summary, message->mutable_summary());
  if (view.batch != nullptr) BatchToProto(*view.batch, message->mutable_batch());
  if (view.summary.spec.kind != core::LayerKind::kBatchNorm) return;
  Assign(view.running.mean, message->mutable_running()->mutable_mean());
  Assign(view.running.var, message->mutable_running()->mutable_var());
  message->mutable_running()->set_updates(view.running.updates);
  if (view.running.missing.has_value()) {
    const core::MissingRounds& missing = *view.running.missing;
    if (missing.after.has_value()) message->mutable_running()->mutable_missing()->set_after(*missing.after);
    message->mutable_running()->mutable_missing()->set_before(missing.before);
  }
}

void ToProto(const state::Writer::Status& status, bool pending, v1::StateDirectory* message) {
  message->set_pending(pending);
  if (status.saved_at != absl::InfinitePast()) ToProto(status.saved_at, message->mutable_saved_at());
  message->set_error(status.error);
}

void ToProto(const core::RoundEnded& ended, absl::Time now, v1::WatchRoundsResponse* message) {
  const core::RoundOutcome& outcome = *ended.outcome;
  ToProto(outcome.key, message->mutable_key());
  if (outcome.error.has_value()) {
    ToProto(*outcome.error, &outcome.key, message->mutable_status());
  } else {
    message->mutable_status();  // Code 0: OK.
    if (outcome.key.phase == core::Phase::kForward) message->set_count(outcome.count);
  }
  ToProto(now, message->mutable_ended_at());
  ToProto(ended.duration, message->mutable_duration());
  message->set_contributors(ended.contributors);
  message->set_last_rank(ended.last_rank);
}

}  // namespace syncbn::rpc
