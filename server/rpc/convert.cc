#include "server/rpc/convert.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "plumbing/duration.h"
#include "plumbing/secret.h"
#include "server/core/error.h"
#include "server/rpc/secrets.h"
#include "server/rpc/status.h"
#include "vocabulary/wire/convert.h"

namespace syncbn::rpc {
namespace {

using syncbn::ToProto;
using wire::ToProto;

absl::Span<const double> View(const google::protobuf::RepeatedField<double>& values) {
  return {values.data(), static_cast<size_t>(values.size())};
}

void Assign(const std::vector<double>& values, google::protobuf::RepeatedField<double>* field) {
  field->Add(values.begin(), values.end());
}

void Assign(const std::vector<core::Rank>& values, google::protobuf::RepeatedField<uint32_t>* field) {
  field->Add(values.begin(), values.end());
}

std::optional<core::Error> MalformedIf(const absl::Status& status) {
  if (status.ok()) return std::nullopt;
  return core::MalformedError(std::string(status.message()));
}

void ToProto(const core::RoundOutcome& outcome, v1::MergedMoments* message) {
  message->set_count(outcome.count);
  Assign(outcome.first, message->mutable_mean());
  Assign(outcome.second, message->mutable_var());
  message->set_backward_required(outcome.backward_required);
  Assign(outcome.abstaining_ranks, message->mutable_abstaining_ranks());
}

void ToProto(const core::RoundOutcome& outcome, v1::MergedGradientSums* message) {
  message->set_count(outcome.count);
  Assign(outcome.first, message->mutable_sum_dy());
  Assign(outcome.second, message->mutable_sum_dy_xmu());
}

}  // namespace

core::GroupId ToGroupId(const std::string& job, const std::string& group) {
  return {job.empty() ? "default" : job, group.empty() ? "default" : group};
}

std::optional<core::Error> FromProto(const v1::RoundKey& message, core::RoundKey* key) {
  if (message.phase() == v1::PHASE_UNSPECIFIED || !v1::Phase_IsValid(message.phase())) {
    return core::MalformedError(absl::StrCat("the key of layer \"", message.layer(), "\", sequence ",
                                             message.sequence(), ", has phase ", static_cast<int>(message.phase())));
  }
  key->layer = message.layer();
  key->sequence = message.sequence();
  key->phase = static_cast<core::Phase>(message.phase());
  return std::nullopt;
}

std::optional<core::Error> FromProto(const v1::LayerSpec& message, core::LayerSpec* spec) {
  return MalformedIf(wire::FromProto(message, spec));
}

std::optional<core::Error> FromProto(const v1::Join& message, core::Join* join) {
  join->min_protocol_version = message.min_protocol_version();
  join->max_protocol_version = message.max_protocol_version();
  join->id = ToGroupId(message.job(), message.group());
  join->rank = message.rank();
  join->world_size = message.world_size();
  join->incarnation = message.incarnation();
  join->run_id = message.run_id();
  join->generation = message.generation();
  join->description = message.description();
  join->without_outcome = message.without_outcome();
  join->resumes = message.resumes();
  join->left_ranks.assign(message.left_ranks().begin(), message.left_ranks().end());
  constexpr size_t kMostLifeKeyBytes = 64;
  if (!message.token().empty()) {
    if (const absl::Status status = CheckToken(message.token()); !status.ok()) {
      return core::MalformedError(std::string(status.message()));
    }
  }
  if (message.life_key().size() > kMostLifeKeyBytes) {
    return core::MalformedError(
        absl::StrCat("life_key has ", message.life_key().size(), " bytes; it has at most ", kMostLifeKeyBytes));
  }
  join->token = SecretOf(message.token());
  join->life_key = SecretOf(message.life_key());
  if (auto error = MalformedIf(wire::FromProto(message.config(), &join->config))) return error;
  join->layers.reserve(message.layers_size());
  for (const v1::LayerSpec& layer : message.layers()) {
    if (auto error = FromProto(layer, &join->layers.emplace_back())) return error;
  }
  return std::nullopt;
}

std::optional<core::Error> FromProto(const v1::Contribution& message, core::Contribution* contribution) {
  if (auto error = FromProto(message.key(), &contribution->key)) return error;
  const auto wrong = [&](const char* expected) {
    return core::MalformedError(
        absl::StrCat("the contribution to the ", core::Describe(contribution->key), " carries no ", expected));
  };
  switch (contribution->key.phase) {
    case core::Phase::kForward:
      if (!message.has_moments()) return wrong("moments");
      contribution->count = message.moments().count();
      contribution->first = View(message.moments().mean());
      contribution->second = View(message.moments().m2());
      return MalformedIf(wire::FromProto(message.moments().backward_role(), &contribution->backward_role));
    case core::Phase::kBackward:
      if (!message.has_gradient_sums()) return wrong("gradient_sums");
      contribution->first = View(message.gradient_sums().sum_dy());
      contribution->second = View(message.gradient_sums().sum_dy_xmu());
      return std::nullopt;
    case core::Phase::kSum:
      if (!message.has_vector()) return wrong("vector");
      contribution->first = View(message.vector().value());
      return std::nullopt;
  }
  return std::nullopt;
}

std::optional<core::Error> FromProto(const v1::EndedRound& message, core::EndedReport* report) {
  if (auto error = FromProto(message.key(), &report->key)) return error;
  if (message.has_error()) {
    if (message.error().code() == 0) {
      return core::MalformedError(
          absl::StrCat("the error of the ", core::Describe(report->key), ", which has ended, has no code"));
    }
    report->error = FromProto(message.error());
    return std::nullopt;
  }
  report->missing_ranks.assign(message.missing_ranks().begin(), message.missing_ranks().end());
  report->abstaining_ranks.assign(message.abstaining_ranks().begin(), message.abstaining_ranks().end());
  report->digest = message.digest();
  report->count = message.count();
  report->backward_required = message.backward_required();
  return std::nullopt;
}

void ToProto(const core::SendJoined& joined, const std::string& description, v1::Joined* message) {
  message->set_protocol_version(joined.protocol_version);
  message->set_incarnation(joined.incarnation);
  message->set_run_id(joined.run_id);
  ToProto(joined.config, message->mutable_config());
  message->set_description(description);
  ToProto(joined.membership, message->mutable_membership());
  message->set_memory(joined.memory);
  for (const core::RoundKey& key : joined.newest_rounds) ToProto(key, message->add_newest_rounds());
}

void ToProto(const core::Membership& membership, v1::Membership* message) {
  message->set_world_size(membership.world_size);
  Assign(membership.present_ranks, message->mutable_present_ranks());
  Assign(membership.left_ranks, message->mutable_left_ranks());
  message->set_version(membership.version);
}

void ToProto(const core::RoundOutcome& outcome, v1::RoundResult* message) {
  ToProto(outcome.key, message->mutable_key());
  if (outcome.error.has_value()) {
    ToProto(*outcome.error, &outcome.key, message->mutable_error());
    message->set_refused(outcome.refused);
    return;
  }
  Assign(outcome.missing_ranks, message->mutable_missing_ranks());
  message->set_digest(outcome.digest);
  switch (outcome.key.phase) {
    case core::Phase::kForward:
      return ToProto(outcome, message->mutable_moments());
    case core::Phase::kBackward:
      return ToProto(outcome, message->mutable_gradient_sums());
    case core::Phase::kSum:
      return Assign(outcome.first, message->mutable_vector()->mutable_value());
  }
}

void ToProto(const core::SendLayerError& error, v1::LayerError* message) {
  message->set_layer(error.layer);
  ToProto(error.error, error.layer, message->mutable_error());
}

void ToProto(const core::LateRound& round, v1::LateRound* message) {
  ToProto(round.key, message->mutable_key());
  ToProto(round.age, message->mutable_age());
  Assign(round.missing_ranks, message->mutable_missing_ranks());
  message->set_missing(round.missing);
}

}  // namespace syncbn::rpc
