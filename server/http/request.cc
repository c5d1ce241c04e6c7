#include "server/http/request.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace syncbn::http {
namespace {

Answer Malformed(absl::string_view what) { return {400, kText, absl::StrCat("the request ", what, "\n")}; }

bool IsTokenCharacter(char c) { return absl::ascii_isalnum(c) || absl::StrContains("!#$%&'*+-.^_`|~", c); }

// Returns whether the text is the name of a method or a header.
bool IsToken(absl::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), IsTokenCharacter);
}

bool HasControls(absl::string_view text) {
  return std::any_of(text.begin(), text.end(), [](char c) { return absl::ascii_iscntrl(c) && c != '\t'; });
}

int HexDigit(char c) {
  if (!absl::ascii_isxdigit(c)) return -1;
  return absl::ascii_isdigit(c) ? c - '0' : absl::ascii_tolower(c) - 'a' + 10;
}

// Returns the text of a form's field: "+" is a space, and "%41" an A.
std::string Decode(absl::string_view text) {
  std::string decoded;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool escape =
        text[i] == '%' && i + 2 < text.size() && HexDigit(text[i + 1]) >= 0 && HexDigit(text[i + 2]) >= 0;
    if (escape) {
      decoded.push_back(static_cast<char>(HexDigit(text[i + 1]) * 16 + HexDigit(text[i + 2])));
      i += 2;
    } else {
      decoded.push_back(text[i] == '+' ? ' ' : text[i]);
    }
  }
  return decoded;
}

// Takes "METHOD TARGET VERSION" apart. Returns the refusal, if there is one.
std::optional<Answer> ParseFirstLine(absl::string_view line, Request* request, absl::string_view* version) {
  const std::vector<absl::string_view> words = absl::StrSplit(line, ' ');
  if (words.size() != 3 || !IsToken(words[0]) || words[1].empty() || HasControls(words[1])) {
    return Malformed("does not begin with a method, a path and a version");
  }
  *version = words[2];
  if (!absl::StartsWith(*version, "HTTP/1.")) return Answer{505, kText, "HTTP/1.1 is served here\n"};
  request->method = std::string(words[0]);
  absl::string_view target = words[1];
  // Proxies write the whole address.
  if (absl::StartsWithIgnoreCase(target, "http://")) {
    target.remove_prefix(7);
    const size_t end = std::min(target.find_first_of("/?"), target.size());
    request->host = std::string(target.substr(0, end));
    target.remove_prefix(end);
  }
  const std::pair<absl::string_view, absl::string_view> parts = absl::StrSplit(target, absl::MaxSplits('?', 1));
  request->path = parts.first.empty() ? "/" : std::string(parts.first);
  request->query = std::string(parts.second);
  return std::nullopt;
}

const char* ReasonOf(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 400:
      return "Bad Request";
    case 401:
      return "Unauthorized";
    case 403:
      return "Forbidden";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 421:
      return "Misdirected Request";
    case 431:
      return "Request Header Fields Too Large";
    case 500:
      return "Internal Server Error";
    case 503:
      return "Service Unavailable";
    case 504:
      return "Gateway Timeout";
    case 505:
      return "HTTP Version Not Supported";
    default:
      return "";
  }
}

}  // namespace

std::string Request::Parameter(absl::string_view name) const {
  for (const absl::string_view field : absl::StrSplit(query, '&')) {
    const std::pair<absl::string_view, absl::string_view> parts = absl::StrSplit(field, absl::MaxSplits('=', 1));
    if (parts.first == name) return Decode(parts.second);
  }
  return "";
}

size_t HeadLength(absl::string_view bytes, size_t searched) {
  // The empty line may have begun among the bytes that were searched.
  for (size_t at = searched < 2 ? 0 : searched - 2; (at = bytes.find('\n', at)) != absl::string_view::npos; ++at) {
    if (absl::StartsWith(bytes.substr(at), "\n\n")) return at + 2;
    if (absl::StartsWith(bytes.substr(at), "\n\r\n")) return at + 3;
  }
  return 0;
}

std::variant<Request, Answer> ParseRequest(absl::string_view head) {
  Request request;
  absl::string_view version;
  bool first = true;
  bool has_host = false;
  for (absl::string_view line : absl::StrSplit(head, '\n')) {
    absl::ConsumeSuffix(&line, "\r");
    if (std::exchange(first, false)) {
      if (auto refusal = ParseFirstLine(line, &request, &version)) return *std::move(refusal);
      continue;
    }
    if (line.empty()) break;
    const size_t colon = line.find(':');
    if (colon == absl::string_view::npos || !IsToken(line.substr(0, colon)) || HasControls(line)) {
      return Malformed("has a line among its headers that is none");
    }
    const absl::string_view name = line.substr(0, colon);
    const absl::string_view value = absl::StripAsciiWhitespace(line.substr(colon + 1));
    if (absl::EqualsIgnoreCase(name, "Authorization")) request.authorization = std::string(value);
    if (!absl::EqualsIgnoreCase(name, "Host")) continue;
    if (std::exchange(has_host, true)) return Malformed("has two headers Host");
    if (!request.host.has_value()) request.host = std::string(value);
  }
  if (!has_host && version != "HTTP/1.0") return Malformed("has no header Host");
  return request;
}

std::string WriteAnswer(const Answer& answer, bool with_body) {
  std::string text = absl::StrCat(
      "HTTP/1.1 ", answer.status, " ", ReasonOf(answer.status),
      "\r\nDate: ", absl::FormatTime("%a, %d %b %Y %H:%M:%S GMT", absl::Now(), absl::UTCTimeZone()),
      "\r\nConnection: close\r\n", "Content-Type: ", answer.type, "\r\nContent-Length: ", answer.body.size(),
      "\r\nCache-Control: no-store\r\n"
      "Content-Security-Policy: default-src 'self'; frame-ancestors 'none'\r\nX-Content-Type-Options: nosniff\r\n");
  // Browsers ask for a name and a password, and scripts of the page send what was given.
  if (answer.status == 401) absl::StrAppend(&text, "WWW-Authenticate: Basic realm=\"syncbn\"\r\n");
  if (answer.status == 405) absl::StrAppend(&text, "Allow: GET, HEAD\r\n");
  absl::StrAppend(&text, "\r\n", with_body ? absl::string_view(answer.body) : "");
  return text;
}

}  // namespace syncbn::http
