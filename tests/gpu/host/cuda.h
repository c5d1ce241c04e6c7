// Types of CUDA's driver interface, and a stand-in for the part of the driver that cuda_runtime.h and its users need.
// It records what a program does with devices and captures, for tests to read.

#ifndef SYNCBN_TESTS_GPU_HOST_CUDA_H_
#define SYNCBN_TESTS_GPU_HOST_CUDA_H_

#include <cstdint>
#include <set>
#include <string>
#include <vector>

struct CUstream_st;
struct CUctx_st;
using CUstream = CUstream_st*;
using CUcontext = CUctx_st*;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using cuuint32_t = uint32_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_DEVICE = 101, CUDA_ERROR_INVALID_CONTEXT = 201 };
enum CUdevice_attribute { CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS = 92 };
enum { CU_STREAM_WAIT_VALUE_GEQ = 0 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeRelaxed = 2 };

namespace syncbn::testing::host_cuda {

// The state of the one thread that a test of the driver has, and of the process.
//
// Thread safety: none of its own. Programs with several threads use one device and capture nothing.
struct DriverState {
  static constexpr int kDevices = 2;

  int set_device = 0;            // By cudaSetDevice.
  std::vector<int> pushed;       // The devices of the contexts that have been pushed.
  std::set<int> contexts;        // Devices that something has used, and that have a context since.
  std::set<std::string> unsafe;  // Calls that would have spoiled a capture by another thread.
  cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

  int current() const { return pushed.empty() ? set_device : pushed.back(); }
  // A call that needs a context.
  void Use() { contexts.insert(current()); }
  // One that a capture in the global mode forbids to every thread whose own mode is not relaxed.
  void UseUnsafely(const char* name) {
    Use();
    if (capture_mode != cudaStreamCaptureModeRelaxed) unsafe.insert(name);
  }
  static DriverState& Get() {
    static thread_local DriverState state;
    return state;
  }
};

inline CUresult DevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  if (device < 0 || device >= DriverState::kDevices) return CUDA_ERROR_INVALID_DEVICE;
  DriverState::Get().contexts.insert(device);
  *context = reinterpret_cast<CUcontext>(static_cast<uintptr_t>(device + 1));  // A number, no memory.
  return CUDA_SUCCESS;
}
inline CUresult CtxPushCurrent(CUcontext context) {
  DriverState::Get().pushed.push_back(static_cast<int>(reinterpret_cast<uintptr_t>(context)) - 1);
  return CUDA_SUCCESS;
}
inline CUresult CtxPopCurrent(CUcontext*) {
  DriverState& state = DriverState::Get();
  if (state.pushed.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  state.pushed.pop_back();
  return CUDA_SUCCESS;
}
inline CUresult CtxGetDevice(CUdevice* device) {
  const DriverState& state = DriverState::Get();
  if (state.pushed.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *device = state.pushed.back();
  return CUDA_SUCCESS;
}
inline CUresult DeviceGetAttribute(int* value, CUdevice_attribute, CUdevice) {
  *value = 1;
  return CUDA_SUCCESS;
}

}  // namespace syncbn::testing::host_cuda

#endif  // SYNCBN_TESTS_GPU_HOST_CUDA_H_
