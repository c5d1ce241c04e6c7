#include "server/log/throttle.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace syncbn {
namespace {

// The interval between the lines that follow the first.
constexpr absl::Duration kInterval = absl::Seconds(10);

}  // namespace

void Throttle::Log(LogLevel level, absl::string_view reason, absl::Time now, absl::string_view line,
                   absl::Span<const LogField> fields, int burst) {
  const auto [it, is_new] = buckets_.try_emplace(std::string(reason));
  Bucket& bucket = it->second;
  if (is_new) bucket.since = now;
  if (now - bucket.since >= kInterval) {
    // After a long enough silence, a reason may have a burst of lines again.
    const double intervals = absl::FDivDuration(now - bucket.since, kInterval);
    bucket.lines = intervals >= bucket.lines ? 0 : bucket.lines - static_cast<int>(intervals);
    bucket.since = now;
  }
  if (bucket.lines >= burst) {
    ++bucket.held_back;
    return;
  }
  ++bucket.lines;
  const uint64_t more = std::exchange(bucket.held_back, 0);
  syncbn::Log(level, more == 0 ? std::string(line) : absl::StrCat(line, " (and ", more, " more of this kind)"), fields);
}

}  // namespace syncbn
