// The runtime of a build without CUDA: none.

#include "client/cc/device_runtime.h"

namespace syncbn {

DeviceRuntime* CudaRuntime() { return nullptr; }

}  // namespace syncbn
