// Text that protobuf can carry.

#ifndef SYNCBN_PLUMBING_UTF8_H_
#define SYNCBN_PLUMBING_UTF8_H_

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace syncbn {

// Returns whether the bytes are UTF-8, as RFC 3629 defines it: shortest forms only, no surrogates, up to U+10FFFF.
bool IsUtf8(absl::string_view bytes);

// Returns INVALID_ARGUMENT, which names `what` it is and shows it, unless the text is UTF-8.
absl::Status CheckUtf8(absl::string_view what, absl::string_view text);

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_UTF8_H_
