#include "client/cc/session/results.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"

namespace syncbn::session {
namespace {

int64_t BitsOf(double value) {
  int64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// As integers without their signs, doubles are ordered by magnitude, and infinity and NaN are the greatest.
bool AllFinite(const std::vector<double>& values) {
  const int64_t greatest = BitsOf(std::numeric_limits<double>::max());
  int64_t signs = 0;
  for (const double value : values) signs |= greatest - (BitsOf(value) & std::numeric_limits<int64_t>::max());
  return signs >= 0;
}

// Returns true if no value has its sign bit set. False does not imply a negative value: -0 and NaN may have it too.
bool AllPositive(const std::vector<double>& values) {
  int64_t signs = 0;
  for (const double value : values) signs |= BitsOf(value);
  return signs >= 0;
}

// Returns true if all are finite and have no sign bit set. False does not imply that one is wrong: -0 is right.
bool AllFiniteAndPositive(const std::vector<double>& values) {
  const int64_t greatest = BitsOf(std::numeric_limits<double>::max());
  int64_t signs = 0;
  for (const double value : values) {
    const int64_t bits = BitsOf(value);
    signs |= bits | (greatest - (bits & std::numeric_limits<int64_t>::max()));
  }
  return signs >= 0;
}

// Checks means and variances. The loops over channels have no early exit so that they vectorize; the channel to name is
// searched only after a check has failed.
absl::Status CheckMoments(const RoundKey& key, bool must_be_finite, const RoundResult& result) {
  const bool right =
      must_be_finite ? AllFinite(result.first) && AllFiniteAndPositive(result.second) : AllPositive(result.second);
  if (right) return absl::OkStatus();
  const auto bad = [&key](const char* what, double value, size_t channel) {
    return absl::InternalError(absl::StrCat("the master sent a ", what, " of ", value, " for channel ", channel,
                                            " of layer \"", key.layer, "\""));
  };
  for (size_t i = 0; i < result.first.size(); ++i) {
    if (must_be_finite && !std::isfinite(result.first[i])) return bad("mean", result.first[i], i);
  }
  for (size_t i = 0; i < result.second.size(); ++i) {
    const double variance = result.second[i];
    if (variance < 0 || (must_be_finite && !std::isfinite(variance))) return bad("variance", variance, i);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckResult(const RoundKey& key, Phase payload, size_t length, bool finite, const RoundResult& result) {
  if (payload != key.phase) {
    return absl::InternalError(absl::StrCat("the master sent the result of another kind of round for sequence ",
                                            key.sequence, " of layer \"", key.layer, "\""));
  }
  if (payload == Phase::kForward) {
    if (absl::Status status = CheckMoments(key, finite, result); !status.ok()) return status;
  }
  if (result.count < 0) {
    return absl::InternalError(
        absl::StrCat("the master sent a count of ", result.count, " for layer \"", key.layer, "\""));
  }
  const size_t first = length != 0 ? length : result.first.size();
  const size_t second = key.phase == Phase::kSum ? 0 : first;
  if (result.first.size() == first && result.second.size() == second) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("the master sent ", result.first.size(), " and ", result.second.size(),
                                          " elements as the result of layer \"", key.layer, "\", which has ", first));
}

}  // namespace syncbn::session
