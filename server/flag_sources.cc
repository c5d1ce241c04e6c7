#include "server/flag_sources.h"

#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <istream>
#include <iterator>
#include <map>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "plumbing/secret.h"
#include "server/config_file.h"
#include "server/flag_names.h"

namespace syncbn {
namespace {

constexpr char kTokenVariable[] = "SYNCBN_TOKEN";
constexpr char kInspectionTokenVariable[] = "SYNCBN_INSPECTION_TOKEN";
// Variables of workers, which may be set for a whole host.
constexpr const char* kVariablesOfWorkers[] = {"SYNCBN_CLIENT_CERT_FILE",
                                               "SYNCBN_CLIENT_KEY_FILE",
                                               "SYNCBN_CLIENT_TRUSTED_CA_FILE",
                                               "SYNCBN_DESCRIPTION",
                                               "SYNCBN_GENERATION",
                                               "SYNCBN_GROUP",
                                               "SYNCBN_JOB",
                                               "SYNCBN_JOIN_TIMEOUT",
                                               "SYNCBN_LIBRARY",
                                               "SYNCBN_MIN_WORKERS",
                                               "SYNCBN_ON_WORKER_LOST",
                                               "SYNCBN_REJOIN_GRACE",
                                               "SYNCBN_STREAM_ORDERED",
                                               "SYNCBN_TARGET",
                                               "SYNCBN_TIMEOUT"};

class StrictConfig final : public CLI::ConfigTOML {
 public:
  explicit StrictConfig(std::vector<std::string> known) : known_(std::move(known)) {}

  std::vector<CLI::ConfigItem> from_config(std::istream& input) const override {
    const auto entries = ParseConfigFile(ReadAll(input));
    if (!entries.ok()) throw CLI::ConfigError(std::string(entries.status().message()));
    std::vector<CLI::ConfigItem> items;
    std::map<std::string, int> lines;
    for (const ConfigEntry& entry : *entries) {
      const std::string name = WithHyphens(entry.key);
      if (std::find(known_.begin(), known_.end(), name) == known_.end()) {
        throw CLI::ConfigError(absl::StrCat("the config file has an unknown key \"", entry.key, "\" in line ",
                                            entry.line, "; the nearest is \"", Nearest(name, known_).first, "\""));
      }
      if (const auto [first, is_new] = lines.emplace(name, entry.line); !is_new) {
        throw CLI::ConfigError(absl::StrCat("the config file has the key \"", entry.key, "\" twice, in the lines ",
                                            first->second, " and ", entry.line, "; leave one of them"));
      }
      items.push_back({{}, name, entry.values});
    }
    return items;
  }

 private:
  static std::string ReadAll(std::istream& input) {
    std::string text;
    char piece[4096];
    do {
      input.read(piece, sizeof(piece));
      text.append(piece, static_cast<size_t>(input.gcount()));
    } while (input.good() && text.size() <= kMostConfigBytes);
    if (input.bad()) throw CLI::FileError("the config file cannot be read");
    if (text.size() > kMostConfigBytes) {
      throw CLI::ConfigError(
          absl::StrCat("the config file is longer than ", kMostConfigBytes, " bytes, the most that are read"));
    }
    return text;
  }

  const std::vector<std::string> known_;
};

void ReadTokenVariable(const char* variable, const char* flag, std::string* token) {
  const char* const value = getenv(variable);
  if (value == nullptr || *value == '\0') return;
  if (!token->empty()) throw CLI::ValidationError(flag, absl::StrCat("is given, and so is the variable ", variable));
  if (const absl::Status status = CheckToken(value); !status.ok()) {
    throw CLI::ValidationError(variable, std::string(status.message()));
  }
  *token = value;
}

}  // namespace

std::shared_ptr<CLI::Config> MakeStrictConfig(std::vector<std::string> known) {
  return std::make_shared<StrictConfig>(std::move(known));
}

void ReadTokenVariables(std::string* token, std::string* inspection_token) {
  ReadTokenVariable(kTokenVariable, "--token-file", token);
  ReadTokenVariable(kInspectionTokenVariable, "--inspection-token-file", inspection_token);
}

void ReadEnvironment(const std::vector<std::string>& names, std::vector<std::string>* doubts) {
  std::vector<std::string> known;
  known.reserve(names.size() + 3 + std::size(kVariablesOfWorkers));
  for (const std::string& name : names) known.push_back(VariableOf(name));
  known.push_back(VariableOf("config-file"));
  known.insert(known.end(), {kTokenVariable, kInspectionTokenVariable});
  known.insert(known.end(), std::begin(kVariablesOfWorkers), std::end(kVariablesOfWorkers));
  std::vector<std::string> entries;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) entries.emplace_back(*entry);
  for (const std::string& entry : entries) {
    const std::string name = entry.substr(0, entry.find('='));
    if (!absl::StartsWith(name, kVariablePrefix)) continue;
    const std::string with_underscores = absl::StrReplaceAll(name, {{"-", "_"}});
    if (std::find(known.begin(), known.end(), with_underscores) == known.end()) {
      const auto [nearest, distance] = Nearest(with_underscores, known);
      if (distance > 2) continue;
      doubts->push_back(absl::StrCat("the variable ", name, " is not known; ", nearest, " is"));
    } else if (with_underscores != name) {
      setenv(with_underscores.c_str(), entry.c_str() + name.size() + 1, /*overwrite=*/0);
    }
  }
}

std::vector<std::string> ReadArguments(int argc, char** argv) {
  std::vector<std::string> arguments;
  bool has_config = false;
  for (int i = 1; i < argc; ++i) {
    std::string argument = argv[i];
    const size_t end = std::min(argument.find('='), argument.size());
    if (absl::StartsWith(argument, "--")) argument = WithHyphens(argument.substr(0, end)) + argument.substr(end);
    has_config = has_config || argument.substr(0, argument.find('=')) == "--config-file";
    const bool empty = absl::StartsWith(argument, "--") && end + 1 == argument.size();
    // "--flag=" has an empty value; CLI11 would report a missing one.
    if (empty) argument.pop_back();
    arguments.push_back(std::move(argument));
    if (empty) arguments.emplace_back();
  }
  const char* const variable = getenv(VariableOf("config-file").c_str());
  if (!has_config && variable != nullptr && *variable != '\0') {
    arguments.push_back(absl::StrCat("--config-file=", variable));
  }
  std::reverse(arguments.begin(), arguments.end());
  return arguments;
}

}  // namespace syncbn
