// The names of rounds that belong to a layer without being its own.

#ifndef SYNCBN_VOCABULARY_DERIVED_NAME_H_
#define SYNCBN_VOCABULARY_DERIVED_NAME_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace syncbn {

// The most bytes that a name has (PROTOCOL.md, section 13).
constexpr size_t kMostNameBytes = 255;

// Returns `layer` and `suffix` as one name of at most kMostNameBytes. Where they are longer together, the end of the
// layer's name gives way to '~' and the 16 hexadecimal digits of the FNV-1a hash of all of it (PROTOCOL.md, section 4).
// `suffix` has at most 100 bytes.
inline std::string DerivedName(absl::string_view layer, absl::string_view suffix) {
  if (layer.size() + suffix.size() <= kMostNameBytes) return absl::StrCat(layer, suffix);
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char byte : layer) hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3u;
  constexpr size_t kHashBytes = 17;
  size_t kept = kMostNameBytes - kHashBytes - suffix.size();
  const auto continues = [layer](size_t i) { return (static_cast<unsigned char>(layer[i]) & 0xc0) == 0x80; };
  while (kept > 0 && kept < layer.size() && continues(kept)) --kept;  // No character of UTF-8 is cut in two.
  return absl::StrCat(layer.substr(0, kept), "~", absl::Hex(hash, absl::kZeroPad16), suffix);
}

}  // namespace syncbn

#endif  // SYNCBN_VOCABULARY_DERIVED_NAME_H_
