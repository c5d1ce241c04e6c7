// The calls of a master that are no worker's: how many unary ones there are, what their callers leave unread, and how
// many are taken in a row.

#ifndef SYNCBN_SERVER_RPC_UNARY_CALLS_H_
#define SYNCBN_SERVER_RPC_UNARY_CALLS_H_

#include <cstddef>
#include <deque>
#include <functional>
#include <string>
#include <utility>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "grpcpp/support/status.h"
#include "server/rpc/burst.h"
#include "server/rpc/connections.h"

namespace syncbn::rpc {

// A caller that reads nothing would keep each answer in memory for ever. So the answers that are unread may take a
// certain number of bytes, in all and for each address, and a call whose answer is unread for 5 s is cancelled.
//
// Calls come by the thousand, and gRPC reads no socket while its queue has one (see Burst). So they are taken a few in
// a row, and fewer if their answers are long, whoever is to read these.
//
// Thread safety: none; it lives on the thread that drives the queue.
class UnaryCalls {
 public:
  class Call {
   public:
    virtual ~Call() = default;
    virtual void Cancel() = 0;
  };

  // `now` is the time of the event that is being handled. It and `connections` must outlive the object. Answers of
  // `max_turn_bytes` are made in a row.
  UnaryCalls(const absl::Time* now, Connections* connections, size_t max_turn_bytes);

  // Calls that exist, those that are waited for among them.
  void Begin() { ++live_; }
  void End() { --live_; }
  bool idle() const { return live_ == 0 && paused_.empty(); }

  // A call has come. `await` waits for the next of its kind: at once, or after a pause if it is enough for now.
  void Take(std::function<void()> await);
  // Returns whether there is a pause, which turns without an event shorten.
  bool pausing() const { return !paused_.empty(); }
  // Ends a turn, as Burst::EndTurn. `idle`: all sockets have been looked at.
  void EndTurn(bool quiet, bool idle);

  // A request of so many bytes has come of this peer.
  void NoteRequest(const std::string& peer, size_t bytes);

  // Returns RESOURCE_EXHAUSTED (LIMIT_EXCEEDED) if a caller at `address` leaves, or all of them leave, so much unread
  // that there is hardly room for another answer. One that is to be refused need not be made.
  grpc::Status CheckRoom(const std::string& address) const;
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
  Burst taken_;
  Burst made_;  // Bytes of answers.
  std::deque<std::function<void()>> paused_;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_UNARY_CALLS_H_
