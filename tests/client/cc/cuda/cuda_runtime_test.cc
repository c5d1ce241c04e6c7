// CUDA's runtime as passes use it, compiled against a stand-in for CUDA that records which devices get a context, and
// which calls another thread's capture of a graph would have forbidden.

#include "client/cc/cuda_runtime.cu"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <set>
#include <string>

#include "absl/status/status.h"
#include "client/cc/device_memory.h"
#include "client/cc/device_runtime.h"
#include "kernels/batch_norm.h"

namespace syncbn::testing {
namespace {

using host_cuda::DriverState;
using Devices = std::set<int>;

class CudaRuntimeTest : public ::testing::Test {
 protected:
  void SetUp() override { DriverState::Get() = DriverState(); }

  DeviceRuntime& runtime_ = *CudaRuntime();
};

TEST_F(CudaRuntimeTest, LookingForTheCurrentDeviceUsesNone) {
  int device = -1;
  EXPECT_EQ(runtime_.CurrentDevice(&device), DeviceRuntime::kSuccess);
  EXPECT_EQ(device, 0);
  EXPECT_EQ(DriverState::Get().contexts, Devices());
}

TEST_F(CudaRuntimeTest, AScopeGivesAContextToItsOwnDeviceAlone) {
  {
    const DeviceScope scope(&runtime_, 1);
    ASSERT_TRUE(scope.status().ok()) << scope.status();
    void* memory = nullptr;
    EXPECT_EQ(runtime_.AllocateDevice(64, &memory), DeviceRuntime::kSuccess);
    runtime_.FreeDevice(memory);
  }
  EXPECT_EQ(DriverState::Get().current(), 0);
  EXPECT_EQ(DriverState::Get().contexts, Devices({1}));
}

TEST_F(CudaRuntimeTest, ScopesWithinScopes) {
  const DeviceScope scope(&runtime_, 1);
  int device = -1;
  EXPECT_EQ(runtime_.CurrentDevice(&device), DeviceRuntime::kSuccess);
  EXPECT_EQ(device, 1);
  {
    const DeviceScope within(&runtime_, 0);
    EXPECT_EQ(DriverState::Get().current(), 0);
  }
  EXPECT_EQ(DriverState::Get().current(), 1);
}

TEST_F(CudaRuntimeTest, AScopeOfTheCurrentDeviceChangesNothing) {
  cudaSetDevice(1);
  const DeviceScope scope(&runtime_, 1);
  EXPECT_TRUE(scope.status().ok());
  EXPECT_TRUE(DriverState::Get().pushed.empty());
  EXPECT_EQ(DriverState::Get().contexts, Devices({1}));
}

TEST_F(CudaRuntimeTest, AScopeOfNoDeviceSaysSo) {
  {
    const DeviceScope scope(&runtime_, 7);
    EXPECT_EQ(scope.status().code(), absl::StatusCode::kFailedPrecondition);
  }
  EXPECT_TRUE(DriverState::Get().pushed.empty());
  EXPECT_EQ(DriverState::Get().contexts, Devices());
}

// A slot is got, grown and given back, errors are looked for, and streams are tried: all beside another thread's
// capture.
TEST_F(CudaRuntimeTest, NoCallSpoilsACaptureByAnotherThread) {
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  DriverState::Get().unsafe.clear();
  EXPECT_TRUE(PrepareStreamOrder(&runtime_, 0).ok());
  EXPECT_EQ(runtime_.StreamState(stream), DeviceRuntime::kSuccess);
  {
    StreamMemory memory(&runtime_, 0, stream);
    const auto slot = memory.Take(100);
    ASSERT_TRUE(slot.ok()) << slot.status();
    memory.Return(*slot);
    for (const int64_t batch : {1, 4096}) {
      kernels::TensorShape shape;
      shape.batch = batch;
      shape.channels = 3;
      shape.spatial = 49;
      EXPECT_TRUE(memory
                      .Reduce(
                          shape, [](kernels::cuda::Context*) { return DeviceRuntime::kSuccess; }, "none")
                      .ok());
    }
  }
  EXPECT_EQ(DriverState::Get().unsafe, std::set<std::string>());
  EXPECT_EQ(DriverState::Get().capture_mode, cudaStreamCaptureModeGlobal);
  cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace syncbn::testing
