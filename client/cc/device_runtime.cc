#include "client/cc/device_runtime.h"

#include <atomic>

namespace syncbn {
namespace {

std::atomic<DeviceRuntime*> g_runtime_of_test{nullptr};

}  // namespace

DeviceRuntime* DeviceRuntime::Get() {
  DeviceRuntime* const of_test = g_runtime_of_test.load();
  return of_test != nullptr ? of_test : CudaRuntime();
}

void DeviceRuntime::SetForTesting(DeviceRuntime* runtime) { g_runtime_of_test.store(runtime); }

}  // namespace syncbn
