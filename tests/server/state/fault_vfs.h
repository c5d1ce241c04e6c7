// A file system for SQLite whose disk fails when a test wants it to.

#ifndef SYNCBN_TESTS_SERVER_STATE_FAULT_VFS_H_
#define SYNCBN_TESTS_SERVER_STATE_FAULT_VFS_H_

#include <cstdint>
#include <string>

namespace syncbn::testing {

// Faults of calls that change files: writes, truncations, syncs, and deletions.
enum class Fault {
  kNone,
  kFull,    // They fail with "disk full"; a write has written half.
  kBroken,  // They fail with an input/output error; a write has written half.
  kDead,    // They do nothing and say that they did, as if the process had been killed before.
};

// Registers the file system, once, and returns its name. There is one for the process.
std::string FaultVfs();
// The calls that follow do well `calls` times; then the fault holds until the next SetFault.
void SetFault(Fault fault, int64_t calls = 0);
// The number of calls since the last SetFault.
int64_t FaultCalls();

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_SERVER_STATE_FAULT_VFS_H_
