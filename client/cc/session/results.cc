#include "client/cc/session/results.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "vocabulary/numbers.h"

namespace syncbn::session {
namespace {

// Checks means and variances. The channel to name is searched only after a check has failed.
absl::Status CheckMoments(const RoundKey& key, bool must_be_finite, const RoundResult& result) {
  const bool right =
      must_be_finite ? AllFinite(result.first) && AllFinitePositive(result.second) : AllPositive(result.second);
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
