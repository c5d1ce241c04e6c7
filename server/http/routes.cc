#include "server/http/routes.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "google/protobuf/util/json_util.h"
#include "server/http/page.h"
#include "server/http/status_text.h"

namespace syncbn::http {
namespace {

constexpr char kJson[] = "application/json";

int HttpStatusOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 200;
    case absl::StatusCode::kInvalidArgument:
      return 400;
    case absl::StatusCode::kUnauthenticated:
    case absl::StatusCode::kPermissionDenied:
      return 403;
    case absl::StatusCode::kNotFound:
      return 404;
    case absl::StatusCode::kDeadlineExceeded:
      return 504;
    default:
      return 503;
  }
}

Answer StatusAnswer(const absl::Status& status, absl::string_view good) {
  const std::string body = status.ok() ? std::string(good) : std::string(status.message());
  return {HttpStatusOf(status), kText, absl::StrCat(body, "\n")};
}

Answer TextAnswer(absl::StatusOr<std::string> text, const char* type = kText) {
  if (!text.ok()) return StatusAnswer(text.status(), "");
  return {200, type, *std::move(text)};
}

template <typename Message>
Answer JsonAnswer(const absl::StatusOr<Message>& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.always_print_primitive_fields = true;
  std::string json;
  if (message.ok()) {
    const auto printed = google::protobuf::util::MessageToJsonString(*message, &json, options);
    if (printed.ok()) return {200, kJson, std::move(json)};
    return {500, kText, "the answer cannot be written as JSON\n"};
  }
  return StatusAnswer(message.status(), "");
}

// A master that is shutting down is alive; one whose loop has stopped is not.
Answer Livez(const InspectionClient& client) {
  const absl::Status status = client.GetMaster().status();
  if (!absl::IsDeadlineExceeded(status)) return StatusAnswer(absl::OkStatus(), "alive");
  return {503, kText, "the master's loop has not answered for two seconds\n"};
}

Answer Readyz(const InspectionClient& client) {
  const absl::Status status = client.CheckReady();
  if (status.ok()) return StatusAnswer(status, "ready");
  return {503, kText, absl::StrCat("not ready: ", std::string(status.message()), "\n")};
}

Answer Api(absl::string_view name, const Request& request, const InspectionClient& client) {
  if (name == "master") return JsonAnswer(client.GetMaster());
  if (name == "groups") return JsonAnswer(client.ListGroups());
  const std::string job = request.Parameter("job"), group = request.Parameter("group");
  if (name == "group") {
    const std::string parts = request.Parameter("parts");
    const absl::string_view wanted = parts.empty() ? "members,pending,recent,failures" : absl::string_view(parts);
    return JsonAnswer(client.GetGroup(job, group, absl::StrSplit(wanted, ',', absl::SkipEmpty())));
  }
  if (name == "layers") return JsonAnswer(client.ListLayers(job, group));
  if (name == "layer") return JsonAnswer(client.GetLayer(job, group, request.Parameter("layer")));
  return {404, kText, absl::StrCat("there is no /api/", name, "; there are master, groups, group, layers and layer\n")};
}

}  // namespace

bool IsProbe(absl::string_view path) { return path == "/livez" || path == "/readyz" || path == "/healthz"; }

Answer Route(const Request& request, const InspectionClient& client, const MetricsOptions& metrics) {
  absl::string_view path = request.path;
  if (path == "/livez") return Livez(client);
  if (path == "/readyz" || path == "/healthz") return Readyz(client);
  if (path == "/metrics") {
    return TextAnswer(MetricsText(client, metrics), "text/plain; version=0.0.4; charset=utf-8");
  }
  if (path == "/statusz") return TextAnswer(StatusText(client));
  if (path == "/") return {200, "text/html; charset=utf-8", kIndexHtml};
  if (path == "/style.css") return {200, "text/css; charset=utf-8", kStyleCss};
  if (path == "/page.js") return {200, "text/javascript; charset=utf-8", kPageJs};
  if (absl::ConsumePrefix(&path, "/api/")) return Api(path, request, client);
  return {404, kText, "there are /, /metrics, /livez, /readyz, /statusz and /api\n"};
}

}  // namespace syncbn::http
