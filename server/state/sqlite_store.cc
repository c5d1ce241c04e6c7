#include "server/state/sqlite_store.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "server/state/rows.h"
#include "server/state/sqlite.h"

namespace syncbn::state {
namespace {

constexpr int64_t kApplicationId = 0x53424e53;  // "SBNS"
// Time to wait for a predecessor that is about to end.
constexpr int kBusyMilliseconds = 1000;

constexpr char kCreateTables[] = R"(
  CREATE TABLE groups (
    job TEXT NOT NULL, name TEXT NOT NULL, generation INTEGER NOT NULL, run_id INTEGER NOT NULL,
    world_size INTEGER NOT NULL, config BLOB NOT NULL, checksum INTEGER NOT NULL,
    PRIMARY KEY (job, name)) WITHOUT ROWID;
  CREATE TABLE layers (
    job TEXT NOT NULL, group_name TEXT NOT NULL, name TEXT NOT NULL, spec BLOB NOT NULL, updates INTEGER NOT NULL,
    newest_sequence INTEGER NOT NULL, recent BLOB NOT NULL, missing_after INTEGER, missing_before INTEGER,
    mean BLOB NOT NULL, var BLOB NOT NULL, checksum INTEGER NOT NULL,
    PRIMARY KEY (job, group_name, name));
)";

// ---- Opening --------------------------------------------------------------------------------------------------------

absl::Status MakeDirectory(const std::string& directory) {
  const auto unusable = [&directory](absl::string_view why) {
    return absl::InvalidArgumentError(absl::StrCat("the state directory \"", directory, "\" cannot be used: ", why));
  };
  if (mkdir(directory.c_str(), 0700) == 0) return absl::OkStatus();
  if (errno != EEXIST) return unusable(std::strerror(errno));
  struct stat found = {};
  if (stat(directory.c_str(), &found) != 0) return unusable(std::strerror(errno));
  if (!S_ISDIR(found.st_mode)) return unusable("it is not a directory");
  // SQLite would call it an I/O error.
  return access(directory.c_str(), W_OK) == 0 ? absl::OkStatus() : unusable(std::strerror(errno));
}

// A file, whatever its path.
struct Identity {
  dev_t device = 0;
  ino_t inode = 0;
};

// Returns nothing if there is no file at the path.
std::optional<Identity> IdentityOf(const std::string& path) {
  struct stat found = {};
  if (stat(path.c_str(), &found) != 0) return std::nullopt;
  return Identity{found.st_dev, found.st_ino};
}

// SQLite would begin anew with a file that is shorter than its header.
absl::Status CheckSize(const std::string& file) {
  constexpr off_t kLeast = 512;
  struct stat found = {};
  if (stat(file.c_str(), &found) != 0 || found.st_size == 0 || found.st_size >= kLeast) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("it has ", found.st_size, " bytes"));
}

// Says what to do about a file that cannot be used.
absl::Status Explain(const absl::Status& status, const std::string& file) {
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
      return absl::UnavailableError(absl::StrCat("another master uses the state file \"", file, "\""));
    case absl::StatusCode::kDataLoss:
      return absl::DataLossError(absl::StrCat("the state file \"", file, "\" is damaged and stays as it is; move it ",
                                              "away to begin without it: ", status.message()));
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kInvalidArgument:
      return absl::Status(status.code(), absl::StrCat("the state file \"", file, "\" ", status.message()));
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("the state file \"", file, "\" cannot be used: ", status.message()));
  }
}

// Settings that change no file.
absl::Status Configure(sqlite3* database) {
  sqlite3_extended_result_codes(database, 1);
  sqlite3_busy_timeout(database, kBusyMilliseconds);
  // The file may be damaged, or another program's: nothing in it is run, and it is not written until it is accepted.
  sqlite3_db_config(database, SQLITE_DBCONFIG_DEFENSIVE, 1, nullptr);
  sqlite3_db_config(database, SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0, nullptr);
  sqlite3_db_config(database, SQLITE_DBCONFIG_ENABLE_TRIGGER, 0, nullptr);
  sqlite3_db_config(database, SQLITE_DBCONFIG_ENABLE_VIEW, 0, nullptr);
  sqlite3_db_config(database, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, nullptr);
  // Exclusive: the lock is kept between transactions, and no memory is shared with other processes.
  return Execute(database,
                 "PRAGMA locking_mode = EXCLUSIVE; PRAGMA cell_size_check = ON; PRAGMA mmap_size = 0; "
                 "PRAGMA synchronous = NORMAL;");
}

// Refuses a file that this version has not written. Returns whether it is new.
absl::StatusOr<bool> CheckVersion(sqlite3* database) {
  const auto tables = QueryNumber(database, "SELECT count(*) FROM sqlite_schema");
  if (!tables.ok()) return tables.status();
  const auto application = QueryNumber(database, "PRAGMA application_id");
  if (!application.ok()) return application.status();
  const auto version = QueryNumber(database, "PRAGMA user_version");
  if (!version.ok()) return version.status();
  if (*tables == 0 && *application == 0 && *version == 0) return true;
  if (*application != kApplicationId) return absl::InvalidArgumentError("belongs to another program");
  if (*version > kSchemaVersion) {
    return absl::FailedPreconditionError(absl::StrCat("was written by a newer version of syncbn-master (tables of ",
                                                      "version ", *version, "; this one reads ", kSchemaVersion,
                                                      ") and stays as it is"));
  }
  if (*version < 1) return absl::DataLossError(absl::StrCat("its tables have version ", *version));
  return false;
}

absl::Status CheckPages(sqlite3* database) {
  auto check = Statement::Prepare(database, "PRAGMA integrity_check(1)");
  if (!check.ok()) return check.status();
  const auto row = check->Step();
  if (!row.ok()) return row.status();
  if (*row && check->Text(0) == "ok") return absl::OkStatus();
  return absl::DataLossError(check->Text(0));
}

absl::Status CreateTables(sqlite3* database) {
  const std::string transaction =
      absl::StrCat("BEGIN EXCLUSIVE;", kCreateTables, "PRAGMA application_id = ", kApplicationId,
                   "; PRAGMA user_version = ", kSchemaVersion, "; COMMIT;");
  return Execute(database, transaction.c_str());
}

// Checks the file, and makes it one of this program if it is new.
absl::Status Prepare(sqlite3* database) {
  if (absl::Status status = Configure(database); !status.ok()) return status;
  const auto is_new = CheckVersion(database);
  if (!is_new.ok()) return is_new.status();
  if (!*is_new) {
    if (absl::Status status = CheckPages(database); !status.ok()) return status;
  }
  if (absl::Status status = Execute(database, "PRAGMA journal_mode = WAL"); !status.ok()) return status;
  if (*is_new) {
    if (absl::Status status = CreateTables(database); !status.ok()) return status;
  }
  // Takes the lock for good.
  return Execute(database, "BEGIN EXCLUSIVE; COMMIT;");
}

// ---- The store ------------------------------------------------------------------------------------------------------

class SqliteStore final : public Store {
 public:
  SqliteStore(Database database, const std::string& file)
      : database_(std::move(database)),
        file_{file, IdentityOf(file)},
        log_{absl::StrCat(file_.path, "-wal"), std::nullopt} {}

  absl::Status PrepareStatements() {
    for (const auto& [statement, sql] : {std::pair{&delete_group_, "DELETE FROM groups WHERE job = ? AND name = ?"},
                                         {&delete_layers_, "DELETE FROM layers WHERE job = ? AND group_name = ?"},
                                         {&put_group_, "REPLACE INTO groups VALUES (?, ?, ?, ?, ?, ?, ?)"},
                                         {&put_layer_, kPutLayer}}) {
      auto prepared = Statement::Prepare(database_.get(), sql);
      if (!prepared.ok()) return prepared.status();
      statement->emplace(*std::move(prepared));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<core::GroupState>> Load() override {
    std::map<core::GroupId, core::GroupState> groups;
    absl::Status status = LoadGroups(&groups);
    if (status.ok()) status = LoadLayers(&groups);
    if (!status.ok()) return Explain(status, file_.path);
    // It is ours, and in order. From here on a close tidies it.
    sqlite3_db_config(database_.get(), SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0, nullptr);
    std::vector<core::GroupState> loaded;
    loaded.reserve(groups.size());
    for (auto& [id, group] : groups) loaded.push_back(std::move(group));
    return loaded;
  }

  absl::Status Save(const core::StateChanges& changes) override {
    absl::Status status = Execute(database_.get(), "BEGIN IMMEDIATE");
    if (status.ok()) status = Write(changes);
    if (status.ok()) status = Execute(database_.get(), "COMMIT");
    // Some errors have ended the transaction already.
    if (!status.ok() && sqlite3_get_autocommit(database_.get()) == 0) {
      (void)Execute(database_.get(), "ROLLBACK");
    }
    if (status.ok()) status = CheckPlace(&file_);
    if (status.ok()) status = CheckPlace(&log_);
    return status;
  }

 private:
  struct Place {
    std::string path;
    std::optional<Identity> file;  // That is there; nothing before that is known.
  };

  // Returns an error if another file is there now, or none: what was stored is not where the next master looks for it.
  // SQLite does not notice.
  static absl::Status CheckPlace(Place* place) {
    const std::optional<Identity> found = IdentityOf(place->path);
    if (!place->file.has_value()) place->file = found;
    const bool same = found.has_value() && found->device == place->file->device && found->inode == place->file->inode;
    if (same) return absl::OkStatus();
    return absl::NotFoundError(absl::StrCat("\"", place->path, "\" was moved or removed while this master used it; ",
                                            "put it back, or restart the master, which begins a new file"));
  }

  // An update in place, so that the index of names stays as it is.
  static constexpr char kPutLayer[] =
      "INSERT INTO layers VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12) "
      "ON CONFLICT (job, group_name, name) DO UPDATE SET spec = ?4, updates = ?5, newest_sequence = ?6, recent = ?7, "
      "missing_after = ?8, missing_before = ?9, mean = ?10, var = ?11, checksum = ?12";

  // Calls `take` with each row, until it returns an error.
  template <typename Take>
  absl::Status ForEachRow(const char* query, const Take& take) {
    auto rows = Statement::Prepare(database_.get(), query);
    if (!rows.ok()) return rows.status();
    while (true) {
      const auto more = rows->Step();
      if (!more.ok()) return more.status();
      if (!*more) return absl::OkStatus();
      if (absl::Status status = take(*rows); !status.ok()) return status;
    }
  }

  absl::Status LoadGroups(std::map<core::GroupId, core::GroupState>* groups) {
    const auto take = [groups](Statement& found) -> absl::Status {
      GroupRow row;
      row.job = found.Text(0);
      row.name = found.Text(1);
      row.generation = found.Number(2);
      row.run_id = found.Number(3);
      row.world_size = found.Number(4);
      row.config = found.Blob(5);
      row.checksum = found.Number(6);
      auto group = FromRow(row);
      if (!group.ok()) return group.status();
      if (!groups->emplace(group->id, *group).second) return absl::DataLossError("a group is there twice");
      return absl::OkStatus();
    };
    return ForEachRow("SELECT job, name, generation, run_id, world_size, config, checksum FROM groups", take);
  }

  absl::Status LoadLayers(std::map<core::GroupId, core::GroupState>* groups) {
    const auto take = [groups](Statement& found) -> absl::Status {
      const auto number = [&found](int column) -> std::optional<uint64_t> {
        if (found.IsNull(column)) return std::nullopt;
        return found.Number(column);
      };
      LayerRow row;
      row.job = found.Text(0);
      row.group = found.Text(1);
      row.name = found.Text(2);
      row.spec = found.Blob(3);
      row.updates = found.Number(4);
      row.newest_sequence = found.Number(5);
      row.recent = found.Blob(6);
      row.missing_after = number(7);
      row.missing_before = number(8);
      row.mean = found.Blob(9);
      row.var = found.Blob(10);
      row.checksum = found.Number(11);
      auto layer = FromRow(row);
      if (!layer.ok()) return layer.status();
      const auto group = groups->find({row.job, row.group});
      if (group == groups->end()) return absl::DataLossError("a layer belongs to no group");
      std::vector<core::LayerState>& layers = group->second.layers;
      if (!layers.empty() && layers.back().spec.name == row.name) return absl::DataLossError("a layer is there twice");
      layers.push_back(*std::move(layer));
      return absl::OkStatus();
    };
    return ForEachRow(
        "SELECT job, group_name, name, spec, updates, newest_sequence, recent, missing_after, missing_before, mean, "
        "var, checksum FROM layers ORDER BY job, group_name, name",
        take);
  }

  absl::Status Write(const core::StateChanges& changes) {
    for (const core::GroupId& id : changes.ended) {
      for (auto* statement : {&delete_layers_, &delete_group_}) {
        (*statement)->BindText(1, id.job);
        (*statement)->BindText(2, id.group);
        if (absl::Status status = (*statement)->Run(); !status.ok()) return status;
      }
    }
    for (const core::GroupState& group : changes.groups) {
      if (absl::Status status = Put(ToRow(group)); !status.ok()) return status;
      for (const core::LayerState& layer : group.layers) {
        if (absl::Status status = Put(ToRow(group.id, layer)); !status.ok()) return status;
      }
    }
    return absl::OkStatus();
  }

  absl::Status Put(const GroupRow& row) {
    put_group_->BindText(1, row.job);
    put_group_->BindText(2, row.name);
    put_group_->BindNumber(3, row.generation);
    put_group_->BindNumber(4, row.run_id);
    put_group_->BindNumber(5, row.world_size);
    put_group_->BindBlob(6, row.config);
    put_group_->BindNumber(7, row.checksum);
    return put_group_->Run();
  }

  absl::Status Put(const LayerRow& row) {
    const auto bind_optional = [this](int parameter, const std::optional<uint64_t>& number) {
      if (number.has_value()) {
        put_layer_->BindNumber(parameter, *number);
      } else {
        put_layer_->BindNull(parameter);
      }
    };
    put_layer_->BindText(1, row.job);
    put_layer_->BindText(2, row.group);
    put_layer_->BindText(3, row.name);
    put_layer_->BindBlob(4, row.spec);
    put_layer_->BindNumber(5, row.updates);
    put_layer_->BindNumber(6, row.newest_sequence);
    put_layer_->BindBlob(7, row.recent);
    bind_optional(8, row.missing_after);
    bind_optional(9, row.missing_before);
    put_layer_->BindBlob(10, row.mean);
    put_layer_->BindBlob(11, row.var);
    put_layer_->BindNumber(12, row.checksum);
    return put_layer_->Run();
  }

  Database database_;  // Before the statements, which must be gone before it is closed.
  Place file_;
  Place log_;  // SQLite's, of what is not in the file yet.
  std::optional<Statement> delete_group_;
  std::optional<Statement> delete_layers_;
  std::optional<Statement> put_group_;
  std::optional<Statement> put_layer_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Store>> OpenSqliteStore(const std::string& directory, const std::string& vfs) {
  if (absl::Status status = MakeDirectory(directory); !status.ok()) return status;
  const std::string file = absl::StrCat(directory, "/state.db");
  if (absl::Status status = CheckSize(file); !status.ok()) return Explain(status, file);
  sqlite3* handle = nullptr;
  const int flags = SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX;
  const int result = sqlite3_open_v2(file.c_str(), &handle, flags, vfs.empty() ? nullptr : vfs.c_str());
  Database database(handle);
  absl::Status status = ToStatus(handle, result);
  if (status.ok()) status = Prepare(handle);
  if (!status.ok()) return Explain(status, file);
  auto store = std::make_unique<SqliteStore>(std::move(database), file);
  if (status = store->PrepareStatements(); !status.ok()) return Explain(status, file);
  return store;
}

}  // namespace syncbn::state
