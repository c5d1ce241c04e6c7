#include "client/cc/session/targets.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace syncbn {
namespace {

absl::Status Malformed(absl::string_view target, absl::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat("target \"", target, "\" ", why));
}

// Returns true for a name of gRPC's that has no port, or has it otherwise than as HOST:PORT.
bool IsOtherName(absl::string_view target) {
  for (const absl::string_view scheme :
       {"unix:", "unix-abstract:", "ipv4:", "ipv6:", "vsock:", "xds:", "google-c2p:"}) {
    if (absl::StartsWith(target, scheme)) return true;
  }
  return false;
}

// Checks what gRPC does not: it takes a port modulo 65536, and 443 for an absent one, so that a worker would look for
// its master at an address that nobody has written.
absl::Status CheckTarget(absl::string_view target) {
  if (target == "unix:" || target == "unix-abstract:") return Malformed(target, "has no path after the colon");
  if (IsOtherName(target)) return absl::OkStatus();
  absl::string_view address = target;
  if (absl::ConsumePrefix(&address, "dns:")) {  // dns:HOST:PORT, or dns://SERVER/HOST:PORT.
    address.remove_prefix(absl::StartsWith(address, "//") ? std::min(address.find('/', 2), address.size() - 1) + 1 : 0);
  } else if (absl::StrContains(target, "://")) {
    return Malformed(target, "is a URL; a target is HOST:PORT or unix:PATH");
  }
  const size_t colon = address.rfind(':');
  if (colon == absl::string_view::npos || absl::EndsWith(address, "]")) {
    return Malformed(target, "has no port; a target is HOST:PORT or unix:PATH");
  }
  const absl::string_view host = address.substr(0, colon), port = address.substr(colon + 1);
  if (host.empty()) return Malformed(target, "has no host; a target is HOST:PORT or unix:PATH");
  if (absl::StrContains(host, ":") && !absl::StartsWith(host, "[")) {
    return Malformed(target, "is no address; one of IPv6 stands in brackets, as in \"[::1]:50051\"");
  }
  int number = 0;
  if (port.empty() || !std::all_of(port.begin(), port.end(), absl::ascii_isdigit)) {
    return Malformed(target, absl::StrCat("has the port \"", port, "\", which is not a number"));
  }
  if (!absl::SimpleAtoi(port, &number) || number < 1 || number > 65535) {
    return Malformed(target, absl::StrCat("has the port ", port, ", which is not in 1 .. 65535"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<std::string>> SplitTargets(absl::string_view list) {
  if (absl::StripAsciiWhitespace(list).empty()) {
    return absl::InvalidArgumentError("a worker needs the target of its master");
  }
  std::vector<std::string> targets;
  for (const absl::string_view part : absl::StrSplit(list, ',')) {
    targets.emplace_back(absl::StripAsciiWhitespace(part));
    if (targets.back().empty()) {
      return absl::InvalidArgumentError(absl::StrCat("the list of targets \"", list, "\" has an empty one"));
    }
    if (absl::Status status = CheckTarget(targets.back()); !status.ok()) return status;
  }
  return targets;
}

absl::Status TargetTurn::SetList(absl::string_view list) {
  if (list == list_ && !targets_.empty()) return absl::OkStatus();
  auto targets = SplitTargets(list);
  if (!targets.ok()) return targets.status();
  list_ = std::string(list);
  targets_ = *std::move(targets);
  position_ = 0;
  failures_ = 0;
  return absl::OkStatus();
}

bool TargetTurn::Failed() {
  if (targets_.empty()) return true;
  ++position_;
  return ++failures_ % targets_.size() == 0;
}

}  // namespace syncbn
