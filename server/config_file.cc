#include "server/config_file.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace syncbn {
namespace {

constexpr absl::string_view kByteOrderMark = "\xEF\xBB\xBF";
// Characters that begin a comment: of a line, and behind a value.
constexpr absl::string_view kLineComments = ";#";
constexpr absl::string_view kComments = "#";

absl::Status Wrong(int line, absl::string_view what, absl::string_view cure = "") {
  return absl::InvalidArgumentError(absl::StrCat("the config file has ", what, " in line ", line, cure));
}

bool IsSpace(char c) { return absl::ascii_isspace(static_cast<unsigned char>(c)); }

class Parser {
 public:
  explicit Parser(absl::string_view text) : rest_(text) { absl::ConsumePrefix(&rest_, kByteOrderMark); }

  absl::StatusOr<std::vector<ConfigEntry>> Parse() {
    if (absl::Status status = CheckCharacters(); !status.ok()) return status;
    std::vector<ConfigEntry> entries;
    for (SkipToText(kLineComments); !rest_.empty(); SkipToText(kLineComments)) {
      if (rest_.front() == '[') {
        if (absl::Status status = SkipSection(); !status.ok()) return status;
        continue;
      }
      auto entry = ParseEntry();
      if (!entry.ok()) return entry.status();
      entries.push_back(*std::move(entry));
    }
    return entries;
  }

 private:
  // Finds what no text file has: another encoding than UTF-8 and ASCII, or no text at all.
  absl::Status CheckCharacters() const {
    int line = 1;
    for (const char c : rest_) {
      if (absl::ascii_iscntrl(static_cast<unsigned char>(c)) && !IsSpace(c)) {
        return Wrong(line, absl::StrCat("a control character, byte ", static_cast<int>(c), ","),
                     "; it has to be UTF-8");
      }
      line += c == '\n' ? 1 : 0;
    }
    return absl::OkStatus();
  }

  char Take() {
    const char c = rest_.front();
    rest_.remove_prefix(1);
    line_ += c == '\n' ? 1 : 0;
    return c;
  }

  void SkipLine() { rest_.remove_prefix(std::min(rest_.find('\n'), rest_.size())); }

  void SkipBlanks() {
    while (!rest_.empty() && rest_.front() != '\n' && IsSpace(rest_.front())) Take();
  }

  // Skips space, line ends, and the comments that one of `marks` begins.
  void SkipToText(absl::string_view marks) {
    while (!rest_.empty() && (IsSpace(rest_.front()) || absl::StrContains(marks, rest_.front()))) {
      if (IsSpace(rest_.front())) {
        Take();
      } else {
        SkipLine();
      }
    }
  }

  bool AtLineEnd() const { return rest_.empty() || rest_.front() == '\n' || rest_.front() == '#'; }

  absl::Status SkipSection() {
    const absl::string_view line = absl::StripAsciiWhitespace(rest_.substr(0, rest_.find_first_of("\n#")));
    if (!absl::EqualsIgnoreCase(line, "[default]")) {
      return Wrong(line_, absl::StrCat("a section, \"", line, "\","), "; it has keys alone, and no sections");
    }
    SkipLine();
    return absl::OkStatus();
  }

  absl::StatusOr<ConfigEntry> ParseEntry() {
    ConfigEntry entry;
    entry.line = line_;
    const absl::string_view name = rest_.substr(0, rest_.find_first_of("=\n#"));
    rest_.remove_prefix(name.size());
    entry.key = std::string(Unquoted(absl::StripAsciiWhitespace(name)));
    if (entry.key.empty()) return Wrong(line_, "a value without a key");
    absl::Status status;
    if (AtLineEnd()) {
      entry.values = {"true"};
      SkipLine();
    } else {
      Take();  // The '='.
      SkipBlanks();
      const bool list = !rest_.empty() && rest_.front() == '[';
      status = list ? ParseList(&entry.values) : ParseValues(&entry.values);
    }
    if (!status.ok()) return status;
    return entry;
  }

  static absl::string_view Unquoted(absl::string_view name) {
    const bool quoted = name.size() > 1 && name.front() == name.back() && (name.front() == '"' || name.front() == '\'');
    return quoted ? name.substr(1, name.size() - 2) : name;
  }

  // Values up to the end of the line, with commas or spaces between them.
  absl::Status ParseValues(std::vector<std::string>* values) {
    do {
      if (absl::Status status = ParseValue(",", values); !status.ok()) return status;
      SkipBlanks();
      if (!rest_.empty() && rest_.front() == ',') Take();
      SkipBlanks();
    } while (!AtLineEnd());
    SkipLine();
    return absl::OkStatus();
  }

  // Values up to the ']', over any number of lines, with commas between them.
  absl::Status ParseList(std::vector<std::string>* values) {
    const int begin = line_;
    Take();
    for (SkipToText(kComments); !rest_.empty() && rest_.front() != ']'; SkipToText(kComments)) {
      if (absl::Status status = ParseValue(",]", values); !status.ok()) return status;
      SkipToText(kComments);
      if (!rest_.empty() && rest_.front() == ',') {
        Take();
      } else if (!rest_.empty() && rest_.front() != ']') {
        return Wrong(line_, "two values of a list without a comma between them,");
      }
    }
    if (rest_.empty()) return Wrong(begin, "a '[' that no ']' closes,");
    Take();
    if (values->empty()) return Wrong(begin, "an empty list", "; without the key, the flag has its default");
    SkipBlanks();
    if (!AtLineEnd()) return Wrong(line_, "text after a list", "; a value that begins with '[' needs quotes");
    SkipLine();
    return absl::OkStatus();
  }

  // One value, up to white space, a comment or one of `ends`.
  absl::Status ParseValue(absl::string_view ends, std::vector<std::string>* values) {
    if (!rest_.empty() && (rest_.front() == '"' || rest_.front() == '\'')) return ParseQuoted(ends, values);
    const auto end = std::find_if(rest_.begin(), rest_.end(),
                                  [&](char c) { return IsSpace(c) || c == '#' || absl::StrContains(ends, c); });
    const size_t size = static_cast<size_t>(end - rest_.begin());
    values->emplace_back(rest_.substr(0, size));
    rest_.remove_prefix(size);
    return absl::OkStatus();
  }

  absl::Status ParseQuoted(absl::string_view ends, std::vector<std::string>* values) {
    const absl::string_view line = rest_.substr(0, rest_.find('\n'));
    const size_t end = line.find(line.front(), 1);
    if (end == absl::string_view::npos) return Wrong(line_, "a quote that is not closed");
    values->emplace_back(line.substr(1, end - 1));
    rest_.remove_prefix(end + 1);
    const bool ended = AtLineEnd() || IsSpace(rest_.front()) || absl::StrContains(ends, rest_.front());
    return ended ? absl::OkStatus() : Wrong(line_, "text after a quote");
  }

  absl::string_view rest_;
  int line_ = 1;
};

}  // namespace

absl::StatusOr<std::vector<ConfigEntry>> ParseConfigFile(absl::string_view text) { return Parser(text).Parse(); }

}  // namespace syncbn
