// The memory of passes over CUDA tensors: for each stream, a workspace for the reductions and slots for the vectors of
// passes. It is allocated when passes first need it and then reused without a call to CUDA.
//
// A slot can be reused without asking CUDA if the GPU is done with it, because a slot belongs to one stream. A pass
// first enqueues a reduction there, and the host writes to the slot only after the reduction has raised its flag. By
// then all earlier work of the stream is complete, that of the slot's previous user included.
//
// Exception: releasing a stream after a failed round may race with older work. This is safe because epochs only grow,
// so a release lets nothing go on but the waits for this round and older ones, and because kernels treat a round as
// failed unless RoundWords::epoch, which only a successful round writes, is the round's own.

#ifndef SYNCBN_CLIENT_CC_DEVICE_MEMORY_H_
#define SYNCBN_CLIENT_CC_DEVICE_MEMORY_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "client/cc/device_runtime.h"
#include "client/cc/pass_vectors.h"
#include "plumbing/check.h"

namespace syncbn {

// Streams that a process keeps memory for. One more replaces the stream that has been idle longest.
inline constexpr size_t kMaxDeviceStreams = 64;
// Slots of one stream, in bytes, pinned and device memory together. A slot of C channels, C rounded up to a power of
// two that is 64 or more, takes 256 + 32 * C bytes of pinned and 40 * C bytes of device memory. A stream has as many
// slots as it ever had passes alive at once (those of a network's layers between forward and backward, and the
// stream-ordered ones that the host is ahead of the GPU), rounded up to 1 MB for each size.
inline constexpr size_t kMaxSlotBytesPerStream = size_t{1} << 30;

// Returns OK, or INTERNAL with `what` and CUDA's text.
absl::Status DeviceStatus(DeviceRuntime* runtime, DeviceRuntime::Error error, const char* what);

// Makes a device the calling thread's current one for the scope's lifetime.
class DeviceScope {
 public:
  DeviceScope() = default;  // Leaves the current device as it is.
  DeviceScope(DeviceRuntime* runtime, int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  // FAILED_PRECONDITION if there is no such device, or no driver.
  const absl::Status& status() const { return status_; }

 private:
  DeviceRuntime* entered_ = nullptr;  // Null if the device was current before.
  absl::Status status_;
};

// The memory of one pass: vectors of `capacity` elements, of which local and merged are pinned and the coefficients on
// the device, and the words through which host and GPU tell each other how far they are.
struct DeviceSlot : PassVectors {
  size_t capacity = 0;
  uint32_t epoch = 0;
  // Pinned; the GPU sets it to `epoch` once a reduction has written local.
  uint32_t* flag = nullptr;
  // Pinned; the host writes them once the flag is up: merged, and for a stream-ordered round the words.
  double* delivered[2] = {};
  kernels::RoundWords* words = nullptr;
  // Pinned; reaches `epoch` when a stream-ordered round has ended, which lets the stream go on.
  uint32_t* released = nullptr;

  bool Raised() const { return __atomic_load_n(flag, __ATOMIC_ACQUIRE) == epoch; }
  // Writes a round's two results to merged.
  void Deliver(absl::Span<const double> first, absl::Span<const double> second) const {
    SYNCBN_CHECK(Raised(), "a result is delivered before the reduction has ended");
    SYNCBN_CHECK(first.size() <= capacity && second.size() <= capacity);
    std::copy(first.begin(), first.end(), delivered[0]);
    std::copy(second.begin(), second.end(), delivered[1]);
  }
  void Release() const { __atomic_store_n(released, epoch, __ATOMIC_RELEASE); }
  kernels::PendingRound pending() const { return {words, epoch}; }
};

// The memory of one stream.
//
// Thread safety: any thread.
class StreamMemory {
 public:
  StreamMemory(DeviceRuntime* runtime, int device, Stream stream)
      : runtime_(runtime), device_(device), stream_(stream) {}
  // Waits for the device. No slot may be in use.
  ~StreamMemory();
  StreamMemory(const StreamMemory&) = delete;
  StreamMemory& operator=(const StreamMemory&) = delete;

  DeviceRuntime* runtime() const { return runtime_; }
  int device() const { return device_; }
  Stream stream() const { return stream_; }

  // Returns a slot for `channels` with a new epoch. The device must be current.
  // Errors: RESOURCE_EXHAUSTED past kMaxSlotBytesPerStream; INTERNAL for CUDA's.
  absl::StatusOr<DeviceSlot*> Take(int64_t channels) ABSL_LOCKS_EXCLUDED(mutex_);
  void Return(DeviceSlot* slot) ABSL_LOCKS_EXCLUDED(mutex_);

  // Calls launch(context) with the stream and a workspace for reductions over `shape`. The device must be current.
  // Errors: INTERNAL, beginning with `what`.
  absl::Status Reduce(const kernels::TensorShape& shape,
                      const std::function<DeviceRuntime::Error(kernels::cuda::Context*)>& launch, const char* what)
      ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  absl::Status GrowWorkspace(size_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Makes free slots of that capacity, one at least.
  absl::Status AddSlots(size_t capacity) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void AddSlot(size_t capacity, char* pinned, char* device) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  DeviceRuntime* const runtime_;
  const int device_;
  const Stream stream_;

  absl::Mutex mutex_;
  void* workspace_ ABSL_GUARDED_BY(mutex_) = nullptr;
  size_t workspace_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  struct Slab {
    void* pinned = nullptr;
    void* device = nullptr;
  };
  std::vector<Slab> slabs_ ABSL_GUARDED_BY(mutex_);
  size_t slot_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<size_t, std::vector<DeviceSlot*>> free_ ABSL_GUARDED_BY(mutex_);  // By capacity.
  std::vector<std::unique_ptr<DeviceSlot>> slots_ ABSL_GUARDED_BY(mutex_);
};

// The slot of one pass and its stream's memory. The slot goes back when the lease ends.
class SlotLease {
 public:
  SlotLease(std::shared_ptr<StreamMemory> memory, DeviceSlot* slot) : memory_(std::move(memory)), slot_(slot) {}
  ~SlotLease() { memory_->Return(slot_); }
  SlotLease(const SlotLease&) = delete;
  SlotLease& operator=(const SlotLease&) = delete;

  StreamMemory& memory() const { return *memory_; }
  const DeviceSlot& slot() const { return *slot_; }
  DeviceRuntime* runtime() const { return memory_->runtime(); }

 private:
  const std::shared_ptr<StreamMemory> memory_;
  DeviceSlot* const slot_;
};

// Returns a slot of a stream's memory. The device must be current.
// Errors: FAILED_PRECONDITION if the stream is being captured into a graph, which could not replay a round; those of
// StreamMemory::Take.
absl::StatusOr<std::shared_ptr<SlotLease>> LeaseSlot(DeviceRuntime* runtime, int device, Stream stream,
                                                     int64_t channels);

// Returns OK if streams of this device can wait for the host and every kernel is loaded. The first call for a device
// takes long and may wait for it. The device must be current. Errors: FAILED_PRECONDITION with the reason.
absl::Status PrepareStreamOrder(DeviceRuntime* runtime, int device);

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_DEVICE_MEMORY_H_
