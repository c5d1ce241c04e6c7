// Secrets that workers and masters share: tokens, their digests, and random bytes.

#ifndef SYNCBN_PLUMBING_SECRET_H_
#define SYNCBN_PLUMBING_SECRET_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace syncbn {

inline constexpr size_t kMostTokenBytes = 1024;

// Returns OK for a token that may be used: 1 to 1024 printable ASCII characters without spaces, so that it fits into a
// header. Errors: INVALID_ARGUMENT, which does not quote the token.
absl::Status CheckToken(absl::string_view token);

// Reads a token from the first line of a file, without its line end, "\n" or "\r\n".
//
// Errors: INVALID_ARGUMENT, naming the file, if it cannot be read, has more than one line, or its line is no token.
absl::StatusOr<std::string> ReadTokenFile(const std::string& path);

// Returns the SHA-256 digest.
std::array<uint8_t, 32> Sha256(absl::string_view bytes);

// Returns bytes that nobody can guess. Aborts if the system has none.
std::string RandomBytes(size_t count);

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_SECRET_H_
