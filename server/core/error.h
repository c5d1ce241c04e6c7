// How the engine words its refusals: one function for each reason that needs more than a sentence.

#ifndef SYNCBN_SERVER_CORE_ERROR_H_
#define SYNCBN_SERVER_CORE_ERROR_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "server/core/types.h"

namespace syncbn::core {

// The reasons of statistics.proto.
inline constexpr char kMalformedFrame[] = "MALFORMED_FRAME";
inline constexpr char kJoinRequired[] = "JOIN_REQUIRED";
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
inline constexpr char kGroupUnknown[] = "GROUP_UNKNOWN";
inline constexpr char kLayerUnknown[] = "LAYER_UNKNOWN";

// Ranks that an error or a late round names one by one; of more it tells the number. A group has thousands of ranks and
// of rounds, and they may all be missing at once.
inline constexpr size_t kMostNamedRanks = 64;

inline Error MakeError(absl::StatusCode code, const char* reason, std::string message, std::vector<Rank> ranks = {}) {
  const auto count = static_cast<uint32_t>(ranks.size());
  if (ranks.size() > kMostNamedRanks) {
    ranks.resize(kMostNamedRanks);
    ranks.shrink_to_fit();
  }
  return Error{code, reason, std::move(message), std::move(ranks), count};
}

// "rank 3", "ranks 1, 3 and 4"; beyond eight, "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 12 more".
std::string RankList(const std::vector<Rank>& ranks);

// "forward round 7 of layer \"bn1\"".
std::string Describe(const RoundKey& key);

// RESOURCE_EXHAUSTED, LIMIT_EXCEEDED: "2000 channels exceed max_channels = 1024".
template <typename Value, typename Limit>
Error LimitError(Value value, absl::string_view what, absl::string_view limit_name, Limit limit) {
  return MakeError(absl::StatusCode::kResourceExhausted, kLimitExceeded,
                   absl::StrCat(value, " ", what, " exceed the master's limit ", limit_name, " = ", limit));
}

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_ERROR_H_
