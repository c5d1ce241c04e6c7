// The sockets that gRPC opens for a channel.

#ifndef SYNCBN_PLUMBING_CHANNEL_SOCKETS_H_
#define SYNCBN_PLUMBING_CHANNEL_SOCKETS_H_

#include "grpcpp/support/channel_arguments.h"

namespace syncbn {

// Closes the connections of a channel with these arguments in forked children (fork_sockets.h).
void GiveUpSocketsInForkedChildren(grpc::ChannelArguments* arguments);

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_CHANNEL_SOCKETS_H_
