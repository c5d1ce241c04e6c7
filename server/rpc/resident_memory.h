// The memory that this process takes from the system.

#ifndef SYNCBN_SERVER_RPC_RESIDENT_MEMORY_H_
#define SYNCBN_SERVER_RPC_RESIDENT_MEMORY_H_

#include <cstddef>

namespace syncbn::rpc {

// Reads the size by one call of the system, which takes a microsecond or two.
//
// Thread safety: const methods from any thread.
class ResidentMemory {
 public:
  ResidentMemory();
  ~ResidentMemory();
  ResidentMemory(const ResidentMemory&) = delete;
  ResidentMemory& operator=(const ResidentMemory&) = delete;

  // Returns the bytes of memory that are resident now; 0 if the system does not tell, as where /proc is not mounted.
  size_t bytes() const;

 private:
  const int statm_;
  const size_t page_bytes_;
};

}  // namespace syncbn::rpc

#endif  // SYNCBN_SERVER_RPC_RESIDENT_MEMORY_H_
