#include "plumbing/channel_sockets.h"

#include "grpc/support/sync.h"
#include "plumbing/fork_sockets.h"

// The layout of gRPC's type, which its public headers only declare: a table of functions, then a reference count. Later
// versions have appended entries to the table that may be null.
struct grpc_socket_mutator {
  struct Table {
    bool (*mutate)(int descriptor, grpc_socket_mutator* mutator);
    int (*compare)(grpc_socket_mutator* a, grpc_socket_mutator* b);
    void (*destroy)(grpc_socket_mutator* mutator);
    bool (*mutate_with_usage)(const void* info, grpc_socket_mutator* mutator);
  };
  const Table* table;
  gpr_refcount references;
};

namespace syncbn {
namespace {

bool Note(int descriptor, grpc_socket_mutator*) {
  GiveUpInForkedChildren(descriptor);
  return true;  // False would end the connection.
}

// There is only one.
int Compare(grpc_socket_mutator*, grpc_socket_mutator*) { return 0; }
void Keep(grpc_socket_mutator*) {}

}  // namespace

void GiveUpSocketsInForkedChildren(grpc::ChannelArguments* arguments) {
  static constexpr grpc_socket_mutator::Table kTable = {Note, Compare, Keep, nullptr};
  static grpc_socket_mutator* const mutator = [] {
    auto* const made = new grpc_socket_mutator{&kTable, {}};
    gpr_ref_init(&made->references, 1);  // Ours, which is never given back.
    return made;
  }();
  gpr_ref(&mutator->references);
  arguments->SetSocketMutator(mutator);
}

}  // namespace syncbn
