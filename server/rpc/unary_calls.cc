#include "server/rpc/unary_calls.h"

#include <algorithm>

#include "plumbing/check.h"
#include "server/core/error.h"
#include "server/rpc/status.h"

namespace syncbn::rpc {
namespace {

constexpr size_t kMostBytes = size_t{64} << 20;
constexpr size_t kMostBytesOfAddress = size_t{16} << 20;
constexpr absl::Duration kPatience = absl::Seconds(5);

}  // namespace

void UnaryCalls::NoteRequest(const std::string& peer, size_t bytes) {
  if (const auto frames = connections_->FramesOf(peer)) frames->Add(bytes);
}

grpc::Status UnaryCalls::Admit(Call* call, const std::string& address, size_t length) {
  // An empty answer counts as well, so that an address is known until the last of its answers is forgotten.
  const size_t bytes = std::max<size_t>(length, 1);
  const auto found = bytes_of_.find(address);
  const size_t of_address = found == bytes_of_.end() ? 0 : found->second;
  // An answer that is longer than the bound goes by itself.
  if (of_address != 0 && of_address + bytes > kMostBytesOfAddress) {
    return ToGrpc(core::LimitError(of_address + bytes, "bytes of unread answers to one address",
                                   "max_unread_answers_of_address", kMostBytesOfAddress));
  }
  if (bytes_ != 0 && bytes_ + bytes > kMostBytes) {
    return ToGrpc(core::LimitError(bytes_ + bytes, "bytes of unread answers", "max_unread_answers", kMostBytes));
  }
  const absl::Time due = *now_ + kPatience;
  unread_.emplace(call, Unread{address, bytes, due});
  timers_.insert({due, call});
  bytes_of_[address] += bytes;
  bytes_ += bytes;
  return grpc::Status::OK;
}

void UnaryCalls::Forget(Call* call) {
  const auto found = unread_.find(call);
  if (found == unread_.end()) return;
  const Unread& unread = found->second;
  timers_.erase({unread.due, call});
  bytes_ -= unread.bytes;
  const auto of_address = bytes_of_.find(unread.address);
  SYNCBN_CHECK(of_address != bytes_of_.end() && of_address->second >= unread.bytes, unread.address);
  of_address->second -= unread.bytes;
  if (of_address->second == 0) bytes_of_.erase(of_address);
  unread_.erase(found);
}

absl::Time UnaryCalls::NextTimer() const { return timers_.empty() ? absl::InfiniteFuture() : timers_.begin()->first; }

void UnaryCalls::RunTimers() {
  while (NextTimer() <= *now_) {
    Call* const call = timers_.begin()->second;
    timers_.erase(timers_.begin());
    call->Cancel();  // Its end comes by the queue.
  }
}

}  // namespace syncbn::rpc
