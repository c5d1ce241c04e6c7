// Files that two processes of one machine map, and how one tells the other which file it is.

#ifndef SYNCBN_PLUMBING_SHARED_FILE_H_
#define SYNCBN_PLUMBING_SHARED_FILE_H_

#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace syncbn {

// With whom a process shares memory.
enum class MemorySharing { kOff, kSameUser, kAnyUser };

// Reads "off" (or "0"), "same-user" (or "1") and "any-user". Returns nothing for other texts.
std::optional<MemorySharing> ParseMemorySharing(absl::string_view text);

struct SharedMemoryOptions {
  // Reads SYNCBN_SHARED_MEMORY (off, same-user or any-user; `otherwise` if it is unset or empty) and
  // SYNCBN_SHARED_MEMORY_DIR. *Errors*: INVALID_ARGUMENT, naming the variable and its value.
  static absl::StatusOr<SharedMemoryOptions> FromEnvironment(MemorySharing otherwise);

  MemorySharing sharing = MemorySharing::kSameUser;
  // The directory of the segments. Empty: as SharedMemoryDirectories says.
  std::string directory;
};

// The folder where files are shared unless another is agreed.
inline constexpr char kSharedMemoryDirectory[] = "/dev/shm";
// Returns the directories in which workers make segments and a master looks for them, in this order: `given` alone, if
// it is not empty; otherwise those in which the unix sockets lie that have these paths, and kSharedMemoryDirectory.
std::vector<std::string> SharedMemoryDirectories(const std::string& given, const std::vector<std::string>& sockets);

// The gRPC metadata in which a worker offers a segment, and a master answers with its doorbell: SharedName::ToString.
inline constexpr char kSharedMemoryHeader[] = "syncbn-shared-memory";

// Names a file in a directory that is not told, since two processes may see it at different places; and what is written
// in it, so that the other process knows it for the same file.
struct SharedName {
  // Returns a name that nobody can guess.
  static SharedName Draw();
  // Reads "1 syncbn-HEX HEX", with 32 digits each. Returns nothing for other texts.
  static std::optional<SharedName> Parse(absl::string_view text);
  std::string ToString() const;

  std::string file;  // Without any slash.
  std::string key;   // 16 bytes.
};

// A mapped file. A forked child does not have the mapping.
//
// The file has its length for as long as both sides keep to the rules: a process of a user who may write to it could
// cut it, and the other one would end with SIGBUS. So only users who trust one another should share memory.
//
// *Thread safety*: none; what is in the file has rules of its own.
class SharedFile {
 public:
  // The bytes before data(): by whom the file was made, and the key.
  static constexpr size_t kHeadBytes = 64;

  // Makes a file of `bytes` zeros behind its head, which only this user can open, unless `sharing` is kAnyUser.
  // *Errors*: UNAVAILABLE, naming the file, where it cannot be made, or the directory has no room for it.
  static absl::StatusOr<SharedFile> Create(const std::string& directory, const SharedName& name, size_t bytes,
                                           MemorySharing sharing);
  // Maps a file that another process has made. *Errors*: UNAVAILABLE, naming the file, if it does not exist here, has
  // another length or key, or belongs to another user, unless `sharing` is kAnyUser.
  static absl::StatusOr<SharedFile> Open(const std::string& directory, const SharedName& name, size_t bytes,
                                         MemorySharing sharing);
  // Removes files of this user whose makers died before they could. Harmless to those that are in use.
  static void RemoveAbandoned(const std::string& directory);

  SharedFile(SharedFile&& other) noexcept { *this = std::move(other); }
  SharedFile& operator=(SharedFile&& other) noexcept;
  // Takes the name away, if this object made the file.
  ~SharedFile();

  // Takes the name away, so that the memory ends with the last mapping.
  void Unlink();
  // Returns the bytes behind the head, aligned to 64.
  char* data() const { return static_cast<char*>(map_) + kHeadBytes; }

 private:
  SharedFile() = default;
  absl::Status Map(int descriptor, size_t bytes);

  std::string path_;  // Empty once it has been unlinked.
  bool made_ = false;
  int descriptor_ = -1;  // Holds a lock as long as a file that was made has its name.
  void* map_ = nullptr;
  size_t bytes_ = 0;  // The head included.
};

}  // namespace syncbn

#endif  // SYNCBN_PLUMBING_SHARED_FILE_H_
