// Reading and checking of what callers of the C interface give, and the outcome that they are told.

#ifndef SYNCBN_CLIENT_C_ARGUMENTS_H_
#define SYNCBN_CLIENT_C_ARGUMENTS_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "client/c/syncbn.h"
#include "vocabulary/enums.h"

namespace syncbn::c {

// Returns the code of `status`; if it is neither OK nor pending, *error, unless null, is a new one.
syncbn_code Report(const absl::Status& status, syncbn_error** error);

// Returns the error of an argument that is NULL.
absl::Status Missing(const char* what);

// Returns the first that is not OK.
absl::Status First(std::initializer_list<absl::Status> statuses);

// Returns an empty text for NULL.
std::string Text(const char* text);

// Returns the time for ever for a negative number.
absl::Duration Timeout(int64_t nanoseconds);

// Lets *ranks, unless `ranks` is null, point to those of `from`. Returns their number.
size_t Ranks(const std::vector<uint32_t>& from, const uint32_t** ranks);

// Reads options as this library knows them, from a caller that may be older (shorter struct) or newer (longer).
template <typename Options>
absl::Status ReadOptions(const Options* given, Options* options) {
  std::memset(options, 0, sizeof(*options));
  if (given == nullptr) return absl::OkStatus();
  constexpr size_t kMostBytes = 4096;  // More is no later version's struct, but a size that was never set.
  // No version of a struct ends elsewhere: a compiler rounds its size up to its alignment.
  const bool between_fields = given->struct_size % alignof(Options) == 0;
  if (given->struct_size < sizeof(size_t) || given->struct_size > kMostBytes || !between_fields) {
    return absl::InvalidArgumentError(
        absl::StrCat("struct_size is ", given->struct_size, "; set it to the size of the struct"));
  }
  const char* const bytes = reinterpret_cast<const char*>(given);
  for (size_t i = sizeof(*options); i < given->struct_size; ++i) {
    if (bytes[i] != 0)
      return absl::UnimplementedError("an option is set that this version of the library does not know");
  }
  std::memcpy(options, given, std::min(given->struct_size, sizeof(*options)));
  return absl::OkStatus();
}

// Reads a number from `first` to `last`; 0 stands for `fallback` where it is not one of these.
template <typename Enum>
absl::Status ReadEnum(int32_t value, int32_t first, int32_t last, Enum fallback, const char* name, Enum* out) {
  if (value == 0 && first > 0) {
    *out = fallback;
    return absl::OkStatus();
  }
  if (value < first || value > last) {
    return absl::InvalidArgumentError(absl::StrCat(name, " is ", value, "; it is ", first, " to ", last));
  }
  *out = static_cast<Enum>(value);
  return absl::OkStatus();
}

absl::Status ReadRole(int32_t value, BackwardRole* role);

}  // namespace syncbn::c

#endif  // SYNCBN_CLIENT_C_ARGUMENTS_H_
