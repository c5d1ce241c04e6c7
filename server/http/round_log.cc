#include "server/http/round_log.h"

#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "plumbing/duration.h"
#include "plumbing/log.h"

namespace syncbn::http {
namespace {

std::string Text(const google::protobuf::Timestamp& time) {
  return absl::FormatTime("%Y-%m-%dT%H:%M:%E6SZ",
                          absl::FromUnixSeconds(time.seconds()) + absl::Nanoseconds(time.nanos()), absl::UTCTimeZone());
}

void LogRound(const v1::GroupSummary& group, const v1::RecordedRound& round) {
  std::string arrivals;
  for (const v1::Arrival& arrival : round.arrivals()) {
    absl::StrAppend(&arrivals, arrivals.empty() ? "" : " ", arrival.rank(), ":+",
                    absl::FormatDuration(FromProto(arrival.after_first())));
  }
  const v1::RoundKey& key = round.key();
  const std::string phase = absl::AsciiStrToLower(v1::Phase_Name(key.phase()).substr(sizeof("PHASE")));
  const std::string duration = absl::FormatDuration(FromProto(round.duration()));
  Log(LogLevel::kInfo,
      absl::StrCat("recorded round: job \"", group.job(), "\", group \"", group.group(), "\", layer \"", key.layer(),
                   "\", ", phase, " ", key.sequence(), ": ", round.result(), " after ", duration, ", began ",
                   Text(round.began_at()), "; ", round.arrived(), " ranks, the latest first: ", arrivals),
      {LogField{"event", "recorded_round"}, LogField{"job", group.job()}, LogField{"group", group.group()},
       LogField{"layer", key.layer()}, LogField{"phase", phase}, LogField{"sequence", absl::StrCat(key.sequence())},
       LogField{"result", round.result()}, LogField{"began_at", Text(round.began_at())}, LogField{"duration", duration},
       LogField{"arrivals", arrivals}});
}

}  // namespace

absl::Status LogRounds(const InspectionClient& client) {
  const auto groups = client.ListGroups();
  if (!groups.ok()) return groups.status();
  for (const v1::GroupSummary& summary : groups->groups()) {
    const auto group = client.GetGroup(summary.job(), summary.group(), {"recent", "failures"});
    if (absl::IsNotFound(group.status())) continue;  // It has ended in the meantime.
    if (!group.ok()) return group.status();
    // The list of failures has older ones too.
    for (auto round = group->failures().rbegin(); round != group->failures().rend(); ++round) {
      LogRound(summary, *round);
    }
    for (auto round = group->recent().rbegin(); round != group->recent().rend(); ++round) {
      if (round->result() == "completed") LogRound(summary, *round);
    }
  }
  return absl::OkStatus();
}

}  // namespace syncbn::http
