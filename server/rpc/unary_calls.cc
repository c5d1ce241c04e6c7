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

// Returns the part of a limit above which there is hardly room.
constexpr size_t AlmostAllOf(size_t limit) { return limit / 4 * 3; }

grpc::Status TooMuchOfAddress(size_t bytes) {
  return ToGrpc(core::LimitError(bytes, "bytes of unread answers to one address", "max_unread_answers_of_address",
                                 kMostBytesOfAddress));
}

grpc::Status TooMuchOfAll(size_t bytes) {
  return ToGrpc(core::LimitError(bytes, "bytes of unread answers", "max_unread_answers", kMostBytes));
}

}  // namespace

UnaryCalls::UnaryCalls(const absl::Time* now, Connections* connections, size_t max_turn_bytes)
    : now_(now),
      connections_(connections),
      taken_(kMostCallsInARow, kLongestPause),
      made_(std::max<size_t>(max_turn_bytes, 1), kLongestPause) {}

void UnaryCalls::Take(std::function<void()> await) {
  taken_.Add(1, *now_);
  if (taken_.spent() || made_.spent()) {
    paused_.push_back(std::move(await));
  } else {
    await();
  }
}

void UnaryCalls::EndTurn(bool quiet, bool idle) {
  taken_.EndTurn(quiet, *now_);
  made_.EndTurn(idle, *now_);
  if (taken_.spent() || made_.spent()) return;
  for (const auto& await : std::exchange(paused_, {})) await();
}

void UnaryCalls::NoteRequest(const std::string& peer, size_t bytes) {
  if (const auto frames = connections_->FramesOf(peer)) frames->Add(bytes);
}

grpc::Status UnaryCalls::CheckRoom(const std::string& address) const {
  const auto found = bytes_of_.find(address);
  if (found != bytes_of_.end() && found->second > AlmostAllOf(kMostBytesOfAddress)) {
    return TooMuchOfAddress(found->second);
  }
  return bytes_ > AlmostAllOf(kMostBytes) ? TooMuchOfAll(bytes_) : grpc::Status::OK;
}

grpc::Status UnaryCalls::Admit(Call* call, const std::string& address, size_t length) {
  made_.Add(length, *now_);
  // An empty answer counts as well, so that an address is known until the last of its answers is forgotten.
  const size_t bytes = std::max<size_t>(length, 1);
  const auto found = bytes_of_.find(address);
  const size_t of_address = found == bytes_of_.end() ? 0 : found->second;
  // An answer that is longer than the bound goes by itself.
  if (of_address != 0 && of_address + bytes > kMostBytesOfAddress) return TooMuchOfAddress(of_address + bytes);
  if (bytes_ != 0 && bytes_ + bytes > kMostBytes) return TooMuchOfAll(bytes_ + bytes);
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
