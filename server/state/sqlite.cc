#include "server/state/sqlite.h"

#include "absl/strings/str_cat.h"
#include "plumbing/check.h"

namespace syncbn::state {
namespace {

absl::StatusCode CodeOf(int result) {
  switch (result & 0xff) {
    case SQLITE_OK:
    case SQLITE_ROW:
    case SQLITE_DONE:
      return absl::StatusCode::kOk;
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
    case SQLITE_ERROR:  // Tables or columns that are not there, and texts of theirs that cannot be parsed.
    case SQLITE_TOOBIG:
      return absl::StatusCode::kDataLoss;
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
      return absl::StatusCode::kUnavailable;
    case SQLITE_FULL:
      return absl::StatusCode::kResourceExhausted;
    default:
      return absl::StatusCode::kInternal;
  }
}

}  // namespace

absl::Status ToStatus(sqlite3* database, int result) {
  const absl::StatusCode code = CodeOf(result);
  if (code == absl::StatusCode::kOk) return absl::OkStatus();
  return absl::Status(code, absl::StrCat(sqlite3_errmsg(database), " (SQLite ", result, ")"));
}

absl::Status Execute(sqlite3* database, const char* sql) {
  return ToStatus(database, sqlite3_exec(database, sql, nullptr, nullptr, nullptr));
}

absl::StatusOr<int64_t> QueryNumber(sqlite3* database, const char* sql) {
  auto statement = Statement::Prepare(database, sql);
  if (!statement.ok()) return statement.status();
  const auto row = statement->Step();
  if (!row.ok()) return row.status();
  return *row ? static_cast<int64_t>(statement->Number(0)) : 0;
}

absl::StatusOr<Statement> Statement::Prepare(sqlite3* database, const char* sql) {
  sqlite3_stmt* statement = nullptr;
  const int result = sqlite3_prepare_v3(database, sql, -1, SQLITE_PREPARE_PERSISTENT, &statement, nullptr);
  if (absl::Status status = ToStatus(database, result); !status.ok()) return status;
  return Statement(statement);
}

void Statement::BindText(int parameter, absl::string_view text) {
  const char* const data = text.data() == nullptr ? "" : text.data();
  const int result = sqlite3_bind_text64(statement_.get(), parameter, data, text.size(), SQLITE_STATIC, SQLITE_UTF8);
  SYNCBN_CHECK(result == SQLITE_OK, "parameter ", parameter, ", ", text.size(), " bytes: ", result);
}

void Statement::BindBlob(int parameter, absl::string_view bytes) {
  const char* const data = bytes.data() == nullptr ? "" : bytes.data();
  const int result = sqlite3_bind_blob64(statement_.get(), parameter, data, bytes.size(), SQLITE_STATIC);
  SYNCBN_CHECK(result == SQLITE_OK, "parameter ", parameter, ", ", bytes.size(), " bytes: ", result);
}

void Statement::BindNumber(int parameter, uint64_t number) {
  const int result = sqlite3_bind_int64(statement_.get(), parameter, static_cast<sqlite3_int64>(number));
  SYNCBN_CHECK(result == SQLITE_OK, "parameter ", parameter, ": ", result);
}

absl::Status Statement::Run() {
  const int result = sqlite3_step(statement_.get());
  const absl::Status status = ToStatus(sqlite3_db_handle(statement_.get()), result);
  sqlite3_reset(statement_.get());
  return status;
}

absl::StatusOr<bool> Statement::Step() {
  const int result = sqlite3_step(statement_.get());
  if (absl::Status status = ToStatus(sqlite3_db_handle(statement_.get()), result); !status.ok()) return status;
  return result == SQLITE_ROW;
}

std::string Statement::Text(int column) {
  const auto* const text = reinterpret_cast<const char*>(sqlite3_column_text(statement_.get(), column));
  return text == nullptr ? "" : std::string(text, sqlite3_column_bytes(statement_.get(), column));
}

std::string Statement::Blob(int column) {
  const auto* const blob = static_cast<const char*>(sqlite3_column_blob(statement_.get(), column));
  return blob == nullptr ? "" : std::string(blob, sqlite3_column_bytes(statement_.get(), column));
}

}  // namespace syncbn::state
