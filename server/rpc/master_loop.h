// The one thread of a master: it drives the completion queue, and the engine inline.

#ifndef SYNCBN_SERVER_RPC_MASTER_LOOP_H_
#define SYNCBN_SERVER_RPC_MASTER_LOOP_H_

#include <cstddef>
#include <memory>
#include <string>
#include <thread>

#include "absl/time/time.h"
#include "grpcpp/server_builder.h"
#include "server/core/limits.h"

namespace syncbn::rpc {

struct LoopOptions {
  core::Limits limits;
  size_t max_unread_bytes = 0;
  absl::Duration join_timeout;
  size_t max_watchers = 0;
  std::string description;
};

class MasterLoop {
 public:
  explicit MasterLoop(LoopOptions options);
  // Stop() must have been called if Start() was.
  ~MasterLoop();
  MasterLoop(const MasterLoop&) = delete;
  MasterLoop& operator=(const MasterLoop&) = delete;

  // Adds the services and the queue. Before the server is built.
  void Register(grpc::ServerBuilder* builder);
  // Begins to serve. After the server has been started.
  void Start();
  // Health is NOT_SERVING while nobody can connect. Any thread, between Start and Stop.
  void SetListening(bool listening);
  // Tells every worker that the master is going away. Any thread; the server's own Shutdown follows.
  void BeginShutdown();
  // Ends the thread. After the server's Shutdown.
  void Stop();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
  std::thread thread_;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_MASTER_LOOP_H_
