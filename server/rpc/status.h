// The engine's errors as statuses, each with a google.rpc.ErrorInfo (domain "syncbn") in its details.

#ifndef SYNCBN_SERVER_RPC_STATUS_H_
#define SYNCBN_SERVER_RPC_STATUS_H_

#include <string>

#include "google/rpc/status.pb.h"
#include "grpcpp/support/status.h"
#include "server/core/types.h"

namespace syncbn::rpc {

// The ErrorInfo's metadata has `key`, unless it is null, or `layer`, unless it is empty.
void ToProto(const core::Error& error, const core::RoundKey* key, google::rpc::Status* status);
void ToProto(const core::Error& error, const std::string& layer, google::rpc::Status* status);

// Returns the error that a worker has kept of an earlier master's answer. A reason that no round fails with becomes
// GROUP_ENDED.
core::Error FromProto(const google::rpc::Status& status);

// Returns at most 1024 bytes of the message. A call's status travels in HTTP/2 trailers, twice and escaped, and a peer
// drops trailers of more than 8 KiB.
std::string Brief(std::string message);

// Returns the status that ends a call. Its details travel in "grpc-status-details-bin".
grpc::Status ToGrpc(const core::Error& error);
// The same for an absl::Status, with `reason`.
grpc::Status ToGrpc(const absl::Status& status, const char* reason);

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_STATUS_H_
