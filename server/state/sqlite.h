// SQLite's interface as far as the store needs it, with statuses and owners.

#ifndef SYNCBN_SERVER_STATE_SQLITE_H_
#define SYNCBN_SERVER_STATE_SQLITE_H_

#include <sqlite3.h>

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace syncbn::state {

struct CloseDatabase {
  void operator()(sqlite3* database) const { sqlite3_close(database); }
};
struct FinalizeStatement {
  void operator()(sqlite3_stmt* statement) const { sqlite3_finalize(statement); }
};
using Database = std::unique_ptr<sqlite3, CloseDatabase>;

// Returns the status of a result: OK for SQLITE_OK, ROW and DONE; DATA_LOSS for a damaged file; UNAVAILABLE for one
// that another process has locked; RESOURCE_EXHAUSTED for a full disk; otherwise INTERNAL. The text is SQLite's.
absl::Status ToStatus(sqlite3* database, int result);

// Runs one statement that returns no rows.
absl::Status Execute(sqlite3* database, const char* sql);
// Returns the number that a statement returns in its first column.
absl::StatusOr<int64_t> QueryNumber(sqlite3* database, const char* sql);

// A prepared statement. Columns and parameters are numbered as SQLite does: from 0, and from 1.
class Statement {
 public:
  static absl::StatusOr<Statement> Prepare(sqlite3* database, const char* sql);

  // Texts and blobs must stay until Run or Step has returned.
  void BindText(int parameter, absl::string_view text);
  void BindBlob(int parameter, absl::string_view bytes);
  void BindNumber(int parameter, uint64_t number);
  void BindNull(int parameter) { sqlite3_bind_null(statement_.get(), parameter); }

  // Runs a statement that returns no rows. It may be bound and run again.
  absl::Status Run();
  // Returns whether there is another row.
  absl::StatusOr<bool> Step();

  // Columns of the row.
  std::string Text(int column);
  std::string Blob(int column);
  uint64_t Number(int column) { return static_cast<uint64_t>(sqlite3_column_int64(statement_.get(), column)); }
  bool IsNull(int column) { return sqlite3_column_type(statement_.get(), column) == SQLITE_NULL; }

 private:
  explicit Statement(sqlite3_stmt* statement) : statement_(statement) {}

  std::unique_ptr<sqlite3_stmt, FinalizeStatement> statement_;
};

}  // namespace syncbn::state

#endif  // SYNCBN_SERVER_STATE_SQLITE_H_
