// Files that a person names, which may be anything: a folder, a device that never ends, or a pipe that nobody writes
// to.

#ifndef SYNCBN_PLUMBING_BOUNDED_FILE_H_
#define SYNCBN_PLUMBING_BOUNDED_FILE_H_

#include <cstddef>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace syncbn {

// Returns the bytes of the file. `what` names it in errors: "certificate". A pipe has `patience` to end; one that
// nobody has open for writing is empty.
//
// Errors: INVALID_ARGUMENT, with the path and the reason, if it cannot be read, has more than `most_bytes`, or has not
// ended in time.
// Thread safety: any thread may call it.
absl::StatusOr<std::string> ReadBoundedFile(absl::string_view what, const std::string& path, size_t most_bytes,
                                            absl::Duration patience = absl::Seconds(5));

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_BOUNDED_FILE_H_
