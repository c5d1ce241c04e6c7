#include "tests/server/state/fault_vfs.h"

#include <sqlite3.h>

#include <new>

namespace syncbn::testing {
namespace {

// One thread at a time uses it.
Fault fault = Fault::kNone;
int64_t good_calls = 0;
int64_t calls = 0;

// Counts a call, and returns whether the fault holds for it.
bool Fails() { return ++calls > good_calls && fault != Fault::kNone; }

int ErrorOf(int io_error) { return fault == Fault::kFull ? SQLITE_FULL : io_error; }

// A file of ours, followed by the file of the system beneath.
struct File {
  sqlite3_file base;
  sqlite3_file* real() { return reinterpret_cast<sqlite3_file*>(this + 1); }
};

sqlite3_file* Real(sqlite3_file* file) { return reinterpret_cast<File*>(file)->real(); }

int Write(sqlite3_file* file, const void* data, int size, sqlite3_int64 offset) {
  if (!Fails()) return Real(file)->pMethods->xWrite(Real(file), data, size, offset);
  if (fault == Fault::kDead) return SQLITE_OK;
  Real(file)->pMethods->xWrite(Real(file), data, size / 2, offset);
  return ErrorOf(SQLITE_IOERR_WRITE);
}

int Truncate(sqlite3_file* file, sqlite3_int64 size) {
  if (!Fails()) return Real(file)->pMethods->xTruncate(Real(file), size);
  return fault == Fault::kDead ? SQLITE_OK : ErrorOf(SQLITE_IOERR_TRUNCATE);
}

int Sync(sqlite3_file* file, int flags) {
  if (!Fails()) return Real(file)->pMethods->xSync(Real(file), flags);
  return fault == Fault::kDead ? SQLITE_OK : ErrorOf(SQLITE_IOERR_FSYNC);
}

int Close(sqlite3_file* file) {
  return Real(file)->pMethods == nullptr ? SQLITE_OK : Real(file)->pMethods->xClose(Real(file));
}
int Read(sqlite3_file* file, void* data, int size, sqlite3_int64 offset) {
  return Real(file)->pMethods->xRead(Real(file), data, size, offset);
}
int FileSize(sqlite3_file* file, sqlite3_int64* size) { return Real(file)->pMethods->xFileSize(Real(file), size); }
int Lock(sqlite3_file* file, int level) { return Real(file)->pMethods->xLock(Real(file), level); }
int Unlock(sqlite3_file* file, int level) { return Real(file)->pMethods->xUnlock(Real(file), level); }
int CheckReservedLock(sqlite3_file* file, int* held) {
  return Real(file)->pMethods->xCheckReservedLock(Real(file), held);
}
// Some of these change the file's size.
int FileControl(sqlite3_file*, int, void*) { return SQLITE_NOTFOUND; }
int SectorSize(sqlite3_file* file) { return Real(file)->pMethods->xSectorSize(Real(file)); }
int Characteristics(sqlite3_file* file) { return Real(file)->pMethods->xDeviceCharacteristics(Real(file)); }

// Version 1 has no shared memory, which an exclusively locked file does not need.
const sqlite3_io_methods kMethods = {1,
                                     Close,
                                     Read,
                                     Write,
                                     Truncate,
                                     Sync,
                                     FileSize,
                                     Lock,
                                     Unlock,
                                     CheckReservedLock,
                                     FileControl,
                                     SectorSize,
                                     Characteristics,
                                     nullptr,
                                     nullptr,
                                     nullptr,
                                     nullptr,
                                     nullptr,
                                     nullptr};

int Open(sqlite3_vfs* vfs, const char* name, sqlite3_file* file, int flags, int* out_flags) {
  auto* const system = static_cast<sqlite3_vfs*>(vfs->pAppData);
  auto* const mine = new (file) File();
  const int result = system->xOpen(system, name, mine->real(), flags, out_flags);
  mine->base.pMethods = result == SQLITE_OK ? &kMethods : nullptr;
  return result;
}

int Delete(sqlite3_vfs* vfs, const char* name, int sync) {
  auto* const system = static_cast<sqlite3_vfs*>(vfs->pAppData);
  if (!Fails()) return system->xDelete(system, name, sync);
  return fault == Fault::kDead ? SQLITE_OK : ErrorOf(SQLITE_IOERR_DELETE);
}

}  // namespace

std::string FaultVfs() {
  static sqlite3_vfs* const registered = [] {
    sqlite3_vfs* const system = sqlite3_vfs_find(nullptr);
    auto* const vfs = new sqlite3_vfs(*system);
    vfs->zName = "syncbn-fault";
    vfs->szOsFile = static_cast<int>(sizeof(File)) + system->szOsFile;
    vfs->pAppData = system;
    vfs->xOpen = Open;
    vfs->xDelete = Delete;
    sqlite3_vfs_register(vfs, /*makeDflt=*/0);
    return vfs;
  }();
  return registered->zName;
}

void SetFault(Fault new_fault, int64_t new_good_calls) {
  fault = new_fault;
  good_calls = new_good_calls;
  calls = 0;
}

int64_t FaultCalls() { return calls; }

}  // namespace syncbn::testing
