// Tables of a struct's fields, which drive what is done to every field alike: conversion, comparison, error texts.

#ifndef SYNCBN_VOCABULARY_FIELDS_H_
#define SYNCBN_VOCABULARY_FIELDS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "vocabulary/enums.h"

namespace syncbn {

// Says if the workers of a group must agree on a field.
enum class Agreement : uint8_t { kNeeded, kNotNeeded };

// One field of a struct. `name` is that of the field of the struct's message in statistics.proto.
template <typename Struct, typename Value>
struct Field {
  const char* name;
  Value Struct::*member;
  Agreement agreement = Agreement::kNeeded;
};

template <typename Struct, typename Value>
Field(const char*, Value Struct::*) -> Field<Struct, Value>;
template <typename Struct, typename Value>
Field(const char*, Value Struct::*, Agreement) -> Field<Struct, Value>;

// Calls `visit` with each field of a table, a std::tuple of Fields, in order.
template <typename Table, typename Visit>
void ForEachField(const Table& table, Visit&& visit) {
  std::apply([&visit](const auto&... fields) { (visit(fields), ...); }, table);
}

// A field's value as an error text has it.
inline std::string ToText(uint32_t value) { return absl::StrCat(value); }
inline std::string ToText(double value) { return absl::StrCat(value); }
inline std::string ToText(bool value) { return value ? "1" : "0"; }
inline std::string ToText(const std::string& value) { return value; }
inline std::string ToText(absl::Duration value) { return absl::FormatDuration(value); }
template <typename Enum, typename = std::enable_if_t<std::is_enum_v<Enum>>>
std::string ToText(Enum value) {
  return Name(value);
}
template <typename Value>
std::string ToText(const std::optional<Value>& value) {
  return value.has_value() ? ToText(*value) : "none";
}

struct FieldDifference {
  const char* name;
  std::string mine, theirs;
};

// Returns the differences of two structs in the fields on which workers must agree, in the order of the table.
template <typename Table, typename Struct>
std::vector<FieldDifference> Differences(const Table& table, const Struct& mine, const Struct& theirs) {
  std::vector<FieldDifference> differences;
  ForEachField(table, [&](const auto& field) {
    if (field.agreement == Agreement::kNotNeeded || mine.*field.member == theirs.*field.member) return;
    differences.push_back({field.name, ToText(mine.*field.member), ToText(theirs.*field.member)});
  });
  return differences;
}

// Returns whether workers that declare these agree. Allocates nothing.
template <typename Table, typename Struct>
bool Agree(const Table& table, const Struct& a, const Struct& b) {
  bool agree = true;
  ForEachField(table, [&](const auto& field) {
    agree = agree && (field.agreement == Agreement::kNotNeeded || a.*field.member == b.*field.member);
  });
  return agree;
}

// Returns whether all fields are equal.
template <typename Table, typename Struct>
bool Equal(const Table& table, const Struct& a, const Struct& b) {
  bool equal = true;
  ForEachField(table, [&](const auto& field) { equal = equal && a.*field.member == b.*field.member; });
  return equal;
}

}  // namespace syncbn

#endif  // SYNCBN_VOCABULARY_FIELDS_H_
