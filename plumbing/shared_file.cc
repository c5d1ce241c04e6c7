#include "plumbing/shared_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "plumbing/secret.h"

namespace syncbn {
namespace {

constexpr absl::string_view kVersion = "1";
constexpr absl::string_view kFilePrefix = "syncbn-";
constexpr size_t kKeyBytes = 16;
constexpr char kMagic[8] = {'s', 'y', 'n', 'c', 'b', 'n', 'M', '1'};
static_assert(sizeof(kMagic) + kKeyBytes <= SharedFile::kHeadBytes);
// A file that is younger may be about to be locked.
constexpr time_t kYoungSeconds = 60;

absl::Status Unusable(absl::string_view path, absl::string_view why) {
  return absl::UnavailableError(absl::StrCat("the shared file \"", path, "\" cannot be used: ", why));
}

absl::Status Errno(absl::string_view path) { return Unusable(path, strerror(errno)); }

bool IsHex(absl::string_view text) {
  return text.size() == 2 * kKeyBytes &&
         std::all_of(text.begin(), text.end(), [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

// Makes sure that every page of the file has memory: to touch one that has none ends the process.
bool Allocate(int descriptor, size_t bytes) { return fallocate(descriptor, 0, 0, static_cast<off_t>(bytes)) == 0; }

void RemoveIfAbandoned(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  if (descriptor < 0) return;
  struct stat found = {};
  const bool ours = fstat(descriptor, &found) == 0 && S_ISREG(found.st_mode) && found.st_uid == geteuid();
  const bool old = time(nullptr) - found.st_mtime > kYoungSeconds;
  if (ours && old && flock(descriptor, LOCK_EX | LOCK_NB) == 0) unlink(path.c_str());
  close(descriptor);
}

}  // namespace

std::optional<MemorySharing> ParseMemorySharing(absl::string_view text) {
  if (text == "off" || text == "0") return MemorySharing::kOff;
  if (text == "same-user" || text == "1") return MemorySharing::kSameUser;
  if (text == "any-user") return MemorySharing::kAnyUser;
  return std::nullopt;
}

absl::StatusOr<SharedMemoryOptions> SharedMemoryOptions::FromEnvironment(MemorySharing otherwise) {
  SharedMemoryOptions options;
  options.sharing = otherwise;
  if (const char* const value = std::getenv("SYNCBN_SHARED_MEMORY"); value != nullptr && *value != '\0') {
    const auto sharing = ParseMemorySharing(value);
    if (!sharing.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat("SYNCBN_SHARED_MEMORY is \"", value, "\"; it is off, same-user or any-user"));
    }
    options.sharing = *sharing;
  }
  if (const char* const value = std::getenv("SYNCBN_SHARED_MEMORY_DIR"); value != nullptr) options.directory = value;
  return options;
}

std::vector<std::string> SharedMemoryDirectories(const std::string& given, const std::vector<std::string>& sockets) {
  if (!given.empty()) return {given};
  std::vector<std::string> directories;
  for (const std::string& socket : sockets) {
    const size_t slash = socket.rfind('/');
    directories.push_back(slash == std::string::npos ? "." : socket.substr(0, slash));
  }
  directories.emplace_back(kSharedMemoryDirectory);
  return directories;
}

SharedName SharedName::Draw() {
  return {absl::StrCat(kFilePrefix, absl::BytesToHexString(RandomBytes(kKeyBytes))), RandomBytes(kKeyBytes)};
}

std::optional<SharedName> SharedName::Parse(absl::string_view text) {
  const std::vector<absl::string_view> words = absl::StrSplit(text, ' ');
  if (words.size() != 3 || words[0] != kVersion || !absl::StartsWith(words[1], kFilePrefix)) return std::nullopt;
  if (!IsHex(words[1].substr(kFilePrefix.size())) || !IsHex(words[2])) return std::nullopt;
  return SharedName{std::string(words[1]), absl::HexStringToBytes(words[2])};
}

std::string SharedName::ToString() const { return absl::StrCat(kVersion, " ", file, " ", absl::BytesToHexString(key)); }

absl::StatusOr<SharedFile> SharedFile::Create(const std::string& directory, const SharedName& name, size_t bytes,
                                              MemorySharing sharing) {
  SharedFile file;
  const std::string path = absl::StrCat(directory, "/", name.file);
  file.descriptor_ = open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, S_IRUSR | S_IWUSR);
  if (file.descriptor_ < 0) return Errno(path);
  file.path_ = path;
  file.made_ = true;
  constexpr mode_t kAllMayWrite = 0666;
  if (sharing == MemorySharing::kAnyUser && fchmod(file.descriptor_, kAllMayWrite) != 0) return Errno(path);
  if (flock(file.descriptor_, LOCK_EX | LOCK_NB) != 0 || !Allocate(file.descriptor_, kHeadBytes + bytes)) {
    return Errno(path);
  }
  if (absl::Status status = file.Map(file.descriptor_, bytes); !status.ok()) return status;
  std::memcpy(file.map_, kMagic, sizeof(kMagic));
  std::memcpy(static_cast<char*>(file.map_) + sizeof(kMagic), name.key.data(), kKeyBytes);
  return file;
}

absl::StatusOr<SharedFile> SharedFile::Open(const std::string& directory, const SharedName& name, size_t bytes,
                                            MemorySharing sharing) {
  SharedFile file;
  const std::string path = absl::StrCat(directory, "/", name.file);
  file.descriptor_ = open(path.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  if (file.descriptor_ < 0) return Errno(path);
  file.path_ = path;
  struct stat found = {};
  if (fstat(file.descriptor_, &found) != 0) return Errno(path);
  if (!S_ISREG(found.st_mode)) return Unusable(path, "it is no file");
  if (found.st_uid != geteuid() && sharing != MemorySharing::kAnyUser) {
    return Unusable(path, absl::StrCat("it belongs to user ", found.st_uid, ", and this process to ", geteuid()));
  }
  if (static_cast<size_t>(found.st_size) != kHeadBytes + bytes) {
    return Unusable(path, absl::StrCat("it has ", found.st_size, " bytes instead of ", kHeadBytes + bytes));
  }
  if (!Allocate(file.descriptor_, kHeadBytes + bytes)) return Errno(path);
  if (absl::Status status = file.Map(file.descriptor_, bytes); !status.ok()) return status;
  close(std::exchange(file.descriptor_, -1));
  if (std::memcmp(file.map_, kMagic, sizeof(kMagic)) != 0 ||
      std::memcmp(static_cast<char*>(file.map_) + sizeof(kMagic), name.key.data(), kKeyBytes) != 0) {
    return Unusable(path, "it is another file");
  }
  return file;
}

absl::Status SharedFile::Map(int descriptor, size_t bytes) {
  bytes_ = kHeadBytes + bytes;
  void* const map = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor, 0);
  if (map == MAP_FAILED) return Errno(path_);
  map_ = map;
  if (madvise(map_, bytes_, MADV_DONTFORK) != 0) return Errno(path_);
  return absl::OkStatus();
}

void SharedFile::RemoveAbandoned(const std::string& directory) {
  DIR* const entries = opendir(directory.c_str());
  if (entries == nullptr) return;
  while (const dirent* const entry = readdir(entries)) {
    const absl::string_view name = entry->d_name;
    if (absl::StartsWith(name, kFilePrefix) && IsHex(name.substr(kFilePrefix.size()))) {
      RemoveIfAbandoned(absl::StrCat(directory, "/", name));
    }
  }
  closedir(entries);
}

SharedFile& SharedFile::operator=(SharedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(made_, other.made_);
  std::swap(descriptor_, other.descriptor_);
  std::swap(map_, other.map_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

SharedFile::~SharedFile() {
  if (made_) Unlink();
  if (descriptor_ >= 0) close(descriptor_);
  if (map_ != nullptr) munmap(map_, bytes_);
}

void SharedFile::Unlink() {
  if (!path_.empty()) unlink(std::exchange(path_, "").c_str());
  if (descriptor_ >= 0) close(std::exchange(descriptor_, -1));
}

}  // namespace syncbn
