#include "server/http/status_text.h"

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "plumbing/duration.h"

namespace syncbn::http {
namespace {

// Lines of one kind in a group.
constexpr int kMostLines = 64;

std::string Text(const google::protobuf::Duration& duration) {
  const absl::Duration exact = FromProto(duration);
  const absl::Duration unit = exact < absl::Seconds(1) ? absl::Microseconds(1) : absl::Milliseconds(1);
  return absl::FormatDuration(absl::Trunc(exact, unit));
}

std::string Text(const v1::RoundKey& key) {
  const std::string phase = v1::Phase_Name(key.phase()).substr(sizeof("PHASE"));
  return absl::StrCat(key.layer(), " ", absl::AsciiStrToLower(phase), " ", key.sequence());
}

std::string Text(v1::MemberState state) {
  return absl::AsciiStrToLower(v1::MemberState_Name(state).substr(sizeof("MEMBER_STATE")));
}

void AppendMembers(const v1::GetGroupResponse& group, std::string* text) {
  absl::StrAppendFormat(text, "  %5s  %-8s %12s %12s %12s  %s\n", "rank", "state", "last in", "mean late", "p99 late",
                        "description");
  int shown = 0;
  for (const v1::Member& member : group.members()) {
    if (shown++ == kMostLines) {
      absl::StrAppend(text, "  and ", group.members_size() - kMostLines, " more\n");
      return;
    }
    absl::StrAppendFormat(text, "  %5d  %-8s %12d %12s %12s  %s\n", member.rank(), Text(member.state()),
                          member.last_arrivals(), Text(member.lateness().mean()), Text(member.lateness().p99()),
                          member.description());
  }
}

void AppendGroup(const v1::GetGroupResponse& group, std::string* text) {
  const v1::GroupSummary& summary = group.summary();
  absl::StrAppend(text, "\njob \"", summary.job(), "\", group \"", summary.group(), "\": ", summary.present(), " of ",
                  summary.world_size(), " workers, ", summary.layers(), " layers, ", summary.rounds_completed(),
                  " rounds completed, ", summary.rounds_failed(), " failed, ", summary.rounds_in_flight(),
                  " in flight\n");
  for (const v1::PhaseStatistics& phase : group.statistics().phases()) {
    if (phase.duration().count() == 0) continue;
    absl::StrAppend(text, "  ", absl::AsciiStrToLower(v1::Phase_Name(phase.phase()).substr(sizeof("PHASE"))),
                    " rounds take ", Text(phase.duration().p50()), " (median), ", Text(phase.duration().p99()),
                    " (p99)\n");
  }
  AppendMembers(group, text);
  for (const v1::PendingRound& round : group.pending()) {
    absl::StrAppend(text, "  waits ", Text(round.age()), ": ", Text(round.key()), ", for ", round.missing(), " (ranks ",
                    absl::StrJoin(round.missing_ranks(), ","), ")\n");
  }
  for (const v1::RecordedRound& round : group.failures()) {
    absl::StrAppend(text, "  failed: ", Text(round.key()), ": ", round.result(), ": ", round.error().message(), "\n");
  }
}

}  // namespace

absl::StatusOr<std::string> StatusText(const InspectionClient& client) {
  const auto master = client.GetMaster();
  if (!master.ok()) return master.status();
  const auto groups = client.ListGroups();
  if (!groups.ok()) return groups.status();
  const std::string commit = master->revision().empty() ? "" : absl::StrCat(" (commit ", master->revision(), ")");
  std::string text =
      absl::StrCat("syncbn-master ", master->version(), commit, ", protocol ", master->protocol_version(), ", gRPC ",
                   master->grpc_version(), "\nup ", Text(master->uptime()), ", ", master->streams(), " streams, ",
                   groups->groups_size(), " groups\n");
  for (const v1::GroupSummary& summary : groups->groups()) {
    const auto group = client.GetGroup(summary.job(), summary.group(), {"members", "pending", "failures"});
    if (absl::IsNotFound(group.status())) continue;  // It has ended in the meantime.
    if (!group.ok()) return group.status();
    AppendGroup(*group, &text);
  }
  return text;
}

}  // namespace syncbn::http
