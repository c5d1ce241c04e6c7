// The memory of passes over CUDA tensors: for each stream, a workspace for the reductions and slots for the vectors of
// passes. It is allocated when passes first need it and then used again and again, without a call to CUDA.
//
// Why a slot can be used again without asking CUDA whether the GPU is done with it: a slot belongs to one stream. A
// pass first enqueues a reduction there, and writes to the slot from the host only once the reduction has raised its
// flag. Whatever the stream was given before, by the slot's previous user too, is complete then.
//
// The one write that may come earlier is the release of a stream that waits for a round that failed. It does no harm:
// releases are epochs that only grow, so that it can let nothing go on but what waits for this round or an older one;
// and whoever goes on tells by RoundWords::epoch, which only a round's success writes, that this one failed.

#ifndef SYNCBN_CLIENT_CC_DEVICE_MEMORY_H_
#define SYNCBN_CLIENT_CC_DEVICE_MEMORY_H_

#include <atomic>
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
#include "client/cc/device_runtime.h"

namespace syncbn {

// Streams that a process keeps memory for. One more takes the place of the one that was idle longest.
inline constexpr size_t kMaxDeviceStreams = 64;
// Slots of one stream, in bytes, pinned and device memory together. A slot of C channels, C rounded up to a power of
// two that is 64 or more, takes 256 + 32 * C bytes of pinned and 48 * C bytes of device memory. There are as many as
// passes were ever alive at once: those of a network's layers between forward and backward, and of stream-ordered ones
// those that the host is ahead of the GPU.
inline constexpr size_t kMaxSlotBytesPerStream = size_t{1} << 30;

// OK, or INTERNAL with CUDA's text.
absl::Status DeviceStatus(DeviceRuntime* runtime, DeviceRuntime::Error error, const char* what);

// Makes a device the calling thread's current one, for as long as it lives.
class DeviceScope {
 public:
  DeviceScope(DeviceRuntime* runtime, int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  // FAILED_PRECONDITION if there is no such device, or no driver.
  const absl::Status& status() const { return status_; }

 private:
  DeviceRuntime* const runtime_;
  int before_ = 0;
  bool restore_ = false;
  absl::Status status_;
};

// Vectors of one pass, `capacity` elements each.
struct DeviceSlot {
  size_t capacity = 0;
  // Pinned; written by the GPU: a reduction's two results, and `flag` = `epoch` once they are complete.
  uint32_t* flag = nullptr;
  uint32_t epoch = 0;
  double* local[2] = {};
  // Pinned; written by the host once the flag is up: a round's two results, and of a stream-ordered round `words`.
  double* merged[2] = {};
  kernels::cuda::RoundWords* words = nullptr;
  // Pinned; a stream-ordered round is over, and the stream goes on, when this has come to `epoch`.
  uint32_t* released = nullptr;
  // On the device: what finalizing kernels make of these.
  double* mean = nullptr;
  double* var = nullptr;  // Evaluation only.
  double* scale = nullptr;
  double* shift = nullptr;
  double* mean_dy = nullptr;
  double* projection = nullptr;

  bool Raised() const { return __atomic_load_n(flag, __ATOMIC_ACQUIRE) == epoch; }
  void Release() const { __atomic_store_n(released, epoch, __ATOMIC_RELEASE); }
  kernels::cuda::LateRound late() const { return {words, epoch}; }
};

// One stream's memory. Thread-safe.
class StreamMemory {
 public:
  StreamMemory(DeviceRuntime* runtime, int device, Stream stream)
      : runtime_(runtime), device_(device), stream_(stream) {}
  // Waits for the device. Nothing is in use.
  ~StreamMemory();
  StreamMemory(const StreamMemory&) = delete;
  StreamMemory& operator=(const StreamMemory&) = delete;

  DeviceRuntime* runtime() const { return runtime_; }
  int device() const { return device_; }
  Stream stream() const { return stream_; }

  // A slot for `channels`, its epoch a new one. RESOURCE_EXHAUSTED past kMaxSlotBytesPerStream. The device is current.
  absl::StatusOr<DeviceSlot*> Take(int64_t channels) ABSL_LOCKS_EXCLUDED(mutex_);
  void Return(DeviceSlot* slot) ABSL_LOCKS_EXCLUDED(mutex_);

  // Calls launch(context), the context with a workspace for reductions over `shape` and the stream. The device is
  // current.
  absl::Status Reduce(const kernels::TensorShape& shape,
                      const std::function<DeviceRuntime::Error(kernels::cuda::Context*)>& launch, const char* what)
      ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  absl::Status GrowWorkspace(size_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<DeviceSlot*> Allocate(size_t capacity) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  DeviceRuntime* const runtime_;
  const int device_;
  const Stream stream_;

  absl::Mutex mutex_;
  void* workspace_ ABSL_GUARDED_BY(mutex_) = nullptr;
  size_t workspace_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  size_t slot_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<size_t, std::vector<DeviceSlot*>> free_ ABSL_GUARDED_BY(mutex_);  // By capacity.
  std::vector<std::unique_ptr<DeviceSlot>> slots_ ABSL_GUARDED_BY(mutex_);
};

// A slot that one pass has, and its stream's memory. Returns the slot when it ends.
class SlotLease {
 public:
  SlotLease(std::shared_ptr<StreamMemory> memory, DeviceSlot* slot) : memory_(std::move(memory)), slot_(slot) {}
  ~SlotLease() { memory_->Return(slot_); }
  SlotLease(const SlotLease&) = delete;
  SlotLease& operator=(const SlotLease&) = delete;

  StreamMemory& memory() const { return *memory_; }
  const DeviceSlot& slot() const { return *slot_; }
  DeviceRuntime* runtime() const { return memory_->runtime(); }
  // The stream, and no workspace: for launches that reduce nothing.
  kernels::cuda::Context context() const;

  // What a forward pass has left in mean, scale and shift, for the backward pass to read.
  std::atomic<bool> has_coefficients{false};

 private:
  const std::shared_ptr<StreamMemory> memory_;
  DeviceSlot* const slot_;
};

// A slot of a stream's memory. FAILED_PRECONDITION if the stream is being captured into a graph: a round is nothing
// that a graph could replay. The device is current.
absl::StatusOr<std::shared_ptr<SlotLease>> LeaseSlot(DeviceRuntime* runtime, int device, Stream stream,
                                                     int64_t channels);

// OK if streams of this device can wait for the host, and every kernel is there for them to go on with; else why they
// cannot: FAILED_PRECONDITION. The first call for a device takes long, and may wait for it. The device is current.
absl::Status PrepareStreamOrder(DeviceRuntime* runtime, int device);

// Whether the lease is of this stream. The device is current.
bool IsOfStream(const SlotLease& lease, int device, Stream stream);

}  // namespace syncbn

#endif  // SYNCBN_CLIENT_CC_DEVICE_MEMORY_H_
