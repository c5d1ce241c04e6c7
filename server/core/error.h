// The engine's refusals and failures: one function for each, so that the code that decides is read without their texts.

#ifndef SYNCBN_SERVER_CORE_ERROR_H_
#define SYNCBN_SERVER_CORE_ERROR_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/core/types.h"

namespace syncbn::core {

// The reasons of statistics.proto.
inline constexpr char kMalformedFrame[] = "MALFORMED_FRAME";
inline constexpr char kJoinRequired[] = "JOIN_REQUIRED";
inline constexpr char kTokenMismatch[] = "TOKEN_MISMATCH";
inline constexpr char kLifeKeyMismatch[] = "LIFE_KEY_MISMATCH";
inline constexpr char kIdentityMismatch[] = "IDENTITY_MISMATCH";
inline constexpr char kVersionUnsupported[] = "VERSION_UNSUPPORTED";
inline constexpr char kGroupConfigMismatch[] = "GROUP_CONFIG_MISMATCH";
inline constexpr char kLayerSetMismatch[] = "LAYER_SET_MISMATCH";
inline constexpr char kGenerationSuperseded[] = "GENERATION_SUPERSEDED";
inline constexpr char kRunSuperseded[] = "RUN_SUPERSEDED";
inline constexpr char kFenced[] = "FENCED";
inline constexpr char kRankTaken[] = "RANK_TAKEN";
inline constexpr char kLimitExceeded[] = "LIMIT_EXCEEDED";
inline constexpr char kShuttingDown[] = "SHUTTING_DOWN";
inline constexpr char kRoundTimeout[] = "ROUND_TIMEOUT";
inline constexpr char kWorkerLost[] = "WORKER_LOST";
inline constexpr char kDeadlock[] = "DEADLOCK";
inline constexpr char kLayerSpecMismatch[] = "LAYER_SPEC_MISMATCH";
inline constexpr char kRoundExpired[] = "ROUND_EXPIRED";
inline constexpr char kForwardRoundUnknown[] = "FORWARD_ROUND_UNKNOWN";
inline constexpr char kNotAContributor[] = "NOT_A_CONTRIBUTOR";
inline constexpr char kTooFewWorkers[] = "TOO_FEW_WORKERS";
inline constexpr char kPayloadChanged[] = "PAYLOAD_CHANGED";
inline constexpr char kInvalidContribution[] = "INVALID_CONTRIBUTION";
inline constexpr char kNotFinite[] = "NOT_FINITE";
inline constexpr char kGroupEnded[] = "GROUP_ENDED";
inline constexpr char kOutcomeLost[] = "OUTCOME_LOST";
inline constexpr char kOutcomeChanged[] = "OUTCOME_CHANGED";
inline constexpr char kGroupUnknown[] = "GROUP_UNKNOWN";
inline constexpr char kLayerUnknown[] = "LAYER_UNKNOWN";
inline constexpr char kInspectionOff[] = "INSPECTION_OFF";

// The most ranks that an error or a late round lists; beyond that it gives their number. A group has thousands of ranks
// and of rounds, and all ranks may be missing from all rounds at once.
inline constexpr size_t kMostNamedRanks = 64;

inline Error MakeError(absl::StatusCode code, const char* reason, std::string message, std::vector<Rank> ranks = {}) {
  const auto count = static_cast<uint32_t>(ranks.size());
  if (ranks.size() > kMostNamedRanks) {
    ranks.resize(kMostNamedRanks);
    ranks.shrink_to_fit();
  }
  return Error{code, reason, std::move(message), std::move(ranks), count, ""};
}

// "rank 3", "ranks 1, 3 and 4"; beyond eight, "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 12 more".
std::string RankList(const std::vector<Rank>& ranks);

// "forward round 7 of layer \"bn1\"".
std::string Describe(const RoundKey& key);

// ---- Any frame ------------------------------------------------------------------------------------------------------

// INVALID_ARGUMENT, MALFORMED_FRAME.
Error MalformedError(std::string message);

// RESOURCE_EXHAUSTED, LIMIT_EXCEEDED: "2000 channels exceed the master's limit max_channels = 1024".
// `limit_name` has static storage.
template <typename Value, typename Limit>
Error LimitError(Value value, absl::string_view what, const char* limit_name, Limit limit) {
  Error error = MakeError(absl::StatusCode::kResourceExhausted, kLimitExceeded,
                          absl::StrCat(value, " ", what, " exceed the master's limit ", limit_name, " = ", limit));
  error.limit = limit_name;
  return error;
}

Error ShuttingDownError();

// Returns the reason of these letters: one of those above, or GROUP_ENDED for one that this master does not know.
const char* ReasonNamed(absl::string_view name);

// ---- A join ---------------------------------------------------------------------------------------------------------

Error NoJoinError();
Error SecondJoinError();
// The token is absent, or not that of the master or of the job. The text does not say which.
Error TokenError(const Join& join);
// The join names the incarnation of another worker.
Error LifeKeyError(const Join& join);
// `required`: what a certificate that stands for this job and rank would say. `shown`: what the worker's says.
Error IdentityError(const Join& join, absl::string_view required, absl::string_view shown);
Error VersionError(const Join& join, uint32_t supported);
// `what` is the name of the field that differs.
Error ConfigMismatchError(const Join& join, absl::string_view what, const absl::AlphaNum& joins_with,
                          const absl::AlphaNum& group_has);
// The join names a run other than the group's.
Error WrongRunError(const Join& join, uint64_t run_id);
Error OutdatedGenerationError(const Join& join, uint64_t generation);
// The join's generation is more than `most` beyond the group's.
Error GenerationJumpError(const Join& join, uint64_t generation, uint64_t most);
Error NewGenerationError(const Join& join);
Error NewRunError(const Join& join);
// The join's incarnation is older than the rank's newest.
Error OutdatedIncarnationError(const Join& join, uint64_t newest);
// For the stream that the rank's newer incarnation has replaced.
Error ReplacedStreamError(Rank rank, uint64_t incarnation);
// `holder` is the description of the member that is connected as the rank.
Error RankTakenError(const Join& join, uint64_t incarnation, absl::string_view holder);
Error UnknownIncarnationError(const Join& join, uint64_t newest);
// The group's last member left or was lost long ago.
Error AbandonedError(const GroupId& id);

// The differences between the layers of a join and those of the group.
struct LayerSetDifference {
  std::vector<std::string> different;  // "layer \"a\" has channels 32 instead of 64".
  std::vector<std::string> added;      // Names that the join alone has.
  std::vector<std::string> absent;     // Names that the join lacks.

  bool empty() const { return different.empty() && added.empty() && absent.empty(); }
};
Error LayerSetError(Rank rank, Rank reference, const LayerSetDifference& difference);

// ---- A contribution that is rejected, and its round goes on without it
// -------------------------------------------------

Error UndeclaredLayerError(Rank rank, const RoundKey& key);
Error LayerKindError(Rank rank, const RoundKey& key);
// The rank has contributed other numbers to a round that is in flight.
Error ChangedPayloadError(Rank rank, const RoundKey& key);
// The rank has contributed other numbers to a round that has ended; `restarted` if it was an earlier incarnation.
Error ChangedReplayError(Rank rank, const RoundKey& key, bool restarted);
Error OutcomeForgottenError(const RoundKey& key, absl::string_view limit_name, size_t limit);
Error RoundTooOldError(const RoundKey& key, uint64_t retained_rounds);
Error ForwardForgottenError(const RoundKey& key, size_t max_awaited_bytes);
// `failed`: the forward round has ended with an error.
Error ForwardUnknownError(const RoundKey& key, bool failed);
Error NotAContributorError(Rank rank, const RoundKey& key, absl::string_view why);
// The round ended under an earlier master, and these ranks have not repeated what they contributed.
Error OutcomeLostError(const RoundKey& key, const std::vector<Rank>& silent);
// The rank may have forgotten the round, which then ended under an earlier master.
Error OutcomeUnknownError(const RoundKey& key, Rank rank);
// The repeated contributions give another result than the one that the earlier master had.
Error OutcomeDiffersError(const RoundKey& key);

// ---- A member whose past is not the group's -------------------------------------------------------------------------

// The round ended here, and ended otherwise under the earlier master that the rank has its outcome from.
Error OutcomeChangedError(Rank rank, const RoundKey& key);

// ---- A contribution whose numbers fail its round
// ---------------------------------------------------------------------

Error VectorLengthError(Rank rank, const RoundKey& key, absl::string_view vector, size_t length, uint32_t channels);
Error UnequalLengthsError(Rank rank, const Contribution& contribution, absl::string_view first,
                          absl::string_view second);
Error CountError(Rank rank, const RoundKey& key, int64_t count, int64_t max_count);
Error NegativeM2Error(Rank rank, const RoundKey& key, size_t channel, double value);
Error MagnitudeError(Rank rank, const RoundKey& key, absl::string_view vector, size_t channel, double value,
                     double bound);
// Every contribution is finite, and their merge is not.
Error OverflowError(const RoundKey& key, absl::string_view vector, size_t channel);

// ---- A round that fails ---------------------------------------------------------------------------------------------

Error DeclarationMismatchError(Rank rank, const RoundKey& key, absl::string_view difference);
Error WorkersLostError(const RoundKey& key, const std::vector<Rank>& lost);
Error WorkerRestartedError(const RoundKey& key, Rank rank);
// `possible`: the contributions that the round has or may still get.
Error TooFewWorkersError(const RoundKey& key, size_t possible, size_t least, uint32_t min_workers,
                         const std::vector<Rank>& lost);
// `when`: " within 30s of ...".
Error TooFewContributedError(const RoundKey& key, size_t contributed, absl::string_view when, uint32_t min_workers,
                             const std::vector<Rank>& missing);
// `hint` is appended to the message.
Error RoundTimeoutError(const RoundKey& key, const std::vector<Rank>& missing, absl::string_view when,
                        absl::string_view hint);
Error DeadlockError(const std::string& waiters, const std::vector<Rank>& missing);
Error GroupEndedError(const RoundKey& key, const Error& why);

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_ERROR_H_
