#include "server/flags.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <optional>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "grpcpp/version_info.h"
#include "plumbing/bounded_file.h"
#include "plumbing/secret.h"
#include "server/flag_names.h"
#include "server/flag_sources.h"
#include "vocabulary/protocol_version.h"
#include "vocabulary/revision.h"
#include "vocabulary/version.h"

namespace syncbn {
namespace {

// Longest duration that a flag accepts: thirty years.
constexpr int64_t kMostSeconds = 1000000000;
// An idle thread of the master gives a sign of life each second, so that less would end one that is well.
constexpr int64_t kLeastWatchdogSeconds = 5;

// Returns what a switch is set to by text, in any case of letters; nullopt if that is no word for it.
std::optional<bool> TruthOf(absl::string_view text) {
  const std::string word = absl::AsciiStrToLower(text);
  for (const char* yes : {"true", "on", "yes", "1"}) {
    if (word == yes) return true;
  }
  for (const char* no : {"false", "off", "no", "0"}) {
    if (word == no) return false;
  }
  return std::nullopt;
}

[[noreturn]] void Refuse(const std::string& flag, absl::string_view value, absl::string_view is_not) {
  throw CLI::ValidationError(flag, absl::StrCat("\"", value, "\" is not ", is_not));
}

absl::Duration DurationOrForever(double seconds) {
  return seconds == 0.0 ? absl::InfiniteDuration() : absl::Seconds(seconds);
}

std::string VersionText() {
  const std::string commit = *kRevision == '\0' ? "" : absl::StrCat("commit ", kRevision, ", ");
  return absl::StrCat("syncbn-master ", kVersion, " (", commit, "protocol ", kProtocolVersion, ", gRPC ",
                      GRPC_CPP_VERSION_STRING, ")");
}

// Defines the options of the program, each with its variable and its range.
class Options {
 public:
  Options(CLI::App* app, Flags* flags) : app_(app), flags_(flags) {}

  void Define() {
    DefineAddresses();
    DefineTls();
    DefineStrangers();
    DefineLimits();
    DefineSharedMemory();
    DefineHttp();
    DefineLog();
    DefineLife();
    DefineGeneral();
    app_->config_formatter(MakeStrictConfig(names_));
  }

  // The flags' names, without leading hyphens.
  const std::vector<std::string>& names() const { return names_; }

 private:
  // Adds the option to the heading of --help that was begun last.
  CLI::Option* Named(CLI::Option* option, const std::string& name) {
    names_.push_back(name.substr(2));
    return option->group(group_)->envname(VariableOf(name));
  }

  void DefineAddresses() {
    group_ = "Addresses";
    const std::string name = "--address";
    auto* const option = app_->add_option_function<std::vector<std::string>>(
        name,
        [this, name](const std::vector<std::string>& addresses) {
          std::vector<std::string> stripped;
          for (const std::string& address : addresses) {
            stripped.emplace_back(absl::StripAsciiWhitespace(address));  // "A, B", as workers take their targets.
            if (stripped.back().empty()) Refuse(name, address, "HOST:PORT or unix:PATH");
          }
          flags_->server.addresses = std::move(stripped);
        },
        "where to listen: HOST:PORT (port 0: any) or unix:PATH; may repeat");
    Named(option, name)
        ->delimiter(',')
        ->type_name("ADDRESS")
        ->default_str(absl::StrJoin(flags_->server.addresses, ","));
    Switch("--insecure", &flags_->server.insecure, "listen beyond loopback without TLS");
  }

  void DefineTls() {
    group_ = "TLS";
    MasterServer::TlsOptions& tls = flags_->server.tls;
    Text("--cert-file", &tls.cert_file, "PEM certificate; with it and its key, the master accepts TLS only");
    Text("--key-file", &tls.key_file, "PEM key of the certificate");
    Text("--trusted-ca-file", &tls.trusted_ca_file,
         "PEM certificates of the CA that signs the workers' certificates; needs --client-cert-auth");
    Switch("--client-cert-auth", &tls.client_cert_auth, "refuse workers without a trusted certificate");
    const std::string name = "--identity-template";
    Named(app_->add_option(name, tls.identity_templates,
                           "a name that a worker's certificate must have, with {job}, {group} and {rank}: "
                           "URI:spiffe://example.org/{job}/{rank}; may repeat"),
          name)
        ->type_name("URI:NAME|DNS:NAME");
    Switch("--auto-tls", &tls.auto_tls, "make the certificate and its key if the files do not exist");
  }

  void DefineStrangers() {
    group_ = "Tokens and inspection";
    MasterServer::Options& server = flags_->server;
    TokenFile("--token-file", &server.token, "a file with the token that every worker must have");
    OnOff("--inspection", &server.inspection, "serve InspectionService; off: no status page either")
        ->default_str("on if only this host can connect");
    TokenFile("--inspection-token-file", &server.inspection_token,
              "a file with the token that callers of InspectionService and readers of the status page need")
        ->default_str("the workers' token");
    OnOff("--reflection", &server.reflection, "serve gRPC's reflection and channelz")
        ->default_str("on if only this host can connect");
  }

  void DefineLimits() {
    group_ = "Limits";
    MasterServer::Options& server = flags_->server;
    Whole("--max-workers", &server.limits.max_workers, 1 << 20, "most workers of a group");
    Whole("--max-groups", &server.limits.max_groups, 1 << 20, "most groups at one time");
    Whole("--max-channels", &server.limits.max_channels, 1 << 24, "most channels of a layer");
    Whole("--max-retained-bytes", &server.limits.max_retained_bytes, int64_t{1} << 40,
          "most bytes of ended rounds that a group remembers, for replays");
    Whole("--max-connections", &server.max_connections, 1 << 20, "most connections at one time")
        ->default_str("what the limit of descriptors leaves room for");
    Whole("--max-connections-per-address", &server.max_connections_per_address, 1 << 20,
          "most connections of one address")
        ->default_str("half of all; any number from this host");
  }

  void DefineSharedMemory() {
    group_ = "Shared memory";
    const std::string name = "--shared-memory";
    auto* const option = app_->add_option_function<std::string>(
        name,
        [this, name](const std::string& text) {
          const auto sharing = ParseMemorySharing(text);
          if (!sharing.has_value()) Refuse(name, text, "off, same-user or any-user");
          flags_->server.shared_memory = *sharing;
        },
        "share memory with workers on this machine: off, same-user or any-user");
    Named(option, name)->type_name("WHOM")->default_str("same-user");
    DefineSharedMemoryDir();
  }

  // Workers would use gRPC without a word, and the one who named the directory would not learn it.
  void DefineSharedMemoryDir() {
    const std::string name = "--shared-memory-dir";
    auto* const option = app_->add_option_function<std::string>(
        name,
        [this, name](const std::string& text) {
          struct stat found = {};
          if (stat(text.c_str(), &found) != 0 || !S_ISDIR(found.st_mode)) {
            Refuse(name, text, "the name of a directory that exists");
          }
          flags_->server.shared_memory_dir = text;
        },
        "the directory of the memory that workers share");
    Named(option, name)->type_name("DIR");
  }

  void DefineHttp() {
    group_ = "Status page, metrics and probes";
    const std::string name = "--http-address";
    auto* const option = app_->add_option_function<std::string>(
        name,
        [this, name](const std::string& text) {
          if (text.empty()) Refuse(name, text, "HOST:PORT or off");
          flags_->http_address = text == "off" ? "" : text;
        },
        "where to serve them by HTTP: HOST:PORT (port 0: any), or off");
    Named(option, name)->type_name("ADDRESS")->default_str("127.0.0.1:8080, if it is free");
    Whole("--metrics-max-ranks", &flags_->metrics_max_ranks, 1 << 20, "most workers of a group with metrics by rank");
  }

  void DefineLog() {
    group_ = "Log";
    DefineLogLevel();
    DefineLogFormat();
  }

  void DefineLife() {
    group_ = "Start and end";
    Text("--state-dir", &flags_->server.state_dir, "keep running statistics in this directory, for the next master",
         "DIR", "the name of a directory");
    Seconds("--exit-timeout", "seconds that workers have to drain after a signal", "5",
            [this](double seconds) { flags_->exit_timeout = absl::Seconds(seconds); });
    Seconds("--max-lifetime", "exit after this many seconds; 0: never", "0",
            [this](double seconds) { flags_->max_lifetime = DurationOrForever(seconds); });
    Seconds(
        "--watchdog", "exit if the master has not answered its own probes for this many seconds; 0: never", "60",
        [this](double seconds) { flags_->watchdog = DurationOrForever(seconds); }, kLeastWatchdogSeconds);
  }

  void DefineGeneral() {
    app_->set_config("--config-file", "", "read flags from this file (TOML or INI)")
        ->envname(VariableOf("--config-file"))
        ->type_name("FILE")
        ->group("General");
    app_->set_version_flag("--version", VersionText(), "print version, commit, protocol and gRPC")->group("General");
    app_->get_help_ptr()->group("General");
  }

  void DefineLogLevel() {
    const std::string name = "--log-level";
    auto* const option = app_->add_option_function<std::string>(
        name,
        [this, name](const std::string& text) {
          for (const auto& [word, level] :
               {std::pair{"debug", LogLevel::kDebug}, std::pair{"info", LogLevel::kInfo},
                std::pair{"warning", LogLevel::kWarning}, std::pair{"error", LogLevel::kError}}) {
            if (text == word) {
              flags_->log_level = level;
              return;
            }
          }
          Refuse(name, text, "debug, info, warning or error");
        },
        "the lowest level that goes to stderr: debug, info, warning or error");
    Named(option, name)->type_name("LEVEL")->default_str("info");
  }

  void DefineLogFormat() {
    const std::string name = "--log-format";
    auto* const option = app_->add_option_function<std::string>(
        name,
        [this, name](const std::string& text) {
          if (text != "text" && text != "json") Refuse(name, text, "text or json");
          flags_->log_format = text == "json" ? LogFormat::kJson : LogFormat::kText;
        },
        "how lines on stderr are written: text or json");
    Named(option, name)->type_name("FORMAT")->default_str("text");
  }

  // CLI11 would accept any number for a switch, and not name the values that it may have.
  void Switch(const std::string& name, bool* value, const std::string& description) {
    Named(app_->add_flag(name, *value, description), name)->check([](const std::string& text) {
      return TruthOf(text).has_value() ? std::string() : absl::StrCat("\"", text, "\" is not true or false");
    });
  }

  CLI::Option* OnOff(const std::string& name, std::optional<bool>* value, const std::string& description) {
    auto* const option = app_->add_option_function<std::string>(
        name,
        [name, value](const std::string& text) {
          *value = TruthOf(text);
          if (!value->has_value()) Refuse(name, text, "on or off");
        },
        description);
    return Named(option, name)->type_name("on|off");
  }

  void Text(const std::string& name, std::string* value, const std::string& description,
            const std::string& type = "FILE", const std::string& meaning = "the name of a file") {
    auto* const option = app_->add_option_function<std::string>(
        name,
        [name, value, meaning](const std::string& text) {
          if (text.empty()) Refuse(name, text, meaning);
          *value = text;
        },
        description);
    Named(option, name)->type_name(type);
  }

  CLI::Option* TokenFile(const std::string& name, std::string* value, const std::string& description) {
    auto* const option = app_->add_option_function<std::string>(
        name,
        [name, value](const std::string& path) {
          auto token = ReadTokenFile(path);
          if (!token.ok()) throw CLI::ValidationError(name, std::string(token.status().message()));
          *value = *std::move(token);
        },
        description);
    return Named(option, name)->type_name("FILE");
  }

  template <typename T>
  CLI::Option* Whole(const std::string& name, T* value, int64_t most, const std::string& description) {
    auto* const option = app_->add_option_function<std::string>(
        name,
        [name, value, most](const std::string& text) {
          int64_t number = 0;
          if (!absl::SimpleAtoi(text, &number) || number < 1 || number > most) {
            Refuse(name, text, absl::StrCat("a whole number in 1 .. ", most));
          }
          *value = static_cast<T>(number);
        },
        absl::StrCat(description, "; 1 .. ", most));
    return Named(option, name)->type_name("N")->default_str(absl::StrCat(*value));
  }

  // `least` is the least number but 0, if that is another one.
  void Seconds(const std::string& name, const std::string& description, const std::string& fallback,
               std::function<void(double)> take, int64_t least = 0) {
    const std::string range = absl::StrCat(least == 0 ? "" : "0 or ", least, " .. ", kMostSeconds);
    auto* const option = app_->add_option_function<std::string>(
        name,
        [name, take = std::move(take), least, range](const std::string& text) {
          double seconds = 0.0;
          if (!absl::SimpleAtod(text, &seconds) ||
              !(seconds == 0.0 ||
                (seconds >= static_cast<double>(least) && seconds <= static_cast<double>(kMostSeconds)))) {
            Refuse(name, text, absl::StrCat("a number of seconds in ", range));
          }
          take(seconds);
        },
        absl::StrCat(description, "; ", range));
    Named(option, name)->type_name("SECONDS")->default_str(fallback);
  }

  CLI::App* const app_;
  Flags* const flags_;
  std::string group_;  // The heading of --help that options are added to.
  std::vector<std::string> names_;
};

// Returns the text as one line.
std::string OneLine(absl::string_view text) {
  std::string line(absl::StripSuffix(text, "\n"));
  std::replace_if(
      line.begin(), line.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }, ' ');
  return line;
}

// Returns what is wrong if CLI11's message is about a flag that has more values than it takes; else an empty text.
std::string ExplainRepeated(const CLI::App& app, absl::string_view message) {
  for (const CLI::Option* const option : app.get_options()) {
    if (option->count() < 2 || !absl::StartsWith(message, absl::StrCat(option->get_name(), ":"))) continue;
    return absl::StrCat(option->get_name(), " has ", option->count(), " values, \"",
                        absl::StrJoin(option->results(), "\" and \""), "\", and takes one: give it once");
  }
  return "";
}

std::string Explain(const CLI::App& app, const CLI::ParseError& error, const std::vector<std::string>& names) {
  std::string message = OneLine(error.what());
  if (dynamic_cast<const CLI::FileError*>(&error) != nullptr) {  // CLI11's words do not tell the reason.
    const std::string path = app.get_config_ptr()->as<std::string>();
    const absl::Status reason = ReadBoundedFile("config file", path, kMostConfigBytes).status();
    return reason.ok() ? message : OneLine(reason.message());
  }
  if (dynamic_cast<const CLI::ArgumentMismatch*>(&error) != nullptr) {
    const std::string repeated = OneLine(ExplainRepeated(app, message));
    return repeated.empty() ? message : repeated;
  }
  if (dynamic_cast<const CLI::ExtrasError*>(&error) == nullptr) return message;
  for (const std::string& argument : app.remaining()) {
    if (!absl::StartsWith(argument, "--")) continue;
    const std::string name = argument.substr(2, argument.find('=') - 2);
    // Values stay out of it: a token may be among them.
    return absl::StrCat("--", name, " is not a flag; the nearest flag is --", Nearest(name, names).first);
  }
  return message;
}

}  // namespace

std::optional<int> ParseFlags(int argc, char** argv, Flags* flags) {
  CLI::App app("The master of syncbn: merges the batch statistics of workers.", "syncbn-master");
  Options options(&app, flags);
  options.Define();
  ReadEnvironment(options.names(), &flags->doubts);
  try {
    app.parse(ReadArguments(argc, argv));
    ReadTokenVariables(&flags->server.token, &flags->server.inspection_token);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version.
    std::fprintf(stderr, "syncbn-master: %s\n", Explain(app, error, options.names()).c_str());
    return 2;
  }
  return std::nullopt;
}

}  // namespace syncbn
