#include "client/cc/shared_memory_transport.h"

#include <algorithm>
#include <chrono>

#include "absl/container/inlined_vector.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "client/cc/clock.h"
#include "client/cc/connection.h"
#include "plumbing/check.h"

namespace syncbn {
namespace {

// The time that a thread sleeps on the doorbell before it looks at the stream, where the end of the master shows: at
// first, and once it has waited for kLongWait.
constexpr absl::Duration kShortNap = absl::Milliseconds(5);
constexpr absl::Duration kLongNap = absl::Milliseconds(20);
constexpr absl::Duration kLongWait = absl::Milliseconds(100);
// The same, while something is expected of the stream.
constexpr absl::Duration kShortestNap = absl::Milliseconds(1);
// gRPC answers the master's keepalive only while it is looked at.
constexpr absl::Duration kLongestNeglect = absl::Milliseconds(100);

bool IsOnThisHost(absl::string_view target) {
  if (absl::StartsWith(target, "unix:") || absl::StartsWith(target, "unix-abstract:")) return true;
  for (const absl::string_view scheme : {"dns:///", "ipv4:", "ipv6:"}) absl::ConsumePrefix(&target, scheme);
  return absl::StartsWith(target, "localhost:") || absl::StartsWith(target, "127.") ||
         absl::StartsWith(target, "[::1]:");
}

// Returns the path of the socket of a unix: target; nothing for other targets.
std::vector<std::string> SocketsOf(absl::string_view target) {
  if (!absl::ConsumePrefix(&target, "unix:")) return {};
  absl::ConsumePrefix(&target, "//");
  return {std::string(target)};
}

}  // namespace

// ---- The segment ----------------------------------------------------------------------------------------------------

SharedMemoryTransport::Segment::Segment(std::string directory, SharedFile file)
    : directory_(std::move(directory)),
      file_(std::move(file)),
      layout_(reinterpret_cast<SegmentLayout*>(file_.data())),
      writer_(&layout_->to_master, layout_->bytes_to_master),
      reader_(&layout_->to_worker, layout_->bytes_to_worker, kMostFrameBytes) {}

absl::StatusOr<std::unique_ptr<SharedMemoryTransport::Segment>> SharedMemoryTransport::Segment::Create(
    const std::string& directory, const SharedName& name, MemorySharing sharing) {
  auto file = SharedFile::Create(directory, name, sizeof(SegmentLayout), sharing);
  if (!file.ok()) return file.status();
  return std::unique_ptr<Segment>(new Segment(directory, *std::move(file)));
}

absl::Status SharedMemoryTransport::Segment::Attach(const SharedName& bell, MemorySharing sharing) {
  auto file = SharedFile::Open(directory_, bell, sizeof(Doorbell), sharing);
  if (!file.ok()) return file.status();
  if (layout_->taken.load(std::memory_order_seq_cst) == 0) {
    return absl::UnavailableError("what the master writes to the segment is not to be seen here");
  }
  master_bell_ = *std::move(file);
  file_.Unlink();
  return absl::OkStatus();
}

void SharedMemoryTransport::ClearSegment() {
  segment_.reset();
  broken_.reset();
  outgoing_.clear();
  sending_ = fault_ = false;
}

// ---- The stream -----------------------------------------------------------------------------------------------------

void SharedMemoryTransport::Open(const std::string& target, absl::Duration connect_timeout) {
  ClearSegment();
  target_ = target;
  answered_ = ended_ = false;
  stream_writes_ = false;
  offered_.reset();
  std::vector<GrpcTransport::Header> metadata;
  const bool offers = options_.sharing != MemorySharing::kOff && !distrusted_ && IsOnThisHost(target);
  if (offers && !std::exchange(pass_over_, false)) {
    offered_ = SharedName::Draw();
    metadata.emplace_back(kSharedMemoryHeader, offered_->ToString());
  }
  stream_.Open(target, connect_timeout, metadata);
}

void SharedMemoryTransport::Read() {
  if (!shares_memory()) stream_.Read();
}

void SharedMemoryTransport::OnStreamEvent(const Event& event, absl::FunctionRef<void(const Event&)> handle) {
  if (ended_) return;
  switch (event.kind) {
    case Event::Kind::kUp:
      // Not before: a worker that is killed while it looks for its master must leave nothing behind.
      MakeSegment();
      return handle(event);
    case Event::Kind::kWritten:
      stream_writes_ = false;
      return handle(event);
    case Event::Kind::kFrame:
      if (shares_memory()) return stream_.Read();  // Nothing of the master's: it has agreed to send none.
      if (!answered_ && !TakeAnswer()) return stream_.Close();
      if (shares_memory()) stream_.Read();
      return handle(event);
    case Event::Kind::kBroken:
      if (shares_memory()) {
        broken_ = event.why;
      } else {
        ClearSegment();
        handle(event);
      }
      return;
  }
}

void SharedMemoryTransport::MakeSegment() {
  if (!offered_.has_value()) return;
  for (const std::string& directory : SharedMemoryDirectories(options_.directory, SocketsOf(target_))) {
    auto segment = Segment::Create(directory, *offered_, options_.sharing);
    if (!segment.ok()) continue;  // The master will not find it either.
    segment_ = *std::move(segment);
    return;
  }
}

bool SharedMemoryTransport::TakeAnswer() {
  answered_ = true;
  const std::string answer = offered_.has_value() ? stream_.MasterMetadata(kSharedMemoryHeader) : "";
  offered_.reset();
  if (answer.empty() || segment_ == nullptr) {
    segment_.reset();
    return answer.empty();
  }
  const auto bell = SharedName::Parse(answer);
  // Another stream is needed then, since the master writes to the segment from here on. The master of a later one may
  // be another.
  pass_over_ = !bell.has_value() || !segment_->Attach(*bell, options_.sharing).ok();
  if (pass_over_) segment_.reset();
  return !pass_over_;
}

void SharedMemoryTransport::OnFault(absl::FunctionRef<void(const Event&)> handle) {
  const std::string& fault = segment_->reader().fault();
  const session::Break why{
      absl::InternalError(absl::StrCat("the master has broken the rules of shared memory: ",
                                       fault.empty() ? "its count of read bytes is too great" : fault))};
  distrusted_ = ended_ = true;
  stream_.Close();
  ClearSegment();
  handle({Event::Kind::kBroken, {}, why});
}

// ---- Writing --------------------------------------------------------------------------------------------------------

bool SharedMemoryTransport::Write(absl::Span<const Buffer> parts) {
  if (!shares_memory()) {
    SYNCBN_CHECK(!offered_.has_value() || !stream_writes_, "a second frame before the master has answered the offer");
    stream_writes_ = true;
    return stream_.Write(parts);
  }
  outgoing_.assign(parts.begin(), parts.end());
  const bool written = SendOn();
  if (!written) {
    sending_ = true;
    segment_->layout().worker_bell.Ring();  // Another thread waits perhaps, and is to send on.
  }
  return written;
}

bool SharedMemoryTransport::SendOn() {
  absl::InlinedVector<absl::string_view, 4> views;
  for (const Buffer& part : outgoing_) views.emplace_back(reinterpret_cast<const char*>(part.data()), part.size());
  const RingProgress progress = segment_->writer().Send(views, &segment_->master_bell());
  segment_->master_bell().Ring();
  if (progress == RingProgress::kBroken) fault_ = true;
  if (progress == RingProgress::kDone) outgoing_.clear();
  return progress == RingProgress::kDone;
}

// ---- Waiting --------------------------------------------------------------------------------------------------------

bool SharedMemoryTransport::Look() {
  const auto find = [this](Found found) {
    found_ = found;
    return true;
  };
  if (fault_) return find(Found::kFault);
  if (sending_ && segment_->writer().HasRoom()) return find(Found::kRoom);
  const RingProgress progress = segment_->reader().Receive();
  if (segment_->reader().WriterWaits()) segment_->master_bell().Ring();
  if (progress == RingProgress::kDone) return find(Found::kFrame);
  if (broken_.has_value()) return find(Found::kEnd);
  if (progress == RingProgress::kBroken) return find(Found::kFault);
  return false;
}

bool SharedMemoryTransport::LookAtStream(absl::Time deadline) {
  stream_.Wait(deadline);
  looked_at_stream_ = Now();
  if (stream_.found()) found_ = Found::kStreamEvent;
  return stream_.found();
}

void SharedMemoryTransport::Wait(absl::Time deadline) {
  found_ = Found::kNothing;
  if (!shares_memory()) {
    LookAtStream(deadline);
    return;
  }
  WaitForSegment(deadline);
}

void SharedMemoryTransport::WaitForSegment(absl::Time deadline) {
  Doorbell& bell = segment_->layout().worker_bell;
  const absl::Time begun = Now();
  if (begun - looked_at_stream_ > kLongestNeglect && LookAtStream(begun)) return;
  while (true) {
    const uint32_t seen = bell.rings();
    if (Look() || woken_.exchange(false)) return;
    const absl::Time now = Now();
    if (now >= deadline) {
      LookAtStream(now);
      return;
    }
    if (spin_.Until([&] { return bell.rings() != seen; }, world_size_)) continue;
    const bool found = Nap(seen, begun, deadline);
    spin_.Slept();
    if (found) return;
  }
}

bool SharedMemoryTransport::Nap(uint32_t seen, absl::Time begun, absl::Time deadline) {
  SegmentLayout& layout = segment_->layout();
  const absl::Time now = Now();
  // The master ends the stream, or the frame that was written to it is about to be told of.
  const bool expecting = stream_writes_ || layout.closing.load(std::memory_order_seq_cst) != 0;
  if ((expecting || now - looked_at_stream_ > kLongestNeglect) && LookAtStream(now)) return true;
  absl::Duration nap = now - begun < kLongWait ? kShortNap : kLongNap;
  if (expecting) nap = kShortestNap;
  layout.worker_bell.Sleep(seen, absl::ToChronoNanoseconds(std::min(deadline - now, nap)));
  // A master that has rung was alive. A look costs more than the rest of a short round, where a processor serves many.
  return layout.worker_bell.rings() == seen && LookAtStream(now);
}

void SharedMemoryTransport::Take(absl::FunctionRef<void(const Event&)> handle) {
  switch (std::exchange(found_, Found::kNothing)) {
    case Found::kNothing:
      return;
    case Found::kStreamEvent:
      return stream_.Take([&](const Event& event) { OnStreamEvent(event, handle); });
    case Found::kRoom:
      if (!SendOn()) return;
      sending_ = false;
      return handle({Event::Kind::kWritten});
    case Found::kFrame: {
      const absl::string_view frame = segment_->reader().frame();
      return handle({Event::Kind::kFrame, absl::MakeConstSpan(&frame, 1)});
    }
    case Found::kFault:
      return OnFault(handle);
    case Found::kEnd: {
      const session::Break why = *broken_;
      ClearSegment();
      return handle({Event::Kind::kBroken, {}, why});
    }
  }
}

void SharedMemoryTransport::Wake() {
  if (!shares_memory()) return stream_.Wake();
  woken_ = true;
  segment_->layout().worker_bell.Ring();
}

}  // namespace syncbn
