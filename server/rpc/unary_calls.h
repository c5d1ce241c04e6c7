// The unary calls of a master: how many there are, and what their callers leave unread.

#ifndef SYNCBN_SERVER_RPC_UNARY_CALLS_H_
#define SYNCBN_SERVER_RPC_UNARY_CALLS_H_

#include <cstddef>
#include <string>
#include <utility>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "grpcpp/support/status.h"
#include "server/rpc/connections.h"

namespace syncbn::rpc {

// A caller that reads nothing would keep each answer in memory for ever. So the answers that are unread may take a
// certain number of bytes, in all and for each address, and a call whose answer is unread for 5 s is cancelled.
//
// Thread safety: none; it lives on the thread that drives the queue.
class UnaryCalls {
 public:
  class Call {
   public:
    virtual ~Call() = default;
    virtual void Cancel() = 0;
  };

  // `now` is the time of the event that is being handled. It and `connections` must outlive the object.
  UnaryCalls(const absl::Time* now, Connections* connections) : now_(now), connections_(connections) {}

  // Calls that exist, those that are waited for among them.
  void Begin() { ++live_; }
  void End() { --live_; }
  bool idle() const { return live_ == 0; }

  // A request of so many bytes has come of this peer.
  void NoteRequest(const std::string& peer, size_t bytes);

  // Takes note of an answer of `length` bytes to a caller at `address`, which is on its way from here on. Returns
  // RESOURCE_EXHAUSTED (LIMIT_EXCEEDED) if others of the same caller, or of all, are unread and leave no room for it.
  grpc::Status Admit(Call* call, const std::string& address, size_t length);
  // The answer was read, or its call has ended.
  void Forget(Call* call);

  // Returns when RunTimers is next due; InfiniteFuture if nothing is unread.
  absl::Time NextTimer() const;
  // Cancels calls whose answers have been unread for too long.
  void RunTimers();

 private:
  struct Unread {
    std::string address;
    size_t bytes = 0;
    absl::Time due;
  };

  const absl::Time* const now_;
  Connections* const connections_;
  size_t live_ = 0;
  absl::flat_hash_map<Call*, Unread> unread_;
  absl::btree_set<std::pair<absl::Time, Call*>> timers_;  // The calls that have not been cancelled.
  absl::flat_hash_map<std::string, size_t> bytes_of_;     // By address.
  size_t bytes_ = 0;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_UNARY_CALLS_H_
