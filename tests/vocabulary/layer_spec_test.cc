// No field of what workers declare is forgotten: each is converted and compared.

#include "vocabulary/layer_spec.h"

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "syncbn/v1/statistics.pb.h"
#include "vocabulary/wire/convert.h"

namespace syncbn {
namespace {

using ::testing::HasSubstr;

// Changes a value into another one that may stand there.
void Change(uint32_t* value) { *value += 3; }
void Change(double* value) { *value += 0.25; }
void Change(bool* value) { *value = !*value; }
void Change(std::string* value) { *value += "'"; }
void Change(absl::Duration* value) { *value += absl::Milliseconds(1500); }
template <typename Enum, typename = std::enable_if_t<std::is_enum_v<Enum>>>
void Change(Enum* value) {
  *value = static_cast<Enum>(static_cast<int>(*value) == 1 ? 2 : 1);
}
template <typename Value>
void Change(std::optional<Value>* value) {
  if (!value->has_value()) value->emplace();
  Change(&**value);
}

// Demands of each field that a change of it is compared, named, and kept by the message.
template <typename Message, typename Struct, typename Table>
void ExpectNoneForgotten(const Struct& original, const Table& table) {
  EXPECT_EQ(Message::descriptor()->field_count(), static_cast<int>(std::tuple_size_v<Table>));
  ForEachField(table, [&](const auto& field) {
    SCOPED_TRACE(field.name);
    Struct changed = original;
    Change(&(changed.*field.member));
    EXPECT_FALSE(Equal(table, changed, original));
    const auto differences = Differences(table, changed, original);
    const bool compared = field.agreement == Agreement::kNeeded;
    EXPECT_EQ(Agree(table, changed, original), !compared);
    ASSERT_EQ(differences.size(), compared ? 1u : 0u);
    if (compared) {
      EXPECT_STREQ(differences[0].name, field.name);
      EXPECT_NE(differences[0].mine, differences[0].theirs);
    }
    Message message, of_original;
    wire::ToProto(changed, &message);
    wire::ToProto(original, &of_original);
    EXPECT_NE(message.SerializeAsString(), of_original.SerializeAsString());
    Struct converted;
    EXPECT_TRUE(wire::FromProto(message, &converted).ok());
    EXPECT_TRUE(Equal(table, converted, changed));
  });
}

TEST(LayerSpecTest, NoFieldIsForgotten) {
  LayerSpec spec;
  spec.name = "bn";
  spec.channels = 64;
  spec.eps = 1e-5;
  ExpectNoneForgotten<v1::LayerSpec>(spec, kLayerSpecFields);
  spec.momentum = 0.1;
  spec.biased_running_variance = true;
  ExpectNoneForgotten<v1::LayerSpec>(spec, kLayerSpecFields);
}

TEST(GroupConfigTest, NoFieldIsForgotten) {
  ExpectNoneForgotten<v1::GroupConfig>(GroupConfig(), kGroupConfigFields);
  GroupConfig config;
  config.round_timeout = absl::Minutes(10);
  config.rejoin_grace = absl::Milliseconds(50);
  ExpectNoneForgotten<v1::GroupConfig>(config, kGroupConfigFields);
}

TEST(LayerSpecTest, EveryFieldIsTheMessagesOfTheSameName) {
  v1::LayerSpec message;
  message.set_name("bn");
  message.set_channels(7);
  message.set_kind(v1::LAYER_KIND_SUM);
  message.set_eps(0.5);
  message.set_eps_mode(v1::EPS_MODE_CLAMP);
  message.set_numeric_policy(v1::NUMERIC_POLICY_PROPAGATE);
  message.set_momentum(0.0);
  message.set_biased_running_variance(true);
  LayerSpec spec;
  ASSERT_TRUE(wire::FromProto(message, &spec).ok());
  EXPECT_EQ(spec.name, "bn");
  EXPECT_EQ(spec.channels, 7u);
  EXPECT_EQ(spec.kind, LayerKind::kSum);
  EXPECT_EQ(spec.eps, 0.5);
  EXPECT_EQ(spec.eps_mode, EpsMode::kClamp);
  EXPECT_EQ(spec.numeric_policy, NumericPolicy::kPropagate);
  EXPECT_EQ(spec.momentum, 0.0);
  EXPECT_TRUE(spec.biased_running_variance);
  v1::LayerSpec back;
  wire::ToProto(spec, &back);
  EXPECT_EQ(back.SerializeAsString(), message.SerializeAsString());
  message.clear_momentum();
  spec = LayerSpec();
  ASSERT_TRUE(wire::FromProto(message, &spec).ok());
  EXPECT_EQ(spec.momentum, std::nullopt);
}

TEST(GroupConfigTest, EveryFieldIsTheMessagesOfTheSameName) {
  v1::GroupConfig message;
  message.mutable_round_timeout()->set_seconds(7);
  message.mutable_round_timeout()->set_nanos(500'000'000);
  message.mutable_rejoin_grace()->set_nanos(1);
  message.set_missing_policy(v1::MISSING_POLICY_PROCEED);
  message.set_min_workers(3);
  GroupConfig config;
  ASSERT_TRUE(wire::FromProto(message, &config).ok());
  EXPECT_EQ(config.round_timeout, absl::Milliseconds(7500));
  EXPECT_EQ(config.rejoin_grace, absl::Nanoseconds(1));
  EXPECT_EQ(config.missing_policy, MissingPolicy::kProceed);
  EXPECT_EQ(config.min_workers, 3u);
  v1::GroupConfig back;
  wire::ToProto(config, &back);
  EXPECT_EQ(back.SerializeAsString(), message.SerializeAsString());
}

TEST(LayerSpecTest, ZeroStandsForTheDefault) {
  v1::LayerSpec message;
  message.set_kind(v1::LAYER_KIND_BATCH_NORM);
  LayerSpec spec;
  ASSERT_TRUE(wire::FromProto(message, &spec).ok());
  EXPECT_EQ(spec, LayerSpec());
  GroupConfig config;
  ASSERT_TRUE(wire::FromProto(v1::GroupConfig(), &config).ok());
  EXPECT_TRUE(Equal(kGroupConfigFields, config, GroupConfig()));
}

TEST(LayerSpecTest, UnknownNumbersAreRefused) {
  const auto refusal = [](auto set) {
    v1::LayerSpec message;
    message.set_name("bn");
    message.set_kind(v1::LAYER_KIND_BATCH_NORM);
    set(&message);
    LayerSpec spec;
    const absl::Status status = wire::FromProto(message, &spec);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  EXPECT_THAT(refusal([](auto* m) { m->set_kind(v1::LAYER_KIND_UNSPECIFIED); }), HasSubstr("\"bn\" has kind 0"));
  EXPECT_THAT(refusal([](auto* m) { m->set_kind(static_cast<v1::LayerKind>(9)); }), HasSubstr("\"bn\" has kind 9"));
  EXPECT_THAT(refusal([](auto* m) { m->set_eps_mode(static_cast<v1::EpsMode>(3)); }), HasSubstr("eps_mode = 3"));
  EXPECT_THAT(refusal([](auto* m) { m->set_numeric_policy(static_cast<v1::NumericPolicy>(-1)); }),
              HasSubstr("numeric_policy = -1"));
  v1::GroupConfig message;
  message.set_missing_policy(static_cast<v1::MissingPolicy>(300));
  GroupConfig config;
  const absl::Status status = wire::FromProto(message, &config);
  EXPECT_THAT(std::string(status.message()), HasSubstr("missing_policy = 300"));
}

TEST(BackwardRoleTest, ZeroStandsForRequired) {
  BackwardRole role = BackwardRole::kRequired;
  EXPECT_TRUE(wire::FromProto(v1::BACKWARD_ROLE_UNSPECIFIED, &role).ok());
  EXPECT_EQ(role, BackwardRole::kRequired);
  EXPECT_TRUE(wire::FromProto(v1::BACKWARD_ROLE_NONE, &role).ok());
  EXPECT_EQ(role, BackwardRole::kNone);
  EXPECT_FALSE(wire::FromProto(static_cast<v1::BackwardRole>(4), &role).ok());
}

}  // namespace
}  // namespace syncbn
