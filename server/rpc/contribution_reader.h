// Contributions from bytes, for the frames of a running training.

#ifndef SYNCBN_SERVER_RPC_CONTRIBUTION_READER_H_
#define SYNCBN_SERVER_RPC_CONTRIBUTION_READER_H_

#include "google/protobuf/arena.h"
#include "plumbing/byte_pieces.h"
#include "server/core/types.h"

namespace syncbn::rpc {

// Reads a v1::Contribution as serializers write it. Its vectors are copied to `arena`, since doubles in a frame need
// not be aligned. Takes no more memory than the bytes.
//
// Returns false, and changes nothing, for a contribution in another form, or with a payload that is not of its phase:
// protobuf is to read it, or to tell what is wrong.
bool ReadContribution(const BytePieces& bytes, google::protobuf::Arena* arena, core::Contribution* contribution);

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_CONTRIBUTION_READER_H_
