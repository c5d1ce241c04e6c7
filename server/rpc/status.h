// Errors of the engine as statuses: with a google.rpc.ErrorInfo (domain "syncbn") in their details.

#ifndef SYNCBN_SERVER_RPC_STATUS_H_
#define SYNCBN_SERVER_RPC_STATUS_H_

#include <string>

#include "google/rpc/status.pb.h"
#include "grpcpp/support/status.h"
#include "server/core/types.h"

namespace syncbn::rpc {

// `key` and `layer`, where given, go into the ErrorInfo's metadata.
void ToProto(const core::Error& error, const core::RoundKey* key, google::rpc::Status* status);
void ToProto(const core::Error& error, const std::string& layer, google::rpc::Status* status);

// At most 1024 bytes of it. A call's status travels in HTTP/2 trailers, twice and escaped, and a peer drops trailers of
// more than 8 KiB, whatever is in them.
std::string Brief(std::string message);

// For the end of a call. The details travel in "grpc-status-details-bin".
grpc::Status ToGrpc(const core::Error& error);
// For NOT_FOUND and the like from inspection: with `reason`.
grpc::Status ToGrpc(const absl::Status& status, const char* reason);

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_STATUS_H_
