#include "server/rpc/identity.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "server/core/error.h"

namespace syncbn::rpc {
namespace {

constexpr size_t kMostLabelBytes = 63;
// The names of a certificate that an error shows, and the length of each.
constexpr size_t kShownNames = 4;
constexpr size_t kShownBytes = 128;

bool IsUnreserved(unsigned char c) {
  return absl::ascii_isalnum(c) || absl::string_view("-._~").find(c) != std::string::npos;
}

std::string PercentEncoded(absl::string_view value) {
  std::string encoded;
  for (const unsigned char c : value) {
    if (IsUnreserved(c)) {
      encoded.push_back(static_cast<char>(c));
    } else {
      absl::StrAppend(&encoded, "%", absl::AsciiStrToUpper(absl::StrCat(absl::Hex(c, absl::kZeroPad2))));
    }
  }
  return encoded;
}

bool IsLabel(absl::string_view value) {
  return !value.empty() && value.size() <= kMostLabelBytes &&
         std::all_of(value.begin(), value.end(), [](unsigned char c) { return absl::ascii_isalnum(c) || c == '-'; });
}

absl::Status Unusable(absl::string_view text, absl::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat("the identity template \"", text, "\" ", why));
}

// "URI:a, DNS:b", in printable characters.
std::string Shown(const PeerNames& names) {
  std::vector<std::string> shown;
  const auto add = [&shown](absl::string_view kind, const std::vector<std::string>& all) {
    for (const std::string& name : all) {
      if (shown.size() == kShownNames) return;
      shown.push_back(absl::StrCat(kind, absl::CHexEscape(name.substr(0, kShownBytes))));
    }
  };
  add("URI:", names.uris);
  add("DNS:", names.dns);
  if (shown.empty()) return "neither URIs nor DNS names";
  const size_t others = names.uris.size() + names.dns.size() - shown.size();
  return absl::StrCat(absl::StrJoin(shown, ", "), others == 0 ? "" : absl::StrCat(" and ", others, " more"));
}

}  // namespace

absl::StatusOr<IdentityTemplate> IdentityTemplate::Parse(absl::string_view text) {
  IdentityTemplate parsed;
  parsed.text_ = std::string(text);
  absl::string_view rest = text;
  if (absl::ConsumePrefix(&rest, "DNS:")) {
    parsed.kind_ = Kind::kDns;
  } else if (!absl::ConsumePrefix(&rest, "URI:")) {
    return Unusable(text, "begins with neither URI: nor DNS:");
  }
  if (rest.empty() || !std::all_of(rest.begin(), rest.end(), [](unsigned char c) { return absl::ascii_isgraph(c); })) {
    return Unusable(text, "has no name, or one with spaces or characters that are not printable ASCII");
  }
  // A value must not run into the next one: "a-b" and "c" would be "a" and "b-c".
  const auto separates = [&parsed](unsigned char c) {
    return parsed.kind_ == Kind::kDns ? c == '.' : !IsUnreserved(c) && c != '%';
  };
  while (!rest.empty()) {
    const size_t open = rest.find_first_of("{}");
    Piece piece;
    piece.literal = std::string(rest.substr(0, open));
    const bool first = parsed.pieces_.empty();
    rest.remove_prefix(piece.literal.size());
    if (!rest.empty()) {
      if (absl::ConsumePrefix(&rest, "{job}")) {
        piece.value = Value::kJob;
      } else if (absl::ConsumePrefix(&rest, "{group}")) {
        piece.value = Value::kGroup;
      } else if (absl::ConsumePrefix(&rest, "{rank}")) {
        piece.value = Value::kRank;
      } else {
        return Unusable(text, "has a placeholder other than {job}, {group} and {rank}");
      }
      if (!first && std::none_of(piece.literal.begin(), piece.literal.end(), separates)) {
        return Unusable(text, parsed.kind_ == Kind::kDns ? "has two placeholders without a dot between them"
                                                         : "has two placeholders without a slash between them");
      }
    }
    parsed.pieces_.push_back(std::move(piece));
  }
  return parsed;
}

std::optional<std::string> IdentityTemplate::Fill(const core::Join& join) const {
  std::string name;
  for (const Piece& piece : pieces_) {
    absl::StrAppend(&name, piece.literal);
    if (piece.value == Value::kNone) continue;
    if (piece.value == Value::kRank) {
      absl::StrAppend(&name, join.rank);
      continue;
    }
    const std::string& value = piece.value == Value::kJob ? join.id.job : join.id.group;
    if (kind_ == Kind::kDns && !IsLabel(value)) return std::nullopt;
    absl::StrAppend(&name, kind_ == Kind::kDns ? value : PercentEncoded(value));
  }
  return name;
}

bool IdentityTemplate::Admits(const PeerNames& names, const core::Join& join) const {
  const std::optional<std::string> wanted = Fill(join);
  if (!wanted.has_value()) return false;
  if (kind_ == Kind::kUri) return std::find(names.uris.begin(), names.uris.end(), *wanted) != names.uris.end();
  return std::any_of(names.dns.begin(), names.dns.end(),
                     [&](const std::string& name) { return absl::EqualsIgnoreCase(name, *wanted); });
}

std::string IdentityTemplate::Describe(const core::Join& join) const {
  const std::optional<std::string> wanted = Fill(join);
  if (wanted.has_value()) return absl::StrCat(kind_ == Kind::kDns ? "DNS:" : "URI:", *wanted);
  return absl::StrCat(text_, " (of which the names of this job or group cannot be part)");
}

std::optional<core::Error> CheckIdentity(const std::vector<IdentityTemplate>& templates, const PeerNames& names,
                                         const core::Join& join) {
  if (templates.empty()) return std::nullopt;
  for (const IdentityTemplate& one : templates) {
    if (one.Admits(names, join)) return std::nullopt;
  }
  std::vector<std::string> wanted;
  wanted.reserve(templates.size());
  for (const IdentityTemplate& one : templates) wanted.push_back(one.Describe(join));
  return core::IdentityError(join, absl::StrJoin(wanted, " or "), Shown(names));
}

}  // namespace syncbn::rpc
