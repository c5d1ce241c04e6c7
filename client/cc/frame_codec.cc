#include "client/cc/frame_codec.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>

#include "client/cc/contribution.h"
#include "client/cc/errors.h"
#include "plumbing/byte_pieces.h"
#include "plumbing/check.h"
#include "plumbing/duration.h"
#include "plumbing/messages.h"
#include "plumbing/wire_reader.h"
#include "syncbn/v1/statistics.pb.h"
#include "vocabulary/protocol_version.h"
#include "vocabulary/wire/convert.h"
#include "vocabulary/wire/read.h"

namespace syncbn {
namespace {

using syncbn::FromProto;  // For durations.

// ---- To the master --------------------------------------------------------------------------------------------------

Buffer Encode(const v1::WorkerFrame& frame) {
  Buffer buffer(frame.ByteSizeLong());
  frame.SerializeWithCachedSizesToArray(buffer.data());
  return buffer;
}

void ToProto(const session::Join& from, const Worker::Options& options, v1::Join* join) {
  join->set_min_protocol_version(kProtocolVersion);
  join->set_max_protocol_version(kProtocolVersion);
  join->set_job(options.job);
  join->set_group(options.group);
  join->set_rank(options.rank);
  join->set_world_size(options.world_size);
  join->set_incarnation(from.incarnation);
  join->set_run_id(from.run_id);
  join->set_generation(options.generation);
  join->set_description(options.description);
  join->set_token(options.token);
  wire::ToProto({options.round_timeout, options.missing_policy, options.min_workers, options.rejoin_grace},
                join->mutable_config());
  for (const auto& layer : from.layers) wire::ToProto(*layer, join->add_layers());
  join->set_without_outcome(from.without_outcome);
  join->set_resumes(true);
  join->mutable_left_ranks()->Add(from.left_ranks.begin(), from.left_ranks.end());
}

void ToProto(const session::Contribution& contribution, v1::EndedRound* message) {
  const session::EndedRound& from = *contribution.repeats();
  wire::ToProto(contribution.key(), message->mutable_key());
  if (!from.error.ok()) {
    SYNCBN_CHECK(message->mutable_error()->ParseFromString(ToSerializedStatus(from.error)));
    return;
  }
  message->mutable_missing_ranks()->Add(from.missing_ranks.begin(), from.missing_ranks.end());
  message->set_digest(from.digest);
  message->set_count(from.count);
  message->set_backward_required(from.backward_required);
  message->mutable_abstaining_ranks()->Add(from.abstaining_ranks.begin(), from.abstaining_ranks.end());
}

// Returns an encoded contribution as one of WorkerFrame.repeats: it differs in its tag alone.
Buffer AsRepeat(const Buffer& encoded) {
  constexpr uint8_t kLengthDelimited = 2;
  static_assert(v1::WorkerFrame::kRepeatsFieldNumber < 16 && v1::WorkerFrame::kContributionsFieldNumber < 16);
  Buffer repeat(encoded.size());
  std::memcpy(repeat.data(), encoded.data(), encoded.size());
  repeat.data()[0] = v1::WorkerFrame::kRepeatsFieldNumber << 3 | kLengthDelimited;
  return repeat;
}

// Appends what comes before the contributions, if there is anything.
void EncodeHead(const session::ClientFrame& frame, const Worker::Options& options, const std::string& life_key,
                std::vector<Buffer>* parts) {
  v1::WorkerFrame head;
  if (frame.join.has_value()) {
    ToProto(*frame.join, options, head.mutable_join());
    head.mutable_join()->set_life_key(life_key);
  }
  for (const auto& layer : frame.layers) wire::ToProto(*layer, head.add_layers());
  for (const session::ContributionPtr& contribution : frame.contributions) {
    if (contribution->repeats() != nullptr) ToProto(*contribution, head.add_ended_rounds());
  }
  parts->push_back(Encode(head));
}

bool HasHead(const session::ClientFrame& frame) {
  return frame.join.has_value() || !frame.layers.empty() ||
         std::any_of(frame.contributions.begin(), frame.contributions.end(),
                     [](const session::ContributionPtr& contribution) { return contribution->repeats() != nullptr; });
}

bool HasTail(const session::ClientFrame& frame) {
  return frame.caught_up || !frame.left_ranks.empty() || frame.blocked_on != nullptr || frame.leave.has_value() ||
         frame.membership_read != 0;
}

// Returns whether the frame's tail only says that the worker is blocked, as most do.
bool IsOnlyBlocked(const session::ClientFrame& frame) {
  return frame.blocked_on != nullptr && !frame.caught_up && frame.left_ranks.empty() && !frame.leave.has_value() &&
         frame.membership_read == 0;
}

// ---- From the master, by protobuf -----------------------------------------------------------------------------------

RoundKey FromProto(v1::RoundKey* key) {
  return {std::move(*key->mutable_layer()), key->sequence(), static_cast<Phase>(key->phase())};
}

template <typename T>
std::vector<T> FromProto(const google::protobuf::RepeatedField<T>& field) {
  return std::vector<T>(field.begin(), field.end());
}

session::Membership FromProto(const v1::Membership& membership) {
  return {static_cast<size_t>(membership.present_ranks_size()), FromProto(membership.left_ranks()),
          membership.version()};
}

session::Joined FromProto(v1::Joined* message) {
  session::Joined joined{
      message->incarnation(),           message->run_id(), FromProto(message->config().round_timeout()),
      FromProto(message->membership()), message->memory(), {}};
  for (v1::RoundKey& key : *message->mutable_newest_rounds()) joined.newest_rounds.push_back(FromProto(&key));
  return joined;
}

session::LateRound FromProto(v1::LateRound* late) {
  return {FromProto(late->mutable_key()), FromProto(late->age()), FromProto(late->missing_ranks()), late->missing()};
}

session::Outcome FromProto(v1::RoundResult* message) {
  session::Outcome outcome;
  outcome.key = FromProto(message->mutable_key());
  outcome.digest = message->digest();
  outcome.refused = message->refused();
  RoundResult& result = outcome.result;
  result.missing_ranks = FromProto(message->missing_ranks());
  switch (message->outcome_case()) {
    case v1::RoundResult::kMoments:
      outcome.payload = Phase::kForward;
      result.count = message->moments().count();
      result.first = FromProto(message->moments().mean());
      result.second = FromProto(message->moments().var());
      result.backward_required = message->moments().backward_required();
      outcome.abstaining_ranks = FromProto(message->moments().abstaining_ranks());
      break;
    case v1::RoundResult::kGradientSums:
      outcome.payload = Phase::kBackward;
      result.count = message->gradient_sums().count();
      result.first = FromProto(message->gradient_sums().sum_dy());
      result.second = FromProto(message->gradient_sums().sum_dy_xmu());
      break;
    case v1::RoundResult::kVector:
      outcome.payload = Phase::kSum;
      result.first = FromProto(message->vector().value());
      break;
    case v1::RoundResult::kError:
      outcome.status = FromSerializedStatus(message->error().SerializeAsString());
      break;
    case v1::RoundResult::OUTCOME_NOT_SET:
      outcome.status = absl::InternalError("the master sent a round's result without an outcome");
      break;
  }
  return outcome;
}

// ---- From the master, without protobuf ------------------------------------------------------------------------------

// All of these return false for what is malformed or in another form than serializers write: see
// vocabulary/wire/read.h.

bool ReadVector(const WireReader& field, VectorPool* spare, std::vector<double>* vector) {
  if (field.type() != WireType::kBytes || !wire::AreDoubles(field.bytes())) return false;
  *vector = spare->Take(field.bytes().size() / sizeof(double));
  wire::CopyDoubles(field.bytes(), vector->data());
  return true;
}

bool ReadVectorResult(const BytePieces& bytes, VectorPool* spare, session::Outcome* outcome) {
  WireReader fields(bytes);
  while (fields.NextInOrder()) {
    if (fields.number() != v1::MergedVector::kValueFieldNumber || !ReadVector(fields, spare, &outcome->result.first)) {
      return false;
    }
  }
  return fields.well_formed();
}

// Reads v1::MergedMoments, or v1::MergedGradientSums, which have the same first three fields and no others.
bool ReadTwoVectors(const BytePieces& bytes, VectorPool* spare, session::Outcome* outcome) {
  static_assert(int{v1::MergedMoments::kCountFieldNumber} == int{v1::MergedGradientSums::kCountFieldNumber});
  static_assert(int{v1::MergedMoments::kMeanFieldNumber} == int{v1::MergedGradientSums::kSumDyFieldNumber});
  static_assert(int{v1::MergedMoments::kVarFieldNumber} == int{v1::MergedGradientSums::kSumDyXmuFieldNumber});
  const bool moments = outcome->payload == Phase::kForward;
  RoundResult& result = outcome->result;
  WireReader fields(bytes);
  while (fields.NextInOrder()) {
    const bool integer = fields.type() == WireType::kVarint;
    if (fields.number() == v1::MergedMoments::kCountFieldNumber && integer) {
      result.count = static_cast<int64_t>(fields.integer());
    } else if (fields.number() == v1::MergedMoments::kMeanFieldNumber) {
      if (!ReadVector(fields, spare, &result.first)) return false;
    } else if (fields.number() == v1::MergedMoments::kVarFieldNumber) {
      if (!ReadVector(fields, spare, &result.second)) return false;
    } else if (moments && fields.number() == v1::MergedMoments::kBackwardRequiredFieldNumber && integer) {
      result.backward_required = fields.integer() != 0;
    } else if (!moments || fields.number() != v1::MergedMoments::kAbstainingRanksFieldNumber ||
               fields.type() != WireType::kBytes || !wire::ReadNumbers(fields.bytes(), &outcome->abstaining_ranks)) {
      return false;
    }
  }
  return fields.well_formed();
}

// Reads what a v1::RoundResult has beside its key.
bool ReadOutcomeField(const WireReader& field, VectorPool* spare, session::Outcome* outcome) {
  switch (field.number()) {
    case v1::RoundResult::kMomentsFieldNumber:
      outcome->payload = Phase::kForward;
      return field.type() == WireType::kBytes && ReadTwoVectors(field.bytes(), spare, outcome);
    case v1::RoundResult::kGradientSumsFieldNumber:
      outcome->payload = Phase::kBackward;
      return field.type() == WireType::kBytes && ReadTwoVectors(field.bytes(), spare, outcome);
    case v1::RoundResult::kVectorFieldNumber:
      outcome->payload = Phase::kSum;
      return field.type() == WireType::kBytes && ReadVectorResult(field.bytes(), spare, outcome);
    case v1::RoundResult::kMissingRanksFieldNumber:
      return field.type() == WireType::kBytes && wire::ReadNumbers(field.bytes(), &outcome->result.missing_ranks);
    case v1::RoundResult::kDigestFieldNumber:
      outcome->digest = field.integer();
      return field.type() == WireType::kFixed64;
    default:
      return false;  // An error, which protobuf reads, or `refused`, which comes with one.
  }
}

bool ReadOutcome(const BytePieces& bytes, VectorPool* spare, session::Outcome* outcome) {
  WireReader fields(bytes);
  if (!fields.NextInOrder() || fields.number() != v1::RoundResult::kKeyFieldNumber ||
      fields.type() != WireType::kBytes || !wire::ReadRoundKey(fields.bytes(), &outcome->key)) {
    return false;
  }
  int payloads = 0;
  while (fields.NextInOrder()) {
    payloads += fields.number() <= v1::RoundResult::kVectorFieldNumber ? 1 : 0;
    if (payloads != 1 || !ReadOutcomeField(fields, spare, outcome)) return false;
  }
  return fields.well_formed() && payloads == 1;
}

// Reads a frame of outcomes alone.
bool ReadOutcomes(const BytePieces& bytes, VectorPool* spare, std::vector<session::Outcome>* outcomes) {
  WireReader fields(bytes);
  while (fields.Next()) {
    if (fields.number() != v1::MasterFrame::kResultsFieldNumber || fields.type() != WireType::kBytes ||
        !ReadOutcome(fields.bytes(), spare, &outcomes->emplace_back())) {
      return false;
    }
  }
  return fields.well_formed();
}

}  // namespace

void EncodeFrame(const session::ClientFrame& frame, const Worker::Options& options, const std::string& life_key,
                 std::vector<Buffer>* parts) {
  if (HasHead(frame)) EncodeHead(frame, options, life_key, parts);
  for (const session::ContributionPtr& contribution : frame.contributions) {
    const Buffer& encoded = static_cast<const EncodedContribution&>(*contribution).encoded();
    const session::EndedRound* const repeats = contribution->repeats();
    if (repeats == nullptr) {
      parts->push_back(encoded);
    } else if (repeats->error.ok()) {
      parts->push_back(AsRepeat(encoded));
    }
  }
  if (!parts->empty() && !HasTail(frame)) return;
  if (IsOnlyBlocked(frame)) {
    parts->push_back(EncodeBlockedOn(frame.blocked_on->key()));
    return;
  }
  v1::WorkerFrame tail;
  tail.set_caught_up(frame.caught_up);
  tail.set_membership_read(frame.membership_read);
  for (const RoundKey& key : frame.forgotten) wire::ToProto(key, tail.add_forgotten());
  tail.mutable_left_ranks()->Add(frame.left_ranks.begin(), frame.left_ranks.end());
  if (frame.blocked_on != nullptr) {
    wire::ToProto(frame.blocked_on->key(), tail.add_blocked_on());
  }
  if (frame.leave.has_value()) tail.mutable_leave()->set_reason(*frame.leave);
  parts->push_back(Encode(tail));
}

absl::StatusOr<session::ServerFrame> DecodeFrame(absl::Span<const absl::string_view> parts, VectorPool* spare) {
  const BytePieces pieces(parts);
  session::ServerFrame frame;
  if (ReadOutcomes(pieces, spare, &frame.outcomes)) return frame;
  frame.outcomes.clear();
  std::string copy;
  const absl::string_view bytes = pieces.Join(&copy);
  FrameArena arena;
  auto* const message = arena.Create<v1::MasterFrame>();
  if (!message->ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    return absl::InternalError("the master sent a frame that is not a syncbn.v1.MasterFrame");
  }
  if (message->has_joined()) frame.joined = FromProto(message->mutable_joined());
  if (message->has_membership()) frame.membership = FromProto(message->membership());
  for (v1::LateRound& late : *message->mutable_late_rounds()) frame.late_rounds.push_back(FromProto(&late));
  // Layer errors are for people: the rounds that they concern have their outcomes among the results.
  frame.outcomes.reserve(static_cast<size_t>(message->results_size()));
  for (v1::RoundResult& result : *message->mutable_results()) frame.outcomes.push_back(FromProto(&result));
  return frame;
}

}  // namespace syncbn
