#include "plumbing/utf8.h"

#include <cstddef>
#include <cstdint>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace syncbn {
namespace {

// The bytes that follow a first byte: their number, and the least and the greatest value of the first of them. The
// others are 0x80 to 0xbf.
struct Sequence {
  size_t following = 0;
  uint8_t least = 0x80;
  uint8_t greatest = 0xbf;
};

// Returns false if no character begins with this byte.
bool SequenceOf(uint8_t first, Sequence* sequence) {
  if (first < 0x80) return true;
  if (first < 0xc2 || first > 0xf4) return false;
  sequence->following = first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
  if (first == 0xe0) sequence->least = 0xa0;     // Shorter forms exist,
  if (first == 0xed) sequence->greatest = 0x9f;  // surrogates,
  if (first == 0xf0) sequence->least = 0x90;     // shorter forms,
  if (first == 0xf4) sequence->greatest = 0x8f;  // beyond U+10FFFF.
  return true;
}

}  // namespace

bool IsUtf8(absl::string_view bytes) {
  const auto at = [bytes](size_t i) { return static_cast<uint8_t>(bytes[i]); };
  for (size_t i = 0; i < bytes.size();) {
    Sequence sequence;
    const uint8_t first = at(i);
    ++i;
    if (!SequenceOf(first, &sequence) || bytes.size() - i < sequence.following) return false;
    if (sequence.following == 0) continue;
    if (at(i) < sequence.least || at(i) > sequence.greatest) return false;
    for (const size_t end = i + sequence.following; i < end; ++i) {
      if (at(i) < 0x80 || at(i) > 0xbf) return false;
    }
  }
  return true;
}

absl::Status CheckUtf8(absl::string_view what, absl::string_view text) {
  if (IsUtf8(text)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, " is not UTF-8: \"", absl::CHexEscape(text), "\""));
}

}  // namespace syncbn
