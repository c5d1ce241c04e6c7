#include "client/cc/errors.h"

#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace syncbn {
namespace {

constexpr char kTypeUrl[] = "type.googleapis.com/google.rpc.ErrorInfo";

}  // namespace

ErrorDetails DetailsOf(const absl::Status& status) {
  ErrorDetails details;
  const absl::optional<absl::Cord> payload = status.GetPayload(kTypeUrl);
  google::rpc::ErrorInfo info;
  if (!payload.has_value() || !info.ParseFromString(std::string(*payload))) return details;
  details.reason = info.reason();
  const auto layer = info.metadata().find("layer");
  if (layer != info.metadata().end()) details.layer = layer->second;
  const auto limit = info.metadata().find("limit");
  if (limit != info.metadata().end()) details.limit = limit->second;
  const auto resume_at = info.metadata().find("resume_at");
  uint64_t sequence = 0;
  if (resume_at != info.metadata().end() && absl::SimpleAtoi(resume_at->second, &sequence)) {
    details.resume_at = sequence;
  }
  const auto ranks = info.metadata().find("ranks");
  if (ranks == info.metadata().end()) return details;
  for (const absl::string_view text : absl::StrSplit(ranks->second, ',', absl::SkipEmpty())) {
    uint32_t rank = 0;
    if (absl::SimpleAtoi(text, &rank)) details.ranks.push_back(rank);
  }
  return details;
}

absl::Status MakeStatus(absl::StatusCode code, absl::string_view message, const ErrorDetails& details) {
  google::rpc::ErrorInfo info;
  info.set_reason(details.reason);
  info.set_domain("syncbn");
  if (!details.layer.empty()) (*info.mutable_metadata())["layer"] = details.layer;
  if (!details.limit.empty()) (*info.mutable_metadata())["limit"] = details.limit;
  if (details.resume_at.has_value()) (*info.mutable_metadata())["resume_at"] = absl::StrCat(*details.resume_at);
  if (!details.ranks.empty()) (*info.mutable_metadata())["ranks"] = absl::StrJoin(details.ranks, ",");
  absl::Status status(code, message);
  status.SetPayload(kTypeUrl, absl::Cord(info.SerializeAsString()));
  return status;
}

absl::Status LeftError() {
  return MakeStatus(absl::StatusCode::kFailedPrecondition, "this worker has left its group", {"LEFT", "", {}});
}

absl::Status ClosedError() {
  return MakeStatus(absl::StatusCode::kCancelled, "this worker has been closed", {"CLOSED", "", {}});
}

absl::Status InterruptedError() {
  return MakeStatus(absl::StatusCode::kCancelled, "the wait was interrupted", {"INTERRUPTED", "", {}});
}

std::string ToSerializedStatus(const absl::Status& status) {
  google::rpc::Status message;
  message.set_code(static_cast<int>(status.code()));
  message.set_message(std::string(status.message()));
  if (const absl::optional<absl::Cord> payload = status.GetPayload(kTypeUrl)) {
    google::protobuf::Any* const detail = message.add_details();
    detail->set_type_url(kTypeUrl);
    detail->set_value(std::string(*payload));
  }
  return message.SerializeAsString();
}

absl::Status FromSerializedStatus(absl::string_view serialized) {
  google::rpc::Status message;
  if (!message.ParseFromArray(serialized.data(), static_cast<int>(serialized.size()))) {
    return absl::InternalError("the master sent an error that cannot be parsed");
  }
  if (message.code() == 0) return absl::InternalError("the master sent an error without a code");
  absl::Status status(static_cast<absl::StatusCode>(message.code()), message.message());
  for (const google::protobuf::Any& detail : message.details()) {
    if (detail.type_url() == kTypeUrl) status.SetPayload(kTypeUrl, absl::Cord(detail.value()));
  }
  return status;
}

}  // namespace syncbn
