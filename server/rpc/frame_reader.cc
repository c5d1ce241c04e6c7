#include "server/rpc/frame_reader.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/descriptor.h"
#include "plumbing/wire_reader.h"
#include "server/core/error.h"
#include "server/rpc/contribution_reader.h"
#include "server/rpc/convert.h"
#include "vocabulary/wire/read.h"

namespace syncbn::rpc {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::io::CodedInputStream;

// Limits on the fields of one of our messages, nested ones included: enough for what a worker has reason to send, and
// for what a later version might add.
constexpr size_t kMostUnknownFields = 1024;
constexpr size_t kMostFields = 1024;         // Beside:
constexpr size_t kFieldsOfEachMessage = 16;  // nested ones.
// Shorter pieces are parsed without counting, since they cannot allocate much.
constexpr size_t kHarmlessBytes = 1024;

core::Error NotAFrame() { return core::MalformedError("the frame is not a syncbn.v1.WorkerFrame"); }

WireType TypeOf(uint32_t tag) { return static_cast<WireType>(tag & 7); }

bool SkipValue(CodedInputStream& input, WireType type) {
  uint64_t value = 0;
  uint32_t length = 0;
  switch (type) {
    case WireType::kVarint:
      return input.ReadVarint64(&value);
    case WireType::kFixed64:
      return input.Skip(8);
    case WireType::kFixed32:
      return input.Skip(4);
    case WireType::kBytes:
      return input.ReadVarint32(&length) && length <= static_cast<uint32_t>(std::numeric_limits<int>::max()) &&
             input.Skip(static_cast<int>(length));
  }
  return false;  // Groups, which no message of ours has.
}

// Counts what parsing a message would allocate.
class FieldCounter {
 public:
  explicit FieldCounter(size_t most_messages) : most_messages_(most_messages) {}

  // Returns the limit that the message exceeds, if it exceeds one.
  std::optional<core::Error> Count(absl::string_view message, const Descriptor& type) {
    WireReader fields(message);
    while (fields.Next()) {
      const FieldDescriptor* const field = type.FindFieldByNumber(static_cast<int>(fields.number()));
      const Descriptor* const inner = field == nullptr ? nullptr : field->message_type();
      const bool nested = inner != nullptr && fields.type() == WireType::kBytes;
      if (auto error = Note(field, fields.type(), nested)) return error;
      if (!nested) continue;
      if (auto error = Count(fields.bytes(), *inner)) return error;
    }
    if (!fields.well_formed()) return NotAFrame();
    return std::nullopt;
  }

 private:
  std::optional<core::Error> Note(const FieldDescriptor* field, WireType type, bool nested) {
    if (field == nullptr && ++unknown_ > kMostUnknownFields) {
      return core::MalformedError(
          absl::StrCat("a part of the frame has more than ", kMostUnknownFields, " unknown fields"));
    }
    // Numbers that are not packed take as many bytes in the frame as in memory, or more.
    if (field != nullptr && field->is_repeated() && type == WireType::kFixed64) return std::nullopt;
    if (nested && ++messages_ > most_messages_) {
      return core::MalformedError(
          absl::StrCat("a part of the frame has more than ", most_messages_, " nested messages"));
    }
    if (++fields_ > kMostFields + kFieldsOfEachMessage * messages_) {
      return core::MalformedError(
          absl::StrCat("a part of the frame has more than ", fields_ - 1, " fields in ", messages_ + 1, " messages"));
    }
    return std::nullopt;
  }

  const size_t most_messages_;
  size_t messages_ = 0;
  size_t fields_ = 0;
  size_t unknown_ = 0;
};

// Counts the fields of a piece, then parses it.
std::optional<core::Error> Parse(absl::string_view piece, size_t most_messages, google::protobuf::Message* message) {
  if (piece.size() > kHarmlessBytes) {
    if (auto error = FieldCounter(most_messages).Count(piece, *message->GetDescriptor())) return error;
  }
  if (!message->ParseFromArray(piece.data(), static_cast<int>(piece.size()))) return NotAFrame();
  return std::nullopt;
}

// Returns the next `length` bytes, in `copy` if they are not contiguous; nothing if there are fewer.
std::optional<absl::string_view> ReadPiece(CodedInputStream& input, int length, std::string& copy) {
  const void* data = nullptr;
  int available = 0;
  if (length == 0) return absl::string_view();
  if (input.GetDirectBufferPointer(&data, &available) && available >= length) {
    if (!input.Skip(length)) return std::nullopt;
    return absl::string_view(static_cast<const char*>(data), static_cast<size_t>(length));
  }
  if (!input.ReadString(&copy, length)) return std::nullopt;
  return copy;
}

bool IsContribution(int number) {
  return number == v1::WorkerFrame::kContributionsFieldNumber || number == v1::WorkerFrame::kRepeatsFieldNumber;
}

bool IsNumber(int number) {
  return number == v1::WorkerFrame::kCaughtUpFieldNumber || number == v1::WorkerFrame::kLeftRanksFieldNumber ||
         number == v1::WorkerFrame::kMembershipReadFieldNumber;
}

// Reads the length of the frame's field that `tag` begins. The number is 0 for an unknown field, which is skipped.
// Returns nothing if the frame is malformed.
struct FieldHead {
  int number = 0;  // 0 for an unknown field.
  int length = 0;
};
std::optional<FieldHead> ReadHead(CodedInputStream& input, uint32_t tag) {
  FieldHead head;
  static const Descriptor& type = *v1::WorkerFrame::descriptor();
  const int number = static_cast<int>(tag >> 3);
  if (TypeOf(tag) != WireType::kBytes || type.FindFieldByNumber(number) == nullptr) {
    if (!SkipValue(input, TypeOf(tag))) return std::nullopt;
    return head;
  }
  uint32_t length = 0;
  if (!input.ReadVarint32(&length) || length > static_cast<uint32_t>(std::numeric_limits<int>::max())) {
    return std::nullopt;
  }
  head.number = number;
  head.length = static_cast<int>(length);
  return head;
}

}  // namespace

FrameReader::FrameReader(grpc::ByteBuffer&& frame, const core::Limits& limits) : limits_(limits) {
  frame_.Swap(&frame);
}

// The frame is read twice: here for everything but the contributions, and by Next for these.
std::optional<core::Error> FrameReader::Open() {
  grpc::ProtoBufferReader bytes(&frame_);
  Input input(&bytes);
  v1::Join join;
  v1::Leave leave;
  std::string copy;
  size_t unknown = 0;
  std::optional<core::Error> error;
  while (const uint32_t tag = input.ReadTag()) {
    if (TypeOf(tag) == WireType::kVarint && IsNumber(static_cast<int>(tag >> 3))) {
      uint64_t value = 0;
      if (!input.ReadVarint64(&value)) return NotAFrame();
      error = TakeNumber(static_cast<int>(tag >> 3), value);
      if (error.has_value()) return error;
      continue;
    }
    const std::optional<FieldHead> head = ReadHead(input, tag);
    if (!head.has_value()) return NotAFrame();
    if (head->number == 0) {
      if (++unknown > kMostUnknownFields) {
        return core::MalformedError(absl::StrCat("the frame has more than ", kMostUnknownFields, " unknown fields"));
      }
      continue;
    }
    if (IsContribution(head->number)) {
      if (++contributions_ > limits_.max_rounds_in_frame) return TooManyRounds();
      if (!input.Skip(head->length)) return NotAFrame();
      continue;
    }
    const std::optional<absl::string_view> piece = ReadPiece(input, head->length, copy);
    if (!piece.has_value()) return NotAFrame();
    error = TakePiece(head->number, *piece, &join, &leave);
    if (error.has_value()) return error;
  }
  if (!input.ConsumedEntireMessage()) return NotAFrame();
  if (head_.join.has_value()) error = FromProto(join, &*head_.join);
  if (error.has_value()) return error;
  if (head_.leave.has_value()) head_.leave = leave.reason();
  return std::nullopt;
}

core::Error FrameReader::TooManyRounds() const {
  return core::LimitError(limits_.max_rounds_in_frame + 1, "or more rounds in one frame", "max_rounds_in_frame",
                          limits_.max_rounds_in_frame);
}

std::optional<core::Error> FrameReader::TakePiece(int number, absl::string_view piece, v1::Join* join,
                                                  v1::Leave* leave) {
  switch (number) {
    case v1::WorkerFrame::kJoinFieldNumber: {
      v1::Join part;
      head_.join.emplace();
      if (auto error = Parse(piece, limits_.max_layers + kFieldsOfEachMessage, &part)) return error;
      join->MergeFrom(part);
      return std::nullopt;
    }
    case v1::WorkerFrame::kLeaveFieldNumber: {
      v1::Leave part;
      head_.leave.emplace();
      if (auto error = Parse(piece, 0, &part)) return error;
      leave->MergeFrom(part);
      return std::nullopt;
    }
    case v1::WorkerFrame::kLayersFieldNumber: {
      v1::LayerSpec layer;
      if (head_.layers.size() == limits_.max_layers) {
        return core::LimitError(limits_.max_layers + 1, "or more layers", "max_layers", limits_.max_layers);
      }
      if (auto error = Parse(piece, 0, &layer)) return error;
      return FromProto(layer, &head_.layers.emplace_back());
    }
    case v1::WorkerFrame::kEndedRoundsFieldNumber: {
      constexpr size_t kMessagesOfAReport = 16;
      v1::EndedRound report;
      if (head_.ended.size() == limits_.max_rounds_in_frame) return TooManyRounds();
      if (auto error = Parse(piece, kMessagesOfAReport, &report)) return error;
      return FromProto(report, &head_.ended.emplace_back());
    }
    case v1::WorkerFrame::kLeftRanksFieldNumber:
      return TakeRanks(piece);
    default: {
      const bool forgotten = number == v1::WorkerFrame::kForgottenFieldNumber;
      std::vector<core::RoundKey>& keys = forgotten ? head_.forgotten : head_.blocked_on;
      if (keys.size() == limits_.max_rounds_in_frame) return TooManyRounds();
      if (wire::ReadRoundKey(piece, &keys.emplace_back())) return std::nullopt;
      v1::RoundKey key;
      if (auto error = Parse(piece, 0, &key)) return error;
      return FromProto(key, &keys.back());
    }
  }
}

std::optional<core::Error> FrameReader::TakeNumber(int number, uint64_t value) {
  switch (number) {
    case v1::WorkerFrame::kCaughtUpFieldNumber:
      head_.caught_up = value != 0;
      return std::nullopt;
    case v1::WorkerFrame::kMembershipReadFieldNumber:
      head_.membership_read = value;
      return std::nullopt;
    default:  // A rank of left_ranks that was not packed. Protobuf cuts a longer number off, too.
      return TakeRank(static_cast<core::Rank>(value));
  }
}

std::optional<core::Error> FrameReader::TakeRank(core::Rank rank) {
  if (head_.left_ranks.size() == limits_.max_workers) {
    return core::LimitError(limits_.max_workers + 1, "or more left_ranks in one frame", "max_workers",
                            limits_.max_workers);
  }
  head_.left_ranks.push_back(rank);
  return std::nullopt;
}

std::optional<core::Error> FrameReader::TakeRanks(absl::string_view packed) {
  CodedInputStream input(reinterpret_cast<const uint8_t*>(packed.data()), static_cast<int>(packed.size()));
  const CodedInputStream::Limit whole = input.PushLimit(static_cast<int>(packed.size()));
  while (input.BytesUntilLimit() > 0) {
    uint32_t rank = 0;
    if (!input.ReadVarint32(&rank)) return NotAFrame();
    if (auto error = TakeRank(rank)) return error;
  }
  input.PopLimit(whole);
  return std::nullopt;
}

std::optional<int> FrameReader::FindContribution() {
  while (const uint32_t tag = input_->ReadTag()) {
    const std::optional<FieldHead> head = ReadHead(*input_, tag);
    if (!head.has_value()) return std::nullopt;
    if (IsContribution(head->number)) {
      pending_repeats_ = head->number == v1::WorkerFrame::kRepeatsFieldNumber;
      return head->length;
    }
    if (head->number != 0 && !input_->Skip(head->length)) return std::nullopt;
  }
  return std::nullopt;
}

std::optional<core::Error> FrameReader::Next(const SliceLimits& slice, google::protobuf::Arena* arena,
                                             core::FrameReceived* event) {
  constexpr size_t kMessagesOfAContribution = 8;
  if (!begun_) {
    bytes_.emplace(&frame_);
    input_.emplace(&*bytes_);
    event->join = std::move(head_.join);
    event->layers = std::move(head_.layers);
    event->ended = std::move(head_.ended);
    begun_ = true;
  }
  event->left_ranks = head_.left_ranks;
  std::string copy;
  size_t bytes = 0;
  event->contributions.reserve(std::min(slice.contributions, contributions_ - read_));
  while (read_ < contributions_ && event->contributions.size() < slice.contributions) {
    if (!pending_length_.has_value()) pending_length_ = FindContribution();
    if (!pending_length_.has_value()) return NotAFrame();
    const size_t length = static_cast<size_t>(*pending_length_);
    if (!event->contributions.empty() && bytes + length > slice.bytes) break;
    if (length > slice.longest_contribution) {
      return core::MalformedError(absl::StrCat("a contribution of ", length,
                                               " bytes is longer than those to the group's layers, ",
                                               "which have at most ", slice.longest_contribution));
    }
    const std::optional<absl::string_view> piece = ReadPiece(*input_, *pending_length_, copy);
    pending_length_.reset();
    if (!piece.has_value()) return NotAFrame();
    core::Contribution& contribution = event->contributions.emplace_back();
    if (!ReadContribution(*piece, arena, &contribution)) {
      auto* const message = google::protobuf::Arena::CreateMessage<v1::Contribution>(arena);
      if (auto error = Parse(*piece, kMessagesOfAContribution, message)) return error;
      if (auto error = FromProto(*message, &contribution)) return error;
    }
    contribution.repeats = pending_repeats_;
    bytes += length;
    ++read_;
  }
  if (done()) {
    event->forgotten = std::move(head_.forgotten);
    event->caught_up = head_.caught_up;
    event->blocked_on = std::move(head_.blocked_on);
    event->leave = std::move(head_.leave);
    event->membership_read = head_.membership_read;
  }
  return std::nullopt;
}

}  // namespace syncbn::rpc
