#include "server/log/narrator.h"

#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "plumbing/log.h"
#include "server/core/error.h"

namespace syncbn {
namespace {

// Names that a join was refused for may be of any length.
std::string Brief(absl::string_view name) {
  constexpr size_t kMost = 100;
  return name.size() <= kMost ? std::string(name) : absl::StrCat(name.substr(0, kMost), "...");
}

std::string Describe(const core::GroupId& group) {
  return absl::StrCat("job \"", Brief(group.job), "\", group \"", Brief(group.group), "\"");
}

std::string Describe(const core::GroupId& group, const core::RoundKey& key) {
  return absl::StrCat(Describe(group), ", layer \"", key.layer, "\", ", absl::AsciiStrToLower(Name(key.phase)), " ",
                      key.sequence);
}

std::string Describe(absl::Duration duration) {
  return absl::FormatDuration(absl::Trunc(duration, absl::Milliseconds(1)));
}

std::vector<LogField> FieldsOf(absl::string_view event, const core::GroupId& group) {
  return {{"event", std::string(event)}, {"job", Brief(group.job)}, {"group", Brief(group.group)}};
}

void Append(const core::RoundKey& key, std::vector<LogField>* fields) {
  fields->push_back({"layer", key.layer});
  fields->push_back({"phase", absl::AsciiStrToLower(Name(key.phase))});
  fields->push_back({"sequence", absl::StrCat(key.sequence)});
}

}  // namespace

std::string Narrator::PeerOf(core::StreamId stream) const {
  const std::string peer = peer_of_(stream);
  return peer.empty() ? "a peer that has gone" : peer;
}

void Narrator::On(const core::MemberChanged& change, absl::Time now) {
  absl::string_view event;
  std::string text = absl::StrCat("rank ", change.rank, " of ", Describe(change.group));
  const std::string count = absl::StrCat("; ", change.present, " of ", change.world_size, " workers are connected");
  switch (change.state) {
    case core::MemberState::kPresent:
      event = change.returned ? "returned" : "joined";
      absl::StrAppend(&text, change.returned ? " is back" : " has joined", " from ", PeerOf(change.stream),
                      change.description.empty() ? "" : absl::StrCat(" (", change.description, ")"), count);
      break;
    case core::MemberState::kLost:
      event = "lost";
      absl::StrAppend(&text, " is lost: its stream has broken", count);
      break;
    case core::MemberState::kLeft:
      event = "left";
      absl::StrAppend(&text, " has left", count);
      break;
    case core::MemberState::kAbsent:
      return;
  }
  std::vector<LogField> fields = FieldsOf(event, change.group);
  fields.push_back({"rank", absl::StrCat(change.rank)});
  fields.push_back({"incarnation", absl::StrCat(change.incarnation)});
  if (change.state == core::MemberState::kPresent) fields.push_back({"peer", PeerOf(change.stream)});
  throttle_.Log(LogLevel::kInfo, event, now, text, fields, Throttle::kLongBurst);
  if (change.state != core::MemberState::kPresent || change.present != change.world_size) return;
  throttle_.Log(LogLevel::kInfo, "complete", now,
                absl::StrCat(Describe(change.group), " is complete: all ", change.world_size, " workers are connected"),
                FieldsOf("complete", change.group), Throttle::kLongBurst);
}

void Narrator::On(const core::JoinRefused& refused, absl::Time now) {
  refused_ = refused.stream;
  std::vector<LogField> fields = FieldsOf("join_refused", refused.group);
  fields.push_back({"rank", absl::StrCat(refused.rank)});
  fields.push_back({"reason", refused.error.reason});
  fields.push_back({"peer", PeerOf(refused.stream)});
  throttle_.Log(LogLevel::kWarning, absl::StrCat("join ", refused.error.reason), now,
                absl::StrCat("refused a join as rank ", refused.rank, " of ", Describe(refused.group), " from ",
                             PeerOf(refused.stream), ": ", refused.error.reason, ": ", refused.error.message),
                fields);
}

void Narrator::On(const core::RoundEnded& ended, absl::Time now) {
  if (!ended.outcome->error.has_value()) return;
  const core::Error& error = *ended.outcome->error;
  std::vector<LogField> fields = FieldsOf("round_failed", ended.group);
  Append(ended.outcome->key, &fields);
  fields.push_back({"reason", error.reason});
  fields.push_back({"ranks", absl::StrJoin(error.ranks, ",")});
  fields.push_back({"age", Describe(ended.duration)});
  throttle_.Log(
      LogLevel::kWarning, error.reason, now,
      absl::StrCat("a round failed: ", Describe(ended.group, ended.outcome->key), ", ", Describe(ended.duration),
                   " after its first contribution: ", error.reason, ": ", error.message),
      fields);
}

void Narrator::On(const core::SendLateRounds& late, absl::Time now) {
  for (const core::LateRound& round : late.rounds) {
    const size_t named = round.missing_ranks.size();
    const std::string ranks = absl::StrJoin(round.missing_ranks, ", ");
    std::vector<LogField> fields = FieldsOf("round_late", late.group);
    Append(round.key, &fields);
    fields.push_back({"ranks", absl::StrJoin(round.missing_ranks, ",")});
    fields.push_back({"age", Describe(round.age)});
    throttle_.Log(LogLevel::kWarning, "late round", now,
                  absl::StrCat("a round is late: ", Describe(late.group, round.key), " has waited for ",
                               Describe(round.age), ", for ", round.missing == 1 ? "rank " : "ranks ", ranks,
                               round.missing > named ? absl::StrCat(" and ", round.missing - named, " more") : ""),
                  fields);
  }
}

void Narrator::OnStreamClosed(core::StreamId stream, const core::Error& error, absl::Time now) {
  if (absl::string_view(error.reason) == core::kShuttingDown || stream == refused_) return;
  throttle_.Log(
      LogLevel::kInfo, absl::StrCat("stream ", error.reason), now,
      absl::StrCat("closed a worker's stream from ", PeerOf(stream), ": ", error.reason, ": ", error.message),
      {LogField{"event", "stream_closed"}, LogField{"reason", error.reason}, LogField{"peer", PeerOf(stream)}});
}

void Narrator::OnReaderCutOff(core::StreamId stream, size_t unread_bytes, absl::Time now) {
  throttle_.Log(LogLevel::kWarning, "reader", now,
                absl::StrCat("cut off the worker at ", PeerOf(stream), ": it does not read, and has left ",
                             unread_bytes, " bytes unread"),
                {LogField{"event", "reader_cut_off"}, LogField{"peer", PeerOf(stream)}});
}

}  // namespace syncbn
