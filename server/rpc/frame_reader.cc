#include "server/rpc/frame_reader.h"

#include <algorithm>
#include <cstdint>
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

// Limits on the fields of one of our messages, nested ones included: enough for what a worker has reason to send, and
// for what a later version might add.
constexpr size_t kMostUnknownFields = 1024;
constexpr size_t kMostFields = 1024;         // Beside:
constexpr size_t kFieldsOfEachMessage = 16;  // nested ones.
// Shorter pieces are parsed without counting, since they cannot allocate much.
constexpr size_t kHarmlessBytes = 1024;

core::Error NotAFrame() { return core::MalformedError("the frame is not a syncbn.v1.WorkerFrame"); }

// Counts what parsing a message would allocate.
class FieldCounter {
 public:
  explicit FieldCounter(size_t most_messages) : most_messages_(most_messages) {}

  // Returns the limit that the message exceeds, if it exceeds one.
  std::optional<core::Error> Count(const BytePieces& message, const Descriptor& type) {
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

bool IsContribution(int number) {
  return number == v1::WorkerFrame::kContributionsFieldNumber || number == v1::WorkerFrame::kRepeatsFieldNumber;
}

// Returns the number of the frame's field that the reader is at; 0 for one that protobuf does not know either, such as
// a number in place of a message.
int NumberOf(const WireReader& field) {
  static const Descriptor& type = *v1::WorkerFrame::descriptor();
  const FieldDescriptor* const known = type.FindFieldByNumber(static_cast<int>(field.number()));
  if (known == nullptr) return 0;
  const bool message = known->message_type() != nullptr;
  const bool as_bytes = field.type() == WireType::kBytes && (message || known->is_repeated());
  const bool as_number = field.type() == WireType::kVarint && !message;
  return as_bytes || as_number ? known->number() : 0;
}

}  // namespace

FrameReader::FrameReader(grpc::ByteBuffer&& frame, const core::Limits& limits) : limits_(limits) {
  frame_.Swap(&frame);
  pieces_.emplace(&frame_);
}

// The frame is read twice: here for everything but the contributions, and by Next for these.
std::optional<core::Error> FrameReader::Open() {
  v1::Join join;
  v1::Leave leave;
  std::string copy;
  size_t unknown = 0;
  std::optional<core::Error> error;
  WireReader fields(pieces_->bytes());
  while (fields.Next()) {
    const int number = NumberOf(fields);
    if (number == 0) {
      if (++unknown > kMostUnknownFields) {
        return core::MalformedError(absl::StrCat("the frame has more than ", kMostUnknownFields, " unknown fields"));
      }
    } else if (fields.type() == WireType::kVarint) {
      error = TakeNumber(number, fields.integer());
    } else if (IsContribution(number)) {
      if (++contributions_ > limits_.max_rounds_in_frame) return TooManyRounds();
    } else {
      error = TakePiece(number, fields.bytes().Join(&copy), &join, &leave);
    }
    if (error.has_value()) return error;
  }
  if (!fields.well_formed()) return NotAFrame();
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
  while (!packed.empty()) {
    uint64_t rank = 0;
    if (!TakeVarint(&packed, &rank)) return NotAFrame();
    if (auto error = TakeRank(static_cast<core::Rank>(rank))) return error;
  }
  return std::nullopt;
}

bool FrameReader::FindContribution() {
  while (fields_->Next()) {
    if (IsContribution(NumberOf(*fields_))) return true;
  }
  return false;
}

std::optional<core::Error> FrameReader::Next(const SliceLimits& slice, google::protobuf::Arena* arena,
                                             core::FrameReceived* event) {
  constexpr size_t kMessagesOfAContribution = 8;
  if (!begun()) {
    fields_.emplace(pieces_->bytes());
    event->join = std::move(head_.join);
    event->layers = std::move(head_.layers);
    event->ended = std::move(head_.ended);
  }
  event->left_ranks = head_.left_ranks;
  std::string copy;
  size_t bytes = 0;
  event->contributions.reserve(std::min(slice.contributions, contributions_ - read_));
  while (read_ < contributions_ && event->contributions.size() < slice.contributions) {
    pending_ = pending_ || FindContribution();
    if (!pending_) return NotAFrame();
    const BytePieces& piece = fields_->bytes();
    if (!event->contributions.empty() && bytes + piece.size() > slice.bytes) break;
    if (piece.size() > slice.longest_contribution) {
      return core::MalformedError(absl::StrCat("a contribution of ", piece.size(),
                                               " bytes is longer than those to the group's layers, ",
                                               "which have at most ", slice.longest_contribution));
    }
    pending_ = false;
    core::Contribution& contribution = event->contributions.emplace_back();
    if (!ReadContribution(piece, arena, &contribution)) {
      auto* const message = google::protobuf::Arena::CreateMessage<v1::Contribution>(arena);
      if (auto error = Parse(piece.Join(&copy), kMessagesOfAContribution, message)) return error;
      if (auto error = FromProto(*message, &contribution)) return error;
    }
    contribution.repeats = fields_->number() == v1::WorkerFrame::kRepeatsFieldNumber;
    bytes += piece.size();
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
