#include "server/rpc/shared_memory.h"

#include <utility>

#include "absl/container/inlined_vector.h"
#include "plumbing/check.h"

namespace syncbn::rpc {
namespace {

// A shorter frame is copied, which costs less than the memory to receive the next one in.
constexpr size_t kWorthHandingOver = size_t{64} << 10;

grpc::Slice TakeSlice(std::string& frame) {
  if (frame.size() < kWorthHandingOver) return grpc::Slice(frame.data(), frame.size());
  auto* const owner = new std::string(std::exchange(frame, std::string()));
  return grpc::Slice(
      owner->data(), owner->size(), [](void* taken) { delete static_cast<std::string*>(taken); }, owner);
}

}  // namespace

SharedSegment::SharedSegment(SharedFile file, Doorbell* master_bell, size_t max_frame_bytes)
    : file_(std::move(file)),
      layout_(reinterpret_cast<SegmentLayout*>(file_.data())),
      master_bell_(master_bell),
      writer_(&layout_->to_worker, layout_->bytes_to_worker),
      reader_(&layout_->to_master, layout_->bytes_to_master, max_frame_bytes) {
  layout_->taken.store(1, std::memory_order_seq_cst);
}

std::optional<size_t> SharedSegment::Send() {
  if (!fault_.empty()) return std::nullopt;
  const grpc::ByteBuffer& frame = *outgoing_.front();
  if (slices_.empty()) SYNCBN_CHECK(frame.Dump(&slices_).ok(), "a frame of ours cannot be read");
  absl::InlinedVector<absl::string_view, 4> parts;
  for (const grpc::Slice& slice : slices_) {
    parts.emplace_back(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  const RingProgress progress = writer_.Send(parts, &layout_->worker_bell);
  if (progress == RingProgress::kBroken) fault_ = "the count of read bytes is beyond that of written ones";
  if (progress != RingProgress::kDone) return std::nullopt;
  const size_t size = frame.Length();
  outgoing_.pop_front();
  slices_.clear();
  return size;
}

bool SharedSegment::Receive(grpc::ByteBuffer* frame) {
  const RingProgress progress = reader_.Receive();
  if (reader_.WriterWaits()) RingWorker();
  if (progress == RingProgress::kBroken) fault_ = reader_.fault();
  if (progress != RingProgress::kDone) return false;
  const grpc::Slice slice = TakeSlice(reader_.frame());
  grpc::ByteBuffer(&slice, 1).Swap(frame);
  return true;
}

void SharedSegment::AnnounceEnd() {
  layout_->closing.store(1, std::memory_order_seq_cst);
  RingWorker();
}

std::unique_ptr<SharedSegment> SharedMemory::Accept(absl::string_view offer) {
  const auto name = SharedName::Parse(offer);
  if (!name.has_value() || sharing_ == MemorySharing::kOff) return nullptr;
  for (const std::string& directory : directories_) {
    auto file = SharedFile::Open(directory, *name, sizeof(SegmentLayout), sharing_);
    if (!file.ok()) continue;
    file->Unlink();
    if (!bell_.has_value() && !MakeBell(directory)) return nullptr;
    return std::make_unique<SharedSegment>(*std::move(file), bell(), max_frame_bytes_);
  }
  return nullptr;
}

void SharedMemory::HideBell() {
  if (bell_.has_value()) bell_->Unlink();
}

bool SharedMemory::MakeBell(const std::string& directory) {
  SharedFile::RemoveAbandoned(directory);
  const SharedName name = SharedName::Draw();
  auto file = SharedFile::Create(directory, name, sizeof(Doorbell), sharing_);
  if (!file.ok()) return false;
  bell_ = *std::move(file);
  answer_ = name.ToString();
  directories_ = {std::string(directory)};
  return true;
}

}  // namespace syncbn::rpc
