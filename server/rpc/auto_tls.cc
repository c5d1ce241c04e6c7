#include "server/rpc/auto_tls.h"

#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "plumbing/certificate.h"
#include "plumbing/log.h"

namespace syncbn::rpc {
namespace {

std::string HostOf(const std::vector<ListenAddress>& addresses) {
  for (const ListenAddress& address : addresses) {
    if (!address.is_tcp()) continue;
    if (!address.sockets.front().is_wildcard()) {
      return std::string(absl::StripSuffix(absl::StripPrefix(address.host, "["), "]"));
    }
    char name[256] = "";
    gethostname(name, sizeof(name) - 1);
    return name;
  }
  return "localhost";  // gRPC's name for the server of a unix socket.
}

bool Exists(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

}  // namespace

absl::StatusOr<AutoTls> AutoTls::Make(const std::vector<ListenAddress>& addresses, TlsFiles files) {
  AutoTls made;
  if (files.cert_file.empty() != files.key_file.empty()) {
    return absl::InvalidArgumentError("a file for the certificate is given and none for its key, or the reverse");
  }
  if (files.cert_file.empty()) {
    const char* const parent = std::getenv("TMPDIR");
    std::string folder = absl::StrCat(parent == nullptr || *parent == '\0' ? "/tmp" : parent, "/syncbn-master-XXXXXX");
    if (mkdtemp(folder.data()) == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("cannot make a folder for the certificate at \"", folder,
                                                     "\": ", absl::AsciiStrToLower(std::strerror(errno))));
    }
    made.folder_ = folder;
    files.cert_file = absl::StrCat(folder, "/cert.pem");
    files.key_file = absl::StrCat(folder, "/key.pem");
  }
  made.files_ = files;
  const bool cert_exists = Exists(files.cert_file);
  if (cert_exists != Exists(files.key_file)) {
    return absl::InvalidArgumentError(absl::StrCat("\"", cert_exists ? files.cert_file : files.key_file,
                                                   "\" exists, and \"", cert_exists ? files.key_file : files.cert_file,
                                                   "\" does not"));
  }
  const std::string host = HostOf(addresses);
  if (!cert_exists) {
    if (absl::Status status = MakeSelfSignedCertificate(host, files.cert_file, files.key_file); !status.ok()) {
      return status;
    }
  }
  const auto fingerprint = CertificateFingerprint(files.cert_file);
  if (!fingerprint.ok()) return fingerprint.status();
  Log(LogLevel::kInfo,
      absl::StrCat(cert_exists ? "found" : "made", " the certificate that workers need to trust: ", files.cert_file,
                   cert_exists ? "" : absl::StrCat(", for host ", host), ", SHA-256 fingerprint ", *fingerprint));
  return made;
}

AutoTls::AutoTls(AutoTls&& other) noexcept
    : files_(std::move(other.files_)), folder_(std::exchange(other.folder_, std::string())) {}

AutoTls& AutoTls::operator=(AutoTls&& other) noexcept {
  std::swap(files_, other.files_);
  std::swap(folder_, other.folder_);
  return *this;
}

AutoTls::~AutoTls() {
  if (folder_.empty()) return;
  unlink(files_.cert_file.c_str());
  unlink(files_.key_file.c_str());
  rmdir(folder_.c_str());
}

}  // namespace syncbn::rpc
