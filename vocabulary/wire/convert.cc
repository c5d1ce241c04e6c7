#include "vocabulary/wire/convert.h"

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/duration.pb.h"
#include "google/protobuf/message.h"
#include "plumbing/check.h"
#include "plumbing/duration.h"

namespace syncbn::wire {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

template <typename Ours, typename Wire>
constexpr bool Same(Ours ours, Wire wire) {
  return static_cast<int>(ours) == static_cast<int>(wire);
}
static_assert(Same(Phase::kForward, v1::PHASE_FORWARD) && Same(Phase::kBackward, v1::PHASE_BACKWARD) &&
              Same(Phase::kSum, v1::PHASE_SUM) && Same(Phase::kSum, v1::Phase_MAX));
static_assert(Same(MissingPolicy::kFail, v1::MISSING_POLICY_FAIL) &&
              Same(MissingPolicy::kProceed, v1::MISSING_POLICY_PROCEED) &&
              Same(MissingPolicy::kWait, v1::MISSING_POLICY_WAIT) && Same(MissingPolicy::kWait, v1::MissingPolicy_MAX));
static_assert(Same(LayerKind::kBatchNorm, v1::LAYER_KIND_BATCH_NORM) && Same(LayerKind::kSum, v1::LAYER_KIND_SUM) &&
              Same(LayerKind::kSum, v1::LayerKind_MAX));
static_assert(Same(EpsMode::kAdd, v1::EPS_MODE_ADD) && Same(EpsMode::kClamp, v1::EPS_MODE_CLAMP) &&
              Same(EpsMode::kClamp, v1::EpsMode_MAX));
static_assert(Same(NumericPolicy::kRefuse, v1::NUMERIC_POLICY_REFUSE) &&
              Same(NumericPolicy::kPropagate, v1::NUMERIC_POLICY_PROPAGATE) &&
              Same(NumericPolicy::kPropagate, v1::NumericPolicy_MAX));
static_assert(Same(BackwardRole::kRequired, v1::BACKWARD_ROLE_REQUIRED) &&
              Same(BackwardRole::kIfRequired, v1::BACKWARD_ROLE_IF_REQUIRED) &&
              Same(BackwardRole::kNone, v1::BACKWARD_ROLE_NONE) && Same(BackwardRole::kNone, v1::BackwardRole_MAX));

// Gives `visit` each field of the table and that of the message with the same name.
template <typename Wire, typename Table, typename Visit>
void ForEachPair(const Table& table, Visit&& visit) {
  static const auto descriptors = [&table] {
    std::array<const FieldDescriptor*, std::tuple_size_v<Table>> found = {};
    size_t i = 0;
    ForEachField(table, [&](const auto& field) {
      found[i] = Wire::descriptor()->FindFieldByName(field.name);
      SYNCBN_CHECK(found[i] != nullptr, Wire::descriptor()->full_name(), " has no field ", field.name);
      ++i;
    });
    SYNCBN_CHECK(static_cast<int>(i) == Wire::descriptor()->field_count(), Wire::descriptor()->full_name(),
                 " has fields that its table does not");
    return found;
  }();
  const FieldDescriptor* const* next = descriptors.data();
  ForEachField(table, [&](const auto& field) { visit(field, *next++); });
}

void Write(uint32_t value, Message* message, const FieldDescriptor* field) {
  message->GetReflection()->SetUInt32(message, field, value);
}
void Write(double value, Message* message, const FieldDescriptor* field) {
  message->GetReflection()->SetDouble(message, field, value);
}
void Write(bool value, Message* message, const FieldDescriptor* field) {
  message->GetReflection()->SetBool(message, field, value);
}
void Write(const std::string& value, Message* message, const FieldDescriptor* field) {
  message->GetReflection()->SetString(message, field, value);
}
void Write(absl::Duration value, Message* message, const FieldDescriptor* field) {
  Message* const duration = message->GetReflection()->MutableMessage(message, field);
  syncbn::ToProto(value, google::protobuf::DynamicCastToGenerated<google::protobuf::Duration>(duration));
}
template <typename Enum, typename = std::enable_if_t<std::is_enum_v<Enum>>>
void Write(Enum value, Message* message, const FieldDescriptor* field) {
  message->GetReflection()->SetEnumValue(message, field, static_cast<int>(value));
}
template <typename Value>
void Write(const std::optional<Value>& value, Message* message, const FieldDescriptor* field) {
  if (value.has_value()) Write(*value, message, field);
}

using Problem = std::optional<std::string>;

Problem Read(const Message& message, const FieldDescriptor* field, uint32_t* value) {
  *value = message.GetReflection()->GetUInt32(message, field);
  return std::nullopt;
}
Problem Read(const Message& message, const FieldDescriptor* field, double* value) {
  *value = message.GetReflection()->GetDouble(message, field);
  return std::nullopt;
}
Problem Read(const Message& message, const FieldDescriptor* field, bool* value) {
  *value = message.GetReflection()->GetBool(message, field);
  return std::nullopt;
}
Problem Read(const Message& message, const FieldDescriptor* field, std::string* value) {
  *value = message.GetReflection()->GetString(message, field);
  return std::nullopt;
}
Problem Read(const Message& message, const FieldDescriptor* field, absl::Duration* value) {
  const Message& duration = message.GetReflection()->GetMessage(message, field);
  *value = syncbn::FromProto(*google::protobuf::DynamicCastToGenerated<google::protobuf::Duration>(&duration));
  return std::nullopt;
}
template <typename Enum, typename = std::enable_if_t<std::is_enum_v<Enum>>>
Problem Read(const Message& message, const FieldDescriptor* field, Enum* value) {
  const int number = message.GetReflection()->GetEnumValue(message, field);
  if (number == 0) return std::nullopt;  // The struct has the default.
  if (field->enum_type()->FindValueByNumber(number) == nullptr) {
    return absl::StrCat(field->name(), " = ", number, " is not known");
  }
  *value = static_cast<Enum>(number);
  return std::nullopt;
}
template <typename Value>
Problem Read(const Message& message, const FieldDescriptor* field, std::optional<Value>* value) {
  return message.GetReflection()->HasField(message, field) ? Read(message, field, &value->emplace()) : std::nullopt;
}

template <typename Table, typename Struct, typename Wire>
void WriteFields(const Table& table, const Struct& from, Wire* message) {
  ForEachPair<Wire>(table, [&](const auto& field, const FieldDescriptor* descriptor) {
    Write(from.*field.member, message, descriptor);
  });
}

template <typename Table, typename Struct, typename Wire>
absl::Status ReadFields(const Table& table, const Wire& message, Struct* to) {
  Problem problem;
  ForEachPair<Wire>(table, [&](const auto& field, const FieldDescriptor* descriptor) {
    if (!problem.has_value()) problem = Read(message, descriptor, &(to->*field.member));
  });
  return problem.has_value() ? absl::InvalidArgumentError(*problem) : absl::OkStatus();
}

}  // namespace

void ToProto(const LayerSpec& spec, v1::LayerSpec* message) { WriteFields(kLayerSpecFields, spec, message); }
void ToProto(const GroupConfig& config, v1::GroupConfig* message) { WriteFields(kGroupConfigFields, config, message); }

absl::Status FromProto(const v1::LayerSpec& message, LayerSpec* spec) {
  if (message.kind() == v1::LAYER_KIND_UNSPECIFIED || !v1::LayerKind_IsValid(message.kind())) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer \"", message.name(), "\" has kind ", static_cast<int>(message.kind())));
  }
  return ReadFields(kLayerSpecFields, message, spec);
}

absl::Status FromProto(v1::BackwardRole number, BackwardRole* role) {
  if (v1::BackwardRole_IsValid(number)) {
    if (number != 0) *role = static_cast<BackwardRole>(number);
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("backward_role = ", static_cast<int>(number), " is not known"));
}

absl::Status FromProto(const v1::GroupConfig& message, GroupConfig* config) {
  return ReadFields(kGroupConfigFields, message, config);
}

}  // namespace syncbn::wire
