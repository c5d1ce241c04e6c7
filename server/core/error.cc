#include "server/core/error.h"

#include <algorithm>
#include <utility>

namespace syncbn::core {
namespace {

using absl::StatusCode;
using absl::StrAppend;
using absl::StrCat;

// Quotes the first few names.
std::string NameList(const std::vector<std::string>& names) {
  constexpr size_t kShown = 5;
  std::string text;
  for (size_t i = 0; i < names.size() && i < kShown; ++i) {
    StrAppend(&text, i == 0 ? "" : ", ", "\"", names[i], "\"");
  }
  if (names.size() > kShown) StrAppend(&text, " and ", names.size() - kShown, " more");
  return text;
}

}  // namespace

std::string RankList(const std::vector<Rank>& ranks) {
  constexpr size_t kShown = 8;
  if (ranks.empty()) return "no rank";
  if (ranks.size() == 1) return StrCat("rank ", ranks[0]);
  std::string text = "ranks ";
  const bool cut = ranks.size() > kShown;
  const size_t listed = cut ? kShown : ranks.size() - 1;
  for (size_t i = 0; i < listed; ++i) StrAppend(&text, i == 0 ? "" : ", ", ranks[i]);
  if (cut) {
    StrAppend(&text, " and ", ranks.size() - kShown, " more");
  } else {
    StrAppend(&text, " and ", ranks.back());
  }
  return text;
}

std::string Describe(const RoundKey& key) {
  switch (key.phase) {
    case Phase::kForward:
      return StrCat("forward round ", key.sequence, " of layer \"", key.layer, "\"");
    case Phase::kBackward:
      return StrCat("backward round ", key.sequence, " of layer \"", key.layer, "\"");
    case Phase::kSum:
      return StrCat("sum ", key.sequence, " of vector \"", key.layer, "\"");
  }
  return "";
}

// ---- Any frame ------------------------------------------------------------------------------------------------------

Error MalformedError(std::string message) {
  return MakeError(StatusCode::kInvalidArgument, kMalformedFrame, std::move(message));
}

const char* ReasonNamed(absl::string_view name) {
  for (const char* const reason : {kLayerSetMismatch, kRoundTimeout, kWorkerLost, kDeadlock, kLayerSpecMismatch,
                                   kTooFewWorkers, kInvalidContribution, kNotFinite, kOutcomeLost}) {
    if (name == reason) return reason;
  }
  return kGroupEnded;
}

Error ShuttingDownError() { return MakeError(StatusCode::kUnavailable, kShuttingDown, "the master is shutting down"); }

// ---- A join ---------------------------------------------------------------------------------------------------------

Error NoJoinError() {
  return MakeError(StatusCode::kInvalidArgument, kJoinRequired, "a stream's first frame must carry a join");
}

Error SecondJoinError() {
  return MakeError(StatusCode::kInvalidArgument, kJoinRequired, "only a stream's first frame carries a join");
}

Error TokenError(const Join& join) {
  return MakeError(StatusCode::kUnauthenticated, kTokenMismatch,
                   StrCat("rank ", join.rank, " joins group \"", join.id.group, "\" of job \"", join.id.job,
                          "\" without the job's token, or with another one; all workers of a job have the same (see "
                          "SYNCBN_TOKEN)"));
}

Error LifeKeyError(const Join& join) {
  return MakeError(StatusCode::kUnauthenticated, kLifeKeyMismatch,
                   StrCat("the join names incarnation ", join.incarnation, " of rank ", join.rank, " of group \"",
                          join.id.group, "\", which another worker holds"),
                   {join.rank});
}

Error IdentityError(const Join& join, absl::string_view required, absl::string_view shown) {
  return MakeError(StatusCode::kPermissionDenied, kIdentityMismatch,
                   StrCat("rank ", join.rank, " of group \"", join.id.group, "\" of job \"", join.id.job,
                          "\" needs a certificate with ", required, "; this worker's has ", shown),
                   {join.rank});
}

Error VersionError(const Join& join, uint32_t supported) {
  return MakeError(StatusCode::kFailedPrecondition, kVersionUnsupported,
                   StrCat("the worker speaks protocol versions ", join.min_protocol_version, " to ",
                          join.max_protocol_version, ", this master version ", supported));
}

Error ConfigMismatchError(const Join& join, absl::string_view what, const absl::AlphaNum& joins_with,
                          const absl::AlphaNum& group_has) {
  return MakeError(StatusCode::kFailedPrecondition, kGroupConfigMismatch,
                   StrCat("rank ", join.rank, " joins with ", what, " ", joins_with.Piece(), ", but group \"",
                          join.id.group, "\" of job \"", join.id.job, "\" has ", group_has.Piece()));
}

Error WrongRunError(const Join& join, uint64_t run_id) {
  return MakeError(StatusCode::kFailedPrecondition, kRunSuperseded,
                   StrCat("rank ", join.rank, " reconnects to run ", join.run_id, " of group \"", join.id.group,
                          "\", which is over; the run is now ", run_id));
}

Error OutdatedGenerationError(const Join& join, uint64_t generation) {
  return MakeError(StatusCode::kFailedPrecondition, kGenerationSuperseded,
                   StrCat("rank ", join.rank, " joins generation ", join.generation, " of group \"", join.id.group,
                          "\", which is at generation ", generation));
}

Error GenerationJumpError(const Join& join, uint64_t generation, uint64_t most) {
  return LimitError(
      join.generation - generation,
      StrCat("generations from ", generation, " to ", join.generation, " of group \"", join.id.group, "\""),
      "max_generation_jump", most);
}

Error NewGenerationError(const Join& join) {
  return MakeError(StatusCode::kFailedPrecondition, kGenerationSuperseded,
                   StrCat("generation ", join.generation, " of group \"", join.id.group, "\" has begun"));
}

Error NewRunError(const Join& join) {
  return MakeError(StatusCode::kFailedPrecondition, kRunSuperseded,
                   StrCat("a new run of group \"", join.id.group, "\" has begun"));
}

Error OutdatedIncarnationError(const Join& join, uint64_t newest) {
  return MakeError(StatusCode::kAborted, kFenced,
                   StrCat("rank ", join.rank, " has restarted: incarnation ", join.incarnation,
                          " is fenced by incarnation ", newest),
                   {join.rank});
}

Error ReplacedStreamError(Rank rank, uint64_t incarnation) {
  return MakeError(StatusCode::kAborted, kFenced,
                   StrCat("incarnation ", incarnation, " of rank ", rank, " has joined on another stream"), {rank});
}

Error RankTakenError(const Join& join, uint64_t incarnation, absl::string_view holder) {
  return MakeError(
      StatusCode::kAlreadyExists, kRankTaken,
      StrCat("rank ", join.rank, " of group \"", join.id.group, "\" of job \"", join.id.job,
             "\" is taken by a worker that is connected (incarnation ", incarnation, holder.empty() ? "" : ", ", holder,
             "); a job of its own needs a name of its own, and a restart of the whole group a greater generation"),
      {join.rank});
}

Error UnknownIncarnationError(const Join& join, uint64_t newest) {
  return MalformedError(StrCat("incarnation ", join.incarnation, " of rank ", join.rank,
                               " was never given; the greatest so far is ", newest));
}

Error AbandonedError(const GroupId& id) {
  return MakeError(StatusCode::kCancelled, kGroupEnded, StrCat("nobody came back to group \"", id.group, "\""));
}

Error LayerSetError(Rank rank, Rank reference, const LayerSetDifference& difference) {
  constexpr size_t kShown = 5;
  std::string text = StrCat("rank ", rank, " declares other layers than rank ", reference);
  const size_t different = difference.different.size();
  for (size_t i = 0; i < std::min(different, kShown); ++i) StrAppend(&text, "; ", difference.different[i]);
  if (different > kShown) StrAppend(&text, "; and ", different - kShown, " more differ");
  if (!difference.added.empty()) StrAppend(&text, "; it alone has ", NameList(difference.added));
  if (!difference.absent.empty()) StrAppend(&text, "; it lacks ", NameList(difference.absent));
  return MakeError(StatusCode::kFailedPrecondition, kLayerSetMismatch, std::move(text), {rank});
}

// ---- A contribution that is rejected --------------------------------------------------------------------------------

Error UndeclaredLayerError(Rank rank, const RoundKey& key) {
  return MakeError(
      StatusCode::kInvalidArgument, kInvalidContribution,
      StrCat("rank ", rank, " contributes to the ", Describe(key), ", but no worker has declared a layer of that name"),
      {rank});
}

Error LayerKindError(Rank rank, const RoundKey& key) {
  return MakeError(StatusCode::kInvalidArgument, kInvalidContribution,
                   StrCat("rank ", rank, " contributes to the ", Describe(key),
                          ", but that layer was declared to be of another kind"),
                   {rank});
}

Error ChangedPayloadError(Rank rank, const RoundKey& key) {
  return MakeError(
      StatusCode::kAlreadyExists, kPayloadChanged,
      StrCat("rank ", rank, " has already contributed other numbers to the ", Describe(key), "; the first ones stand"),
      {rank});
}

Error ChangedReplayError(Rank rank, const RoundKey& key, bool restarted) {
  return MakeError(StatusCode::kAlreadyExists, kPayloadChanged,
                   StrCat("the ", Describe(key), " has ended, and rank ", rank,
                          restarted ? " contributed other numbers before it restarted; workers that restart must "
                                      "resume at a sequence that is greater than any used before"
                                    : " contributed other numbers to it; the first ones stand"),
                   {rank});
}

Error OutcomeForgottenError(const RoundKey& key, absl::string_view limit_name, size_t limit) {
  return MakeError(StatusCode::kFailedPrecondition, kRoundExpired,
                   StrCat("the ", Describe(key), " has ended, and its result has been forgotten to stay within ",
                          limit_name, " = ", limit));
}

Error RoundTooOldError(const RoundKey& key, uint64_t retained_rounds) {
  return MakeError(StatusCode::kFailedPrecondition, kRoundExpired,
                   StrCat("the ", Describe(key), " is more than ", retained_rounds,
                          " sequences behind the newest that has completed, and has been forgotten"));
}

Error ForwardForgottenError(const RoundKey& key, size_t max_awaited_bytes) {
  return MakeError(
      StatusCode::kFailedPrecondition, kRoundExpired,
      StrCat("the forward round of the ", Describe(key), " has been forgotten: forward rounds that wait for ",
             "their backward rounds exceed the master's limit max_awaited_bytes = ", max_awaited_bytes));
}

Error ForwardUnknownError(const RoundKey& key, bool failed) {
  return MakeError(StatusCode::kFailedPrecondition, kForwardRoundUnknown,
                   StrCat("the ", Describe(key), " has no completed forward round", failed ? ": that one failed" : ""));
}

Error NotAContributorError(Rank rank, const RoundKey& key, absl::string_view why) {
  return MakeError(StatusCode::kFailedPrecondition, kNotAContributor,
                   StrCat("rank ", rank, " contributes to the ", Describe(key), ", but ", why), {rank});
}

Error OutcomeLostError(const RoundKey& key, const std::vector<Rank>& silent) {
  return MakeError(
      StatusCode::kAborted, kOutcomeLost,
      StrCat("the ", Describe(key), " ended under an earlier master, and its outcome is lost: ", RankList(silent),
             silent.size() == 1 ? " has" : " have", " not repeated what the outcome was made of"),
      silent);
}

Error OutcomeUnknownError(const RoundKey& key, Rank rank) {
  return MakeError(StatusCode::kAborted, kOutcomeLost,
                   StrCat("the ", Describe(key), " may have ended under an earlier master: rank ", rank,
                          " has contributed to later rounds, and forgotten those before them"),
                   {rank});
}

Error OutcomeDiffersError(const RoundKey& key) {
  return MakeError(StatusCode::kAborted, kOutcomeLost,
                   StrCat("the ", Describe(key), " ended under an earlier master, and its outcome is lost: ",
                          "what workers have contributed to it since gives another result"));
}

Error OutcomeChangedError(Rank rank, const RoundKey& key) {
  return MakeError(StatusCode::kFailedPrecondition, kOutcomeChanged,
                   StrCat("the ", Describe(key), " has ended otherwise than rank ", rank,
                          " knows it from an earlier master: the group has gone on without this worker"),
                   {rank});
}

// ---- A contribution whose numbers fail its round
// ---------------------------------------------------------------------

Error VectorLengthError(Rank rank, const RoundKey& key, absl::string_view vector, size_t length, uint32_t channels) {
  return MakeError(StatusCode::kInvalidArgument, kInvalidContribution,
                   StrCat("rank ", rank, " sent ", length, " elements of ", vector, " to the ", Describe(key),
                          ", which has ", channels),
                   {rank});
}

Error UnequalLengthsError(Rank rank, const Contribution& contribution, absl::string_view first,
                          absl::string_view second) {
  return MakeError(StatusCode::kInvalidArgument, kInvalidContribution,
                   StrCat("rank ", rank, " sent ", contribution.first.size(), " elements of ", first, " and ",
                          contribution.second.size(), " of ", second, " to the ", Describe(contribution.key),
                          "; both are empty or neither"),
                   {rank});
}

Error CountError(Rank rank, const RoundKey& key, int64_t count, int64_t max_count) {
  return MakeError(StatusCode::kInvalidArgument, kInvalidContribution,
                   StrCat("rank ", rank, " sent count = ", count, " to the ", Describe(key),
                          "; a count is within 0 and ", max_count),
                   {rank});
}

Error NegativeM2Error(Rank rank, const RoundKey& key, size_t channel, double value) {
  return MakeError(StatusCode::kInvalidArgument, kInvalidContribution,
                   StrCat("rank ", rank, " sent m2[", channel, "] = ", value, " to the ", Describe(key),
                          "; a sum of squares is not negative"),
                   {rank});
}

Error MagnitudeError(Rank rank, const RoundKey& key, absl::string_view vector, size_t channel, double value,
                     double bound) {
  return MakeError(StatusCode::kInvalidArgument, kNotFinite,
                   StrCat("rank ", rank, " sent ", vector, "[", channel, "] = ", value, " to the ", Describe(key),
                          "; the greatest magnitude that can be merged is ", bound),
                   {rank});
}

Error OverflowError(const RoundKey& key, absl::string_view vector, size_t channel) {
  return MakeError(
      StatusCode::kInvalidArgument, kNotFinite,
      StrCat("merging ", vector, "[", channel, "] of the ", Describe(key), " overflows, though no worker's part does"));
}

// ---- A round that fails ---------------------------------------------------------------------------------------------

Error DeclarationMismatchError(Rank rank, const RoundKey& key, absl::string_view difference) {
  return MakeError(StatusCode::kFailedPrecondition, kLayerSpecMismatch,
                   StrCat("workers disagree about the ", Describe(key), ": rank ", rank, " has ", difference), {rank});
}

Error WorkersLostError(const RoundKey& key, const std::vector<Rank>& lost) {
  return MakeError(
      StatusCode::kUnavailable, kWorkerLost,
      StrCat(RankList(lost), lost.size() == 1 ? " was" : " were", " lost before contributing to the ", Describe(key)),
      lost);
}

Error WorkerRestartedError(const RoundKey& key, Rank rank) {
  return MakeError(StatusCode::kUnavailable, kWorkerLost,
                   StrCat("rank ", rank, " restarted before it contributed to the ", Describe(key)), {rank});
}

Error TooFewWorkersError(const RoundKey& key, size_t possible, size_t least, uint32_t min_workers,
                         const std::vector<Rank>& lost) {
  return MakeError(StatusCode::kFailedPrecondition, kTooFewWorkers,
                   StrCat("at most ", possible, " workers can contribute to the ", Describe(key), ", and at least ",
                          least, " must (min_workers is ", min_workers, ")"),
                   lost);
}

Error TooFewContributedError(const RoundKey& key, size_t contributed, absl::string_view when, uint32_t min_workers,
                             const std::vector<Rank>& missing) {
  return MakeError(StatusCode::kFailedPrecondition, kTooFewWorkers,
                   StrCat("only ", contributed, " workers contributed to the ", Describe(key), when,
                          ", and min_workers is ", min_workers),
                   missing);
}

Error RoundTimeoutError(const RoundKey& key, const std::vector<Rank>& missing, absl::string_view when,
                        absl::string_view hint) {
  return MakeError(StatusCode::kDeadlineExceeded, kRoundTimeout,
                   StrCat(RankList(missing), " did not contribute to the ", Describe(key), when, hint), missing);
}

Error DeadlockError(const std::string& waiters, const std::vector<Rank>& missing) {
  return MakeError(StatusCode::kAborted, kDeadlock, waiters, missing);
}

Error GroupEndedError(const RoundKey& key, const Error& why) {
  return MakeError(StatusCode::kCancelled, kGroupEnded,
                   StrCat("the group ended before the ", Describe(key), ": ", why.message));
}

}  // namespace syncbn::core
