#include "server/rpc/status.h"

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "google/rpc/error_details.pb.h"
#include "server/core/error.h"

namespace syncbn::rpc {
namespace {

google::rpc::ErrorInfo InfoOf(const core::Error& error) {
  google::rpc::ErrorInfo info;
  info.set_reason(error.reason);
  info.set_domain("syncbn");
  if (!error.ranks.empty()) (*info.mutable_metadata())["ranks"] = absl::StrJoin(error.ranks, ",");
  if (*error.limit != '\0') (*info.mutable_metadata())["limit"] = error.limit;
  if (error.resume_at.has_value()) (*info.mutable_metadata())["resume_at"] = absl::StrCat(*error.resume_at);
  if (error.rank_count > error.ranks.size()) (*info.mutable_metadata())["rank_count"] = absl::StrCat(error.rank_count);
  return info;
}

void Fill(const core::Error& error, const google::rpc::ErrorInfo& info, google::rpc::Status* status) {
  status->set_code(static_cast<int>(error.code));
  status->set_message(error.message);
  status->add_details()->PackFrom(info);
}

}  // namespace

std::string Brief(std::string message) {
  constexpr size_t kMostBytes = 1024;
  constexpr absl::string_view kCut = "...";
  if (message.size() <= kMostBytes) return message;
  size_t end = kMostBytes - kCut.size();
  while (end > 0 && (static_cast<unsigned char>(message[end]) & 0xc0) == 0x80) --end;  // Not within a character.
  message.resize(end);
  return absl::StrCat(message, kCut);
}

void ToProto(const core::Error& error, const core::RoundKey* key, google::rpc::Status* status) {
  google::rpc::ErrorInfo info = InfoOf(error);
  if (key != nullptr) {
    (*info.mutable_metadata())["layer"] = key->layer;
    (*info.mutable_metadata())["sequence"] = absl::StrCat(key->sequence);
    (*info.mutable_metadata())["phase"] = Name(key->phase);
  }
  Fill(error, info, status);
}

void ToProto(const core::Error& error, const std::string& layer, google::rpc::Status* status) {
  google::rpc::ErrorInfo info = InfoOf(error);
  if (!layer.empty()) (*info.mutable_metadata())["layer"] = layer;
  Fill(error, info, status);
}

core::Error FromProto(const google::rpc::Status& status) {
  google::rpc::ErrorInfo info;
  for (const google::protobuf::Any& detail : status.details()) {
    if (detail.Is<google::rpc::ErrorInfo>() && detail.UnpackTo(&info)) break;
  }
  core::Error error;
  error.code = static_cast<absl::StatusCode>(status.code());
  error.reason = core::ReasonNamed(info.reason());
  error.message = Brief(status.message());
  const auto ranks = info.metadata().find("ranks");
  if (ranks != info.metadata().end()) {
    for (const absl::string_view text : absl::StrSplit(ranks->second, ',', absl::SkipEmpty())) {
      core::Rank rank = 0;
      if (error.ranks.size() < core::kMostNamedRanks && absl::SimpleAtoi(text, &rank)) error.ranks.push_back(rank);
    }
  }
  const auto count = info.metadata().find("rank_count");
  if (count == info.metadata().end() || !absl::SimpleAtoi(count->second, &error.rank_count)) {
    error.rank_count = static_cast<uint32_t>(error.ranks.size());
  }
  const auto resume_at = info.metadata().find("resume_at");
  uint64_t sequence = 0;
  if (resume_at != info.metadata().end() && absl::SimpleAtoi(resume_at->second, &sequence)) error.resume_at = sequence;
  return error;
}

grpc::Status ToGrpc(const core::Error& error) {
  google::rpc::Status status;
  Fill(error, InfoOf(error), &status);
  status.set_message(Brief(error.message));
  return grpc::Status(static_cast<grpc::StatusCode>(error.code), status.message(), status.SerializeAsString());
}

grpc::Status ToGrpc(const absl::Status& status, const char* reason) {
  return ToGrpc(core::MakeError(status.code(), reason, std::string(status.message())));
}

}  // namespace syncbn::rpc
