#include "server/expiry_notice.h"

#include "absl/strings/str_cat.h"

namespace syncbn {
namespace {

constexpr absl::Duration kWarnBefore = absl::Hours(7 * 24);
constexpr absl::Duration kRepeatAfter = absl::Hours(24);

}  // namespace

std::string ExpiryText(absl::Time expiry) {
  return absl::FormatTime("%Y-%m-%d %H:%M UTC", expiry, absl::UTCTimeZone());
}

std::optional<ExpiryNotice::Line> ExpiryNotice::Due(absl::Time expiry, absl::Time now) {
  if (expiry - now > kWarnBefore) return std::nullopt;
  const bool over = expiry <= now;
  const LogLevel level = over ? LogLevel::kError : LogLevel::kWarning;
  if (level == level_ && now - told_ < kRepeatAfter) return std::nullopt;
  told_ = now;
  level_ = level;
  const std::string when = ExpiryText(expiry);
  const char* const cure = "replace its file and send SIGHUP";
  return Line{level, over ? absl::StrCat("the certificate has expired on ", when, ", and no worker can connect: ", cure)
                          : absl::StrCat("the certificate expires on ", when, ": ", cure)};
}

}  // namespace syncbn
