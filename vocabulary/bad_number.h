// Numbers that no layer may have: a worker's call that declares them is refused, and a frame that does is malformed.
//
// Thread safety: pure functions.
#ifndef SYNCBN_VOCABULARY_BAD_NUMBER_H_
#define SYNCBN_VOCABULARY_BAD_NUMBER_H_

#include <cmath>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "vocabulary/layer_spec.h"

namespace syncbn {

// Returns true for what can be added to a variance.
inline bool IsEps(double eps) { return eps >= 0.0 && std::isfinite(eps); }

// Returns a sentence about the first such number, or nothing. Limits and the name are not looked at.
inline std::optional<std::string> FindBadNumber(const LayerSpec& spec) {
  if (spec.channels == 0) return absl::StrCat("layer \"", spec.name, "\" has 0 channels; at least 1 is needed");
  if (!IsEps(spec.eps)) {
    return absl::StrCat("layer \"", spec.name, "\" has eps = ", spec.eps, "; it is finite and not negative");
  }
  if (spec.momentum.has_value() && !std::isfinite(*spec.momentum)) {
    return absl::StrCat("layer \"", spec.name, "\" has momentum = ", *spec.momentum, "; it is finite");
  }
  return std::nullopt;
}

}  // namespace syncbn

#endif  // SYNCBN_VOCABULARY_BAD_NUMBER_H_
