#include "client/cc/session/attempts.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace syncbn::session {
namespace {

constexpr absl::Duration kFirstBackoff = absl::Milliseconds(10);
constexpr absl::Duration kLongestBackoff = absl::Seconds(1);
// The time that a connection to one address may take; less where others may be tried instead.
constexpr absl::Duration kConnectTimeout = absl::Seconds(5);
constexpr absl::Duration kConnectTimeoutOfSeveral = absl::Seconds(2);

}  // namespace

bool IsRefusedForNow(const ErrorDetails& details) {
  const bool groups = details.limit == "max_groups" || details.limit == "max_groups_per_address";
  return details.reason == kRankTaken || (details.reason == "LIMIT_EXCEEDED" && groups);
}

Attempts::Attempts(uint32_t rank, absl::Duration join_timeout, bool tls, absl::Time now)
    : rank_(rank),
      join_timeout_(join_timeout),
      tls_(tls),
      retry_at_(now),
      give_up_at_(now + join_timeout),
      backoff_(kFirstBackoff) {}

absl::Duration Attempts::connect_timeout() const {
  return targets_.has_several() ? kConnectTimeoutOfSeveral : kConnectTimeout;
}

void Attempts::Joined(absl::Time now) {
  targets_.Reached();
  ever_joined_ = true;
  joined_at_ = now;
  answered_ = false;
  taken_notice_.clear();
}

void Attempts::BrokeAfterJoin(Break why, absl::Time now) {
  last_break_ = std::move(why);
  give_up_at_ = now + join_timeout_;
  // Reset the backoff only after useful traffic: a master that accepts joins and then crashes must not be hammered.
  if (answered_ || now - joined_at_ > kLongestBackoff) backoff_ = kFirstBackoff;
  PauseFrom(now);
}

void Attempts::Failed(Break why, absl::Time now) {
  last_break_ = std::move(why);
  if (targets_.Failed()) {
    PauseFrom(now);
  } else {
    retry_at_ = now;
  }
}

void Attempts::PauseFrom(absl::Time now) {
  retry_at_ = now + backoff_;
  backoff_ = std::min(2 * backoff_, kLongestBackoff);
}

std::optional<std::string> Attempts::RankTakenNotice() {
  if (DetailsOf(last_break_.status).reason != kRankTaken) return std::nullopt;
  std::string text = absl::StrCat("rank ", rank_, " is taken, and this worker waits until it is free, for ",
                                  absl::FormatDuration(join_timeout_), ": ", last_break_.status.message());
  if (text == taken_notice_) return std::nullopt;
  taken_notice_ = text;
  return text;
}

absl::Status Attempts::GiveUpError() const {
  const absl::Status& last = last_break_.status;
  if (IsRefusedForNow(DetailsOf(last))) return last;
  const std::string& list = targets_.list();
  return MakeStatus(absl::StatusCode::kUnavailable,
                    absl::StrCat(list.empty() ? "no target of a master was found"
                                              : absl::StrCat("no answer from the master at ", list),
                                 " within ", absl::FormatDuration(join_timeout_),
                                 last.ok() ? "" : absl::StrCat("; last: ", last.message()), Hint()),
                    {"UNREACHABLE", "", {}});
}

absl::string_view Attempts::Hint() const {
  if (last_break_.cause != Break::Cause::kClosedByPeer || ever_joined_) return "";
  return tls_ ? "; a master that closes a TLS connection may not accept this worker's certificate, or speak without TLS"
              : "; a master that closes a connection may expect TLS";
}

}  // namespace syncbn::session
