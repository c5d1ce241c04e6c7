// The text of syncbn-master's config file: what it means, and what is refused in which line.

#include "server/config_file.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace syncbn {
namespace {

using ::testing::HasSubstr;

// Writes the entries as "line:key=value|value", one after another.
std::string Shown(absl::string_view text) {
  const auto entries = ParseConfigFile(text);
  if (!entries.ok()) return entries.status().ToString();
  return absl::StrJoin(*entries, " ", [](std::string* out, const ConfigEntry& entry) {
    absl::StrAppend(out, entry.line, ":", entry.key, "=", absl::StrJoin(entry.values, "|"));
  });
}

TEST(ConfigFileTest, EntriesOfBothFormats) {
  for (const auto& [text, shown] : std::vector<std::pair<std::string, std::string>>{
           {"", ""},
           {"\n \n# a comment\n; another\n", ""},
           {"max-workers = 3\n", "1:max-workers=3"},
           {"a=1", "1:a=1"},
           {"\n\nab = \"x y\" # the rest", "3:ab=x y"},
           {"'ab' = 'it is \"x\"'", "1:ab=it is \"x\""},
           {"ab = x, y\nc = x y", "1:ab=x|y 2:c=x|y"},
           {"ab = \"x\", 'y',", "1:ab=x|y"},
           {"ab = x, \nc=1", "1:ab=x 2:c=1"},
           {"insecure\nreflection # on", "1:insecure=true 2:reflection=true"},
           {"ab =", "1:ab="},
           {"ab = # nothing", "1:ab="},
           {"[default]\nab = 1\n[DEFAULT] # again\n", "2:ab=1"},
           {"ab = [x]", "1:ab=x"},
           {"ab = [\"x\", 'y']\nc = 1", "1:ab=x|y 2:c=1"},
           {"ab = [ # a list\n  \"x]\", # with a comment\n  y,\n]  # its end\nc = 1", "1:ab=x]|y 5:c=1"},
           {"ab = 1\r\nc = [x,\r\ny]\r\nd\r\n", "1:ab=1 2:c=x|y 4:d=true"},
           {"ab = \"/a#b\"", "1:ab=/a#b"},
           {"ab = URI:spiffe://example.org/{job}?x=1", "1:ab=URI:spiffe://example.org/{job}?x=1"},
           {"ab = 1\nab = 2", "1:ab=1 2:ab=2"},
           {"\xEF\xBB\xBFmax-workers = 3", "1:max-workers=3"},
           {"\xEF\xBB\xBF# a comment\nab = gr\xC3\xBC\xC3\x9F", "2:ab=gr\xC3\xBC\xC3\x9F"}}) {
    EXPECT_EQ(Shown(text), shown) << text;
  }
}

TEST(ConfigFileTest, ErrorsNameTheLine) {
  for (const auto& [text, words] : std::vector<std::pair<std::string, std::string>>{
           {"ab = 1\nc = [x, y\nd = 2\n", "two values of a list without a comma between them, in line 3"},
           {"ab = 1\nc = [x,\n", "a '[' that no ']' closes, in line 2"},
           {"c = [", "a '[' that no ']' closes, in line 1"},
           {"c = [1", "a '[' that no ']' closes, in line 1"},
           {"c = [\"1\"", "a '[' that no ']' closes, in line 1"},
           {"\nc = []", "an empty list in line 2"},
           {"c = [1] 2", "text after a list in line 1"},
           {"c = [::1]:50051", "a value that begins with '[' needs quotes"},
           {"c = 1\n[server]\n", "a section, \"[server]\", in line 2"},
           {"[server", "a section, \"[server\", in line 1"},
           {"[[default]]", "a section"},
           {"c = \"x\nd = \"", "a quote that is not closed in line 1"},
           {"c = 'x\"", "a quote that is not closed in line 1"},
           {"c = [\"x\n\"]", "a quote that is not closed in line 1"},
           {"\n\n = 3", "a value without a key in line 3"},
           {"=", "a value without a key in line 1"},
           {"c = \"\"\"x\"\"\"", "text after a quote in line 1"},
           {"c = 'x'y", "text after a quote in line 1"},
           {"a = 1\nb = \x01", "a control character, byte 1, in line 2"},
           {std::string("\xFF\xFE\0=\0", 5), "it has to be UTF-8"},
           {std::string(5, '\0'), "a control character, byte 0, in line 1"}}) {
    const auto entries = ParseConfigFile(text);
    EXPECT_EQ(entries.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(entries.status().message()), HasSubstr(words));
  }
}

}  // namespace
}  // namespace syncbn
