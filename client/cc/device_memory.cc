#include "client/cc/device_memory.h"

#include <algorithm>
#include <new>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"

namespace syncbn {
namespace {

constexpr size_t kLeastCapacity = 64;
// Separate cache lines: one for the GPU's writes and the host's polling, one for the opposite direction.
constexpr size_t kFlagBytes = 128;
constexpr size_t kReleaseBytes = 128;
constexpr size_t kPinnedVectors = 4;
// An allocation takes CUDA up to a millisecond and may wait for the device, so slots are allocated many at once, up to
// this many bytes of pinned and device memory together, and a workspace that nearly all tensors can do with.
constexpr size_t kSlabBytes = size_t{1} << 20;
constexpr size_t kLeastWorkspaceBytes = size_t{1} << 20;
constexpr size_t kDeviceVectors = PassVectors::kCoefficients;

size_t CapacityFor(int64_t channels) {
  size_t capacity = kLeastCapacity;
  while (capacity < static_cast<size_t>(channels)) capacity *= 2;
  return capacity;
}

// The memories of all streams of the process.
class StreamTable {
 public:
  // Never destroyed: at exit, CUDA may already be gone.
  static StreamTable& Get() {
    static StreamTable* const table = new StreamTable;
    return *table;
  }

  std::shared_ptr<StreamMemory> Find(DeviceRuntime* runtime, int device, Stream stream, uint64_t stream_id) {
    std::shared_ptr<StreamMemory> evicted;  // Destroyed without the lock, since its end waits for the device.
    absl::MutexLock lock(&mutex_);
    Entry& entry = entries_[{runtime, device, stream_id}];
    entry.last_use = ++uses_;
    if (entry.memory == nullptr) {
      entry.memory = std::make_shared<StreamMemory>(runtime, device, stream);
      if (entries_.size() > kMaxDeviceStreams) evicted = EvictIdlest();
    }
    return entry.memory;
  }

 private:
  struct Entry {
    std::shared_ptr<StreamMemory> memory;
    uint64_t last_use = 0;
  };

  // Live passes keep their stream's memory; a later pass on that stream starts with new memory.
  std::shared_ptr<StreamMemory> EvictIdlest() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const auto idlest = std::min_element(entries_.begin(), entries_.end(), [](const auto& a, const auto& b) {
      return a.second.last_use < b.second.last_use;
    });
    std::shared_ptr<StreamMemory> memory = std::move(idlest->second.memory);
    entries_.erase(idlest);
    return memory;
  }

  absl::Mutex mutex_;
  uint64_t uses_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<std::tuple<DeviceRuntime*, int, uint64_t>, Entry> entries_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::Status DeviceStatus(DeviceRuntime* runtime, DeviceRuntime::Error error, const char* what) {
  if (error == DeviceRuntime::kSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": ", runtime->ErrorString(error), " (CUDA error ", error, ")"));
}

DeviceScope::DeviceScope(DeviceRuntime* runtime, int device) {
  int current = 0;
  DeviceRuntime::Error error = runtime->CurrentDevice(&current);
  if (error == DeviceRuntime::kSuccess && current == device) return;
  if (error == DeviceRuntime::kSuccess) {
    error = runtime->EnterDevice(device);
    if (error == DeviceRuntime::kSuccess) entered_ = runtime;
  }
  if (error != DeviceRuntime::kSuccess) {
    status_ = absl::FailedPreconditionError(absl::StrCat(
        "CUDA device ", device, " cannot be used: ", runtime->ErrorString(error), " (CUDA error ", error, ")"));
  }
}

DeviceScope::~DeviceScope() {
  if (entered_ != nullptr) entered_->LeaveDevice();
}

StreamMemory::~StreamMemory() {
  const DeviceScope scope(runtime_, device_);
  if (workspace_ != nullptr) runtime_->FreeDevice(workspace_);
  for (const Slab& slab : slabs_) {
    runtime_->FreeDevice(slab.device);
    runtime_->FreePinned(slab.pinned);
  }
}

absl::StatusOr<DeviceSlot*> StreamMemory::Take(int64_t channels) {
  const size_t capacity = CapacityFor(channels);
  absl::MutexLock lock(&mutex_);
  std::vector<DeviceSlot*>& free = free_[capacity];
  if (free.empty()) {
    if (absl::Status status = AddSlots(capacity); !status.ok()) return status;
  }
  DeviceSlot* const slot = free.back();
  free.pop_back();
  SYNCBN_CHECK(slot->capacity >= static_cast<size_t>(channels), "a slot of ", slot->capacity, " elements");
  if (++slot->epoch == 0) ++slot->epoch;  // 0 is the value of new memory.
  return slot;
}

void StreamMemory::Return(DeviceSlot* slot) {
  absl::MutexLock lock(&mutex_);
  free_[slot->capacity].push_back(slot);
}

absl::Status StreamMemory::AddSlots(size_t capacity) {
  const size_t pinned_bytes = kFlagBytes + kReleaseBytes + kPinnedVectors * capacity * sizeof(double);
  const size_t device_bytes = kDeviceVectors * capacity * sizeof(double);
  const size_t each = pinned_bytes + device_bytes;
  const size_t count = std::min(std::max(kSlabBytes / each, size_t{1}), (kMaxSlotBytesPerStream - slot_bytes_) / each);
  if (count == 0) {
    return absl::ResourceExhaustedError(absl::StrCat("the passes that are alive on one CUDA stream need more than ",
                                                     kMaxSlotBytesPerStream, " bytes of statistics"));
  }
  Slab slab;
  absl::Status status =
      DeviceStatus(runtime_, runtime_->AllocatePinned(count * pinned_bytes, &slab.pinned), "pinned memory");
  if (!status.ok()) return status;
  status = DeviceStatus(runtime_, runtime_->AllocateDevice(count * device_bytes, &slab.device), "device memory");
  if (!status.ok()) {
    runtime_->FreePinned(slab.pinned);
    return status;
  }
  slabs_.push_back(slab);
  slot_bytes_ += count * each;
  for (size_t i = 0; i < count; ++i) {
    AddSlot(capacity, static_cast<char*>(slab.pinned) + i * pinned_bytes,
            static_cast<char*>(slab.device) + i * device_bytes);
  }
  return absl::OkStatus();
}

void StreamMemory::AddSlot(size_t capacity, char* pinned, char* device) {
  auto slot = std::make_unique<DeviceSlot>();
  slot->capacity = capacity;
  slot->flag = reinterpret_cast<uint32_t*>(pinned);
  char* const release = pinned + kFlagBytes;
  slot->released = reinterpret_cast<uint32_t*>(release);
  slot->words = new (release + sizeof(double)) kernels::RoundWords;
  double* const host = reinterpret_cast<double*>(release + kReleaseBytes);
  for (size_t i = 0; i < 2; ++i) {
    slot->local[i] = host + i * capacity;
    slot->merged[i] = slot->delivered[i] = host + (2 + i) * capacity;
  }
  slot->PlaceCoefficients(reinterpret_cast<double*>(device), capacity);
  free_[capacity].push_back(slot.get());
  slots_.push_back(std::move(slot));
}

absl::Status StreamMemory::GrowWorkspace(size_t bytes) {
  if (workspace_ != nullptr) runtime_->FreeDevice(workspace_);
  workspace_ = nullptr;
  workspace_bytes_ = 0;
  // Half as much again, so that slowly growing tensors do not allocate each time.
  bytes = std::max(bytes + bytes / 2, kLeastWorkspaceBytes);
  void* memory = nullptr;
  absl::Status status = DeviceStatus(runtime_, runtime_->AllocateDevice(bytes, &memory), "workspace");
  if (!status.ok()) return status;
  status = DeviceStatus(runtime_, runtime_->ZeroDevice(stream_, memory, bytes), "workspace");
  if (!status.ok()) {
    runtime_->FreeDevice(memory);
    return status;
  }
  workspace_ = memory;
  workspace_bytes_ = bytes;
  return absl::OkStatus();
}

absl::Status StreamMemory::Reduce(const kernels::TensorShape& shape,
                                  const std::function<DeviceRuntime::Error(kernels::cuda::Context*)>& launch,
                                  const char* what) {
  absl::MutexLock lock(&mutex_);
  const size_t bytes = runtime_->WorkspaceBytes(shape);
  if (bytes > workspace_bytes_) {
    if (absl::Status status = GrowWorkspace(bytes); !status.ok()) return status;
  }
  kernels::cuda::Context context;
  context.stream = stream_;
  context.workspace = workspace_;
  context.workspace_bytes = workspace_bytes_;
  return DeviceStatus(runtime_, launch(&context), what);
}

absl::StatusOr<std::shared_ptr<SlotLease>> LeaseSlot(DeviceRuntime* runtime, int device, Stream stream,
                                                     int64_t channels) {
  bool capturing = false;
  absl::Status status = DeviceStatus(runtime, runtime->StreamIsCapturing(stream, &capturing), "stream");
  if (!status.ok()) return status;
  if (capturing) {
    return absl::FailedPreconditionError(
        "the CUDA stream is being captured into a CUDA graph, whose replays would not synchronize with the other "
        "workers");
  }
  uint64_t id = 0;
  status = DeviceStatus(runtime, runtime->StreamId(stream, &id), "stream");
  if (!status.ok()) return status;
  std::shared_ptr<StreamMemory> memory = StreamTable::Get().Find(runtime, device, stream, id);
  absl::StatusOr<DeviceSlot*> slot = memory->Take(channels);
  if (!slot.ok()) return slot.status();
  return std::make_shared<SlotLease>(std::move(memory), *slot);
}

absl::Status PrepareStreamOrder(DeviceRuntime* runtime, int device) {
  struct Table {
    absl::Mutex mutex;
    std::map<std::pair<DeviceRuntime*, int>, absl::Status> devices ABSL_GUARDED_BY(mutex);
  };
  static Table* const table = new Table;
  absl::MutexLock lock(&table->mutex);
  if (const auto known = table->devices.find({runtime, device}); known != table->devices.end()) return known->second;
  bool can = false;
  absl::Status status = DeviceStatus(runtime, runtime->CanWaitForValue(&can), "waiting for the host");
  if (status.ok() && can) status = DeviceStatus(runtime, runtime->Preload(), "loading the kernels");
  const bool settled = status.ok();  // An error may be gone the next time.
  if (settled && !can) status = absl::UnavailableError("no stream of this device and its driver waits for the host");
  if (!status.ok()) {
    status = absl::FailedPreconditionError(
        absl::StrCat("passes on CUDA device ", device, " cannot be stream-ordered: ", status.message()));
  }
  if (settled) table->devices[{runtime, device}] = status;
  return status;
}

}  // namespace syncbn
