#include "tests/simulation/frame.h"

#include <variant>

#include "absl/strings/str_cat.h"
#include "client/cc/errors.h"
#include "server/core/error.h"

namespace syncbn::simulation {
namespace {

session::Outcome ToOutcome(const core::RoundOutcome& outcome) {
  session::Outcome converted;
  converted.key = outcome.key;
  converted.payload = converted.key.phase;
  converted.digest = outcome.digest;
  converted.refused = outcome.refused;
  converted.abstaining_ranks = outcome.abstaining_ranks;
  if (outcome.error.has_value()) {
    converted.status = ToStatus(*outcome.error, outcome.key.layer);
    return converted;
  }
  converted.result =
      RoundResult{outcome.count, outcome.first, outcome.second, outcome.backward_required, outcome.missing_ranks};
  return converted;
}

std::shared_ptr<const core::EndedReport> ToReport(const RoundKey& key, const session::EndedRound& ended) {
  auto report = std::make_shared<core::EndedReport>();
  report->key = key;
  if (!ended.error.ok()) {
    report->error = ToError(ended.error);
    return report;
  }
  report->missing_ranks = ended.missing_ranks;
  report->digest = ended.digest;
  report->count = ended.count;
  report->backward_required = ended.backward_required;
  report->abstaining_ranks = ended.abstaining_ranks;
  return report;
}

session::Membership ToSession(const core::Membership& membership) {
  return {membership.present_ranks.size(), membership.left_ranks, membership.version};
}

}  // namespace

std::string Name(const RoundKey& key) {
  return absl::StrCat(key.layer, "/", key.sequence, "/", static_cast<int>(key.phase));
}

core::Join MakeJoin(const Settings& settings, core::Rank rank, uint64_t incarnation, uint64_t run_id) {
  core::Join join = testing::MakeJoin(rank, settings.world_size);
  join.incarnation = incarnation;
  join.run_id = run_id;
  join.config = settings.config;
  join.resumes = settings.Resumes(rank);
  if (settings.complete_set) join.layers = settings.layers;
  return join;
}

FramePtr FromSession(const session::ClientFrame& from, const Settings& settings, core::Rank rank) {
  auto frame = std::make_shared<Frame>();
  if (from.join.has_value()) {
    frame->join = MakeJoin(settings, rank, from.join->incarnation, from.join->run_id);
    frame->join->layers.clear();
    frame->join->left_ranks = from.join->left_ranks;
    frame->join->without_outcome = from.join->without_outcome;
    for (const auto& layer : from.join->layers) frame->join->layers.push_back(*layer);
  }
  for (const auto& layer : from.layers) frame->layers.push_back(*layer);
  for (const session::ContributionPtr& contribution : from.contributions) {
    const auto& simulated = static_cast<const SimulatedContribution&>(*contribution);
    frame->parts.push_back({simulated.key(), simulated.numbers, nullptr});
    if (const auto* ended = simulated.repeats()) frame->parts.back().report = ToReport(simulated.key(), *ended);
  }
  frame->left_ranks = from.left_ranks;
  frame->caught_up = from.caught_up;
  frame->forgotten = from.forgotten;
  if (from.blocked_on != nullptr) frame->blocked_on.push_back(from.blocked_on->key());
  frame->leave = from.leave.has_value();
  frame->membership_read = from.membership_read;
  return frame;
}

core::FrameReceived ToEvent(core::StreamId stream, const Frame& frame) {
  core::FrameReceived event;
  event.stream = stream;
  event.join = frame.join;
  event.layers = frame.layers;
  for (const Part& part : frame.parts) {
    const testing::Numbers& numbers = *part.numbers;
    if (part.report != nullptr) event.ended.push_back(*part.report);
    if (part.report != nullptr && part.report->error.has_value()) continue;
    event.contributions.push_back({part.key, numbers.count, numbers.role, numbers.first, numbers.second});
    event.contributions.back().repeats = part.report != nullptr;
  }
  event.left_ranks = frame.left_ranks;
  event.caught_up = frame.caught_up;
  event.forgotten = frame.forgotten;
  event.blocked_on = frame.blocked_on;
  if (frame.leave) event.leave = "finished";
  event.membership_read = frame.membership_read;
  return event;
}

absl::Status ToStatus(const core::Error& error, const std::string& layer) {
  ErrorDetails details{error.reason, layer, error.ranks};
  details.resume_at = error.resume_at;
  return MakeStatus(error.code, error.message, details);
}

core::Error ToError(const absl::Status& status) {
  const ErrorDetails details = DetailsOf(status);
  core::Error error = core::MakeError(status.code(), core::ReasonNamed(details.reason), std::string(status.message()),
                                      {details.ranks.begin(), details.ranks.end()});
  error.resume_at = details.resume_at;
  return error;
}

ServerFramePtr ToSession(const core::Effect& effect) {
  auto frame = std::make_shared<session::ServerFrame>();
  if (const auto* joined = std::get_if<core::SendJoined>(&effect)) {
    frame->joined = session::Joined{joined->incarnation,           joined->run_id, *joined->config.round_timeout,
                                    ToSession(joined->membership), joined->memory, joined->newest_rounds};
  } else if (const auto* results = std::get_if<core::SendResults>(&effect)) {
    for (const auto& outcome : results->outcomes) frame->outcomes.push_back(ToOutcome(*outcome));
  } else if (const auto* change = std::get_if<core::SendMembership>(&effect)) {
    frame->membership = ToSession(change->membership);
  } else if (const auto* late = std::get_if<core::SendLateRounds>(&effect)) {
    for (const core::LateRound& round : late->rounds) {
      frame->late_rounds.push_back({round.key, round.age, round.missing_ranks, round.missing});
    }
  } else {
    return nullptr;
  }
  return frame;
}

std::vector<core::StreamId> ReceiversOf(const core::Effect& effect) {
  if (const auto* joined = std::get_if<core::SendJoined>(&effect)) return {joined->stream};
  if (const auto* results = std::get_if<core::SendResults>(&effect)) return results->streams;
  if (const auto* change = std::get_if<core::SendMembership>(&effect)) return change->streams;
  if (const auto* late = std::get_if<core::SendLateRounds>(&effect)) return late->streams;
  return {};
}

}  // namespace syncbn::simulation
