// Command lines, environments and config files of any kind, at syncbn-master's flags. The input is text: lines that
// begin with '-' are arguments, those that begin with "SYNCBN_" are variables, and the others are the config file's.

#include <dlfcn.h>
#include <netdb.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "plumbing/check.h"
#include "server/flags.h"
#include "server/rpc/identity.h"
#include "server/rpc/listen_address.h"

namespace syncbn::fuzz {
namespace {

// A file without a name.
class MemoryFile {
 public:
  explicit MemoryFile(const std::string& text) : descriptor_(memfd_create("config", MFD_CLOEXEC)) {
    SYNCBN_CHECK(descriptor_ >= 0 && write(descriptor_, text.data(), text.size()) == static_cast<ssize_t>(text.size()));
  }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  ~MemoryFile() { close(descriptor_); }

  std::string path() const { return absl::StrCat("/proc/self/fd/", descriptor_); }

 private:
  const int descriptor_;
};

void SetEnvironment(const std::vector<std::string>& variables) {
  clearenv();
  for (const std::string& variable : variables) {
    const size_t end = variable.find('=');
    if (end != std::string::npos) setenv(variable.substr(0, end).c_str(), variable.c_str() + end + 1, /*overwrite=*/1);
  }
}

// The ranges that server/flags.h and --help promise.
void Check(const Flags& flags) {
  const core::Limits& limits = flags.server.limits;
  SYNCBN_CHECK(limits.max_channels >= 1 && limits.max_channels <= 1 << 24);
  SYNCBN_CHECK(limits.max_workers >= 1 && limits.max_workers <= 1 << 20);
  SYNCBN_CHECK(limits.max_groups >= 1 && limits.max_groups <= 1 << 20);
  SYNCBN_CHECK(limits.max_retained_bytes >= 1 && limits.max_retained_bytes <= size_t{1} << 40);
  SYNCBN_CHECK(flags.server.max_connections <= 1 << 20 && flags.server.max_connections_per_address <= 1 << 20);
  SYNCBN_CHECK(flags.metrics_max_ranks >= 1 && flags.metrics_max_ranks <= 1 << 20);
  SYNCBN_CHECK(flags.exit_timeout >= absl::ZeroDuration() && flags.exit_timeout <= absl::Seconds(1e9));
  SYNCBN_CHECK(flags.max_lifetime > absl::ZeroDuration() && flags.watchdog > absl::ZeroDuration());
  for (const std::string& address : flags.server.addresses) {
    SYNCBN_CHECK(!address.empty());
    rpc::ParseListenAddress(address).IgnoreError();
  }
  core::Join join;
  join.id = {"a job", "group/1"};
  const rpc::PeerNames names = {{"worker.example.org"}, {"spiffe://example.org/a%20job/0"}};
  for (const std::string& text : flags.server.tls.identity_templates) {
    const auto parsed = rpc::IdentityTemplate::Parse(text);
    if (parsed.ok() && !parsed->Admits(names, join)) SYNCBN_CHECK(!parsed->Describe(join).empty());
  }
}

void Run(absl::string_view input) {
  std::vector<std::string> arguments = {"syncbn-master"}, variables;
  std::string config;
  for (const absl::string_view line : absl::StrSplit(input, '\n')) {
    const std::string text(line.substr(0, line.find('\0')));  // As the system passes it.
    if (absl::StartsWith(line, "-")) {
      arguments.push_back(text);
    } else if (absl::StartsWith(line, "SYNCBN_")) {
      variables.push_back(text);
    } else {
      absl::StrAppend(&config, line, "\n");
    }
  }
  const MemoryFile file(config);
  if (config.size() > 1) arguments.push_back("--config-file=" + file.path());
  SetEnvironment(variables);
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  Flags flags;
  const auto code = ParseFlags(static_cast<int>(arguments.size()), argv.data(), &flags);
  SYNCBN_CHECK(!code.has_value() || *code == 0 || *code == 2);
  if (!code.has_value()) Check(flags);
}

}  // namespace
}  // namespace syncbn::fuzz

// Takes the place of the C library's function: it finds addresses, and no names. A name server's answer is not
// determined by the input, and may take seconds.
extern "C" int getaddrinfo(const char* name, const char* service, const addrinfo* hints, addrinfo** found) {
  static const auto of_library = reinterpret_cast<decltype(&getaddrinfo)>(dlsym(RTLD_NEXT, "getaddrinfo"));
  addrinfo numeric = hints == nullptr ? addrinfo() : *hints;
  numeric.ai_flags |= AI_NUMERICHOST;
  return of_library(name, service, &numeric, found);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  syncbn::fuzz::Run(absl::string_view(reinterpret_cast<const char*>(data), size));
  return 0;
}
