// Handles of the C interface: the objects of client and master behind the types that syncbn.h names.

#ifndef SYNCBN_CLIENT_C_HANDLES_H_
#define SYNCBN_CLIENT_C_HANDLES_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "client/c/syncbn.h"
#include "client/cc/batch_norm_pass.h"
#include "client/cc/errors.h"
#include "client/cc/worker.h"
#include "server/http/http_server.h"
#include "server/master_server.h"

struct syncbn_error {
  absl::Status status;
  syncbn::ErrorDetails details;
  std::string message;
};

struct syncbn_master {
  std::unique_ptr<syncbn::MasterServer> server;
  std::string target;
  mutable absl::Mutex mutex;
  std::unique_ptr<syncbn::http::HttpServer> http ABSL_GUARDED_BY(mutex);  // Ends before the server.
  std::string http_address ABSL_GUARDED_BY(mutex);                        // Set once, with `http`.
};

// Passes keep the worker that they belong to, so that one that outlives its handle fails instead of crashing.
struct syncbn_worker {
  std::shared_ptr<syncbn::Worker> worker;

  ~syncbn_worker() { worker->Close(); }
};

struct syncbn_round {
  syncbn::Round round;
};

struct syncbn_rounds {
  std::vector<syncbn::RoundKey> keys;
};

struct syncbn_forward {
  std::shared_ptr<syncbn::Worker> worker;
  syncbn::ForwardPass pass;
};

struct syncbn_backward {
  std::shared_ptr<syncbn::Worker> worker;
  syncbn::BackwardPass pass;
};

#endif  // SYNCBN_CLIENT_C_HANDLES_H_
