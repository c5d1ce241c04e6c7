// Files that a person names, which may be anything: a folder, or a device that never ends.

#ifndef SYNCBN_PLUMBING_BOUNDED_FILE_H_
#define SYNCBN_PLUMBING_BOUNDED_FILE_H_

#include <cstddef>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace syncbn {

// Returns the bytes of the file. `what` names it in errors: "certificate".
//
// Errors: INVALID_ARGUMENT, with the path and the reason, if it cannot be read or has more than `most_bytes`.
// Thread safety: any thread may call it.
absl::StatusOr<std::string> ReadBoundedFile(absl::string_view what, const std::string& path, size_t most_bytes);

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_BOUNDED_FILE_H_
