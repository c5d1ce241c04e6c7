// Channel arguments that workers and masters have in common.

#ifndef SYNCBN_PLUMBING_CHANNEL_ARGUMENTS_H_
#define SYNCBN_PLUMBING_CHANNEL_ARGUMENTS_H_

#include "grpcpp/support/channel_arguments.h"

namespace syncbn {

// Sets when an idle connection is probed and given up, and how much is read at once.
inline void SetTransportArguments(grpc::ChannelArguments* arguments) {
  arguments->SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 30000);
  arguments->SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20000);
  // Large reads, so that a frame seldom arrives in two buffers. See PrepareGrpc.
  constexpr int kReadBytes = 128 << 10;
  arguments->SetInt("grpc.experimental.tcp_read_chunk_size", kReadBytes);
  arguments->SetInt("grpc.experimental.tcp_min_read_chunk_size", kReadBytes);
}

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_CHANNEL_ARGUMENTS_H_
