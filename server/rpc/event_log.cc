#include "server/rpc/event_log.h"

#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "plumbing/log.h"
#include "server/core/error.h"

namespace syncbn::rpc {
namespace {

std::string Describe(const core::GroupId& group, const core::RoundKey& key) {
  return absl::StrCat("job \"", group.job, "\", group \"", group.group, "\", layer \"", key.layer, "\", ",
                      absl::AsciiStrToLower(Name(key.phase)), " ", key.sequence);
}

}  // namespace

void EventLog::OnRoundEnded(const core::RoundEnded& ended, absl::Time now) {
  if (!ended.outcome->error.has_value()) return;
  const core::Error& error = *ended.outcome->error;
  throttle_.Log(LogLevel::kWarning, error.reason, now,
                absl::StrCat("a round failed: ", Describe(ended.group, ended.outcome->key), ": ", error.reason, ": ",
                             error.message));
}

void EventLog::OnLateRounds(const core::SendLateRounds& late, absl::Time now) {
  for (const core::LateRound& round : late.rounds) {
    const size_t named = round.missing_ranks.size();
    throttle_.Log(LogLevel::kWarning, "late round", now,
                  absl::StrCat("a round is late: ", Describe(late.group, round.key), " has waited for ",
                               absl::FormatDuration(absl::Trunc(round.age, absl::Milliseconds(100))), ", for ",
                               round.missing == 1 ? "rank " : "ranks ", absl::StrJoin(round.missing_ranks, ", "),
                               round.missing > named ? absl::StrCat(" and ", round.missing - named, " more") : ""));
  }
}

void EventLog::OnStreamClosed(const core::Error& error, absl::Time now) {
  if (absl::string_view(error.reason) == core::kShuttingDown) return;
  throttle_.Log(LogLevel::kInfo, absl::StrCat("stream ", error.reason), now,
                absl::StrCat("closed a worker's stream: ", error.reason, ": ", error.message));
}

}  // namespace syncbn::rpc
