// Conversion between the messages of syncbn.v1 and the engine's values. Checks that a frame is well formed, and decides
// nothing else.

#ifndef SYNCBN_SERVER_RPC_CONVERT_H_
#define SYNCBN_SERVER_RPC_CONVERT_H_

#include <optional>
#include <string>

#include "absl/time/time.h"
#include "server/core/coordinator.h"
#include "server/core/types.h"
#include "syncbn/v1/inspection.pb.h"
#include "syncbn/v1/statistics.pb.h"

namespace syncbn::rpc {

// Replaces empty names by "default".
core::GroupId ToGroupId(const std::string& job, const std::string& group);

// Convert the parts of a WorkerFrame. Each returns an error (MALFORMED_FRAME) if the message is malformed. A
// contribution points into its message, whose payload must be that of the key's phase.
std::optional<core::Error> FromProto(const v1::RoundKey& message, core::RoundKey* key);
std::optional<core::Error> FromProto(const v1::LayerSpec& message, core::LayerSpec* spec);
std::optional<core::Error> FromProto(const v1::Join& message, core::Join* join);
std::optional<core::Error> FromProto(const v1::Contribution& message, core::Contribution* contribution);
std::optional<core::Error> FromProto(const v1::EndedRound& message, core::EndedReport* report);

void ToProto(const core::SendJoined& joined, const std::string& description, v1::Joined* message);
void ToProto(const core::Membership& membership, v1::Membership* message);
void ToProto(const core::RoundOutcome& outcome, v1::RoundResult* message);
void ToProto(const core::SendLayerError& error, v1::LayerError* message);
void ToProto(const core::LateRound& round, v1::LateRound* message);

void ToProto(const core::GroupSummary& summary, v1::GroupSummary* message);
void ToProto(const core::GroupView& view, v1::GetGroupResponse* message);
void ToProto(const core::LayerSummary& summary, v1::LayerSummary* message);
void ToProto(const core::LayerView& view, v1::GetLayerResponse* message);
void ToProto(const core::RoundEnded& ended, absl::Time now, v1::WatchRoundsResponse* message);

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_CONVERT_H_
