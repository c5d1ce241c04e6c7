// A master's state in a file of SQLite.

#ifndef SYNCBN_SERVER_STATE_SQLITE_STORE_H_
#define SYNCBN_SERVER_STATE_SQLITE_STORE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/state/store.h"

namespace syncbn::state {

// The version of the tables. A file of a greater one is refused.
inline constexpr int kSchemaVersion = 1;

// Opens the file "state.db" in `directory`, which is made if only its last part does not exist. The file is locked
// until the store is destroyed, by a lock of the process's that a forked child does not have.
//
// SQLite's write-ahead log is used: a process may be killed, and a machine may lose its power, at any time. What Save
// has stored survives the former. After the latter the newest transactions may be gone.
//
// `vfs` is the name of a registered file system of SQLite's; the default if empty.
//
// Errors: INVALID_ARGUMENT (the directory cannot be used, or the file belongs to another program);
// UNAVAILABLE (another master uses it); DATA_LOSS (the file is damaged); FAILED_PRECONDITION (a newer version has
// written it). The file then stays as it is. Each text names the directory or the file.
absl::StatusOr<std::unique_ptr<Store>> OpenSqliteStore(const std::string& directory, const std::string& vfs = "");

}  // namespace syncbn::state

#endif  // SYNCBN_SERVER_STATE_SQLITE_STORE_H_
