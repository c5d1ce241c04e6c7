#include "client/c/arguments.h"

#include "client/c/handles.h"
#include "client/cc/errors.h"

namespace syncbn::c {

syncbn_code Report(const absl::Status& status, syncbn_error** error) {
  if (status.ok()) return 0;
  if (IsPending(status)) return SYNCBN_PENDING;
  if (error != nullptr) *error = new syncbn_error{status, DetailsOf(status), std::string(status.message())};
  return static_cast<syncbn_code>(status.code());
}

absl::Status Missing(const char* what) { return absl::InvalidArgumentError(absl::StrCat(what, " is NULL")); }

absl::Status First(std::initializer_list<absl::Status> statuses) {
  for (const absl::Status& status : statuses) {
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

std::string Text(const char* text) { return text == nullptr ? std::string() : std::string(text); }

absl::Duration Timeout(int64_t nanoseconds) {
  return nanoseconds < 0 ? absl::InfiniteDuration() : absl::Nanoseconds(nanoseconds);
}

size_t Ranks(const std::vector<uint32_t>& from, const uint32_t** ranks) {
  if (ranks != nullptr) *ranks = from.data();
  return from.size();
}

absl::Status ReadRole(int32_t value, BackwardRole* role) {
  return ReadEnum(value, SYNCBN_BACKWARD_REQUIRED, SYNCBN_BACKWARD_NONE, BackwardRole::kRequired, "backward_role",
                  role);
}

}  // namespace syncbn::c
