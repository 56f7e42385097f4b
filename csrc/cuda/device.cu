// The driver and the devices, as the door sees them (device.h).
#include <cuda_runtime.h>

#include "cuda/device.h"

namespace tokenflow_ext {

constexpr int kOldest = 80;  // compute capability 8.0, the first with cp.async

const char* device_problem(int device) noexcept {
  int driver = 0, runtime = 0, major = 0, minor = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return "tokenflow_ext: CUDA: wanted a driver of NVIDIA, got none";
  // A newer minor release runs on the driver of its major release: CUDA 13 wants 580 or newer, CUDA 12 wants 525.
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess || driver / 1000 < runtime / 1000)
    return runtime / 1000 >= 13
               ? "tokenflow_ext: CUDA: wanted a driver of CUDA 13, 580 or newer, got an older one; "
                 "update it or build with an older nvcc"
               : "tokenflow_ext: CUDA: wanted a driver as new as the nvcc that built the kernels, got an older one";
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return "tokenflow_ext: CUDA: wanted the ordinal of a device, got another number";
  if (10 * major + minor < kOldest)
    return "tokenflow_ext: CUDA: wanted a device of compute capability 8.0 or newer, got an older one";
  return nullptr;
}

}  // namespace tokenflow_ext
