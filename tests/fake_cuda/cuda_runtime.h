// A CUDA runtime without a GPU, for what the host says to it: the calls that csrc/cuda may make, each told on standard
// output, and no other: whatever waits, copies or allocates does not compile. Kernels run on the emulator.
//   FAKE_CUDA_FAIL=name  that call returns an error
//   FAKE_CUDA_DRIVER, FAKE_CUDA_RUNTIME, FAKE_CUDA_DEVICES, FAKE_CUDA_CAPABILITY  what there is: 13000 13000 8 80
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>

enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice, cudaErrorLaunchFailure };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

namespace fake_cuda {

struct State {
  int device = 0;                 // current
  const char* failure = nullptr;  // of the last launch
};
inline State& state() {
  static State one;
  return one;
}

inline int known(const char* name, int otherwise) {
  const char* const given = std::getenv(name);
  return given ? std::atoi(given) : otherwise;
}

// Tells of a call; whether it is the one that fails.
template <class... A>
inline cudaError_t told(const char* name, const char* format, A... args) {
  std::printf("api %s ", name);
  std::printf(format, args...);
  std::printf("\n");
  const char* const failing = std::getenv("FAKE_CUDA_FAIL");
  return failing && std::strcmp(failing, name) == 0 ? cudaErrorLaunchFailure : cudaSuccess;
}

#if defined(TOKENFLOW_EMULATED)
// kernel<<<grid, block, shared, stream>>>(args...)
template <class... P>
inline void launched(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, P... args) {
  const cudaError_t error = told("launch", "device %d stream %p kernel %p shared %zu", state().device, stream,
                                 reinterpret_cast<const void*>(kernel), shared);
  state().failure = error ? "cudaErrorLaunchFailure" : cuda_emulator::launch(kernel, grid, block, shared, args...);
}
#endif

}  // namespace fake_cuda

inline cudaError_t cudaGetDevice(int* device) {
  *device = fake_cuda::state().device;
  return fake_cuda::told("cudaGetDevice", "%d", *device);
}

inline cudaError_t cudaSetDevice(int device) {
  const cudaError_t error = fake_cuda::told("cudaSetDevice", "%d", device);
  if (error == cudaSuccess) fake_cuda::state().device = device;
  return error;
}

inline cudaError_t cudaGetLastError() {
  const bool failed = fake_cuda::state().failure != nullptr;
  return failed ? cudaErrorLaunchFailure : fake_cuda::told("cudaGetLastError", "");
}

inline const char* cudaGetErrorName(cudaError_t error) {
  if (fake_cuda::state().failure) return fake_cuda::state().failure;
  return error == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaErrorLaunchFailure";
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  return fake_cuda::told("cudaFuncSetAttribute", "device %d kernel %p shared %d", fake_cuda::state().device, kernel,
                         bytes);
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int device) {
  const int capability = fake_cuda::known("FAKE_CUDA_CAPABILITY", 80);
  *value = what == cudaDevAttrMultiProcessorCount      ? 4
           : what == cudaDevAttrComputeCapabilityMajor ? capability / 10
                                                       : capability % 10;
  if (device < 0 || device >= fake_cuda::known("FAKE_CUDA_DEVICES", 8)) return cudaErrorInvalidDevice;
  return fake_cuda::told("cudaDeviceGetAttribute", "%d of device %d", static_cast<int>(what), device);
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = fake_cuda::known("FAKE_CUDA_DRIVER", 13000);
  return fake_cuda::told("cudaDriverGetVersion", "");
}

inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = fake_cuda::known("FAKE_CUDA_RUNTIME", 13000);
  return fake_cuda::told("cudaRuntimeGetVersion", "");
}
