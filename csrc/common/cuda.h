// What kernels are written against: CUDA under nvcc, and under g++ the simulator of the tests
// (tests/cpp/cuda_on_cpu), which runs the very same source on the CPU.
//
// Kernels use the CUDA names. Three things go through this header, so that the simulator can watch
// them: shared memory (INSTEMBED_SHARED(_VECTORS), DynamicShared, and SharedPtr<T> for what points
// into it), launches (launch(), and launch_together() for blocks that wait for each other by
// spin()), and what the host asks of a device.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(INSTEMBED_CUDA_ON_CPU)

#include "cuda_on_cpu/simulator.h"

#else

#include <cuda_runtime.h>

namespace instembed::cuda {

template <class T>
using SharedPtr = T*;

// An array of n elements, n a constant, that the threads of a block share.
#define INSTEMBED_SHARED(T, name, n) __shared__ T name[n]
// Elements that a thread reads side by side, at a multiple of 16 bytes, come by one load.
#define INSTEMBED_SHARED_VECTORS(T, name, n) __shared__ __align__(16) T name[n]

// Shared memory of the size that launch() was told, handed out in pieces: every thread takes the
// same pieces in the same order.
class DynamicShared {
 public:
  __device__ DynamicShared() {
    extern __shared__ __align__(16) unsigned char all[];
    next_ = all;
  }
  template <class T>
  __device__ T* take(int n) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += (n * sizeof(T) + 15) / 16 * 16;
    return piece;
  }

 private:
  unsigned char* next_;
};

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // the next launch asks for it, and is innocent
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

using Stream = cudaStream_t;

struct DeviceInfo {
  int processors = 0;  // multiprocessors
  int64_t cache = 0;   // bytes of the L2
  int64_t shared = 0;  // bytes of shared memory that one block may have
};

inline DeviceInfo device_info() {
  int device = 0, processors = 0, cache = 0, shared = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "processors");
  check(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device), "cache");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared");
  return {processors, cache, shared};
}

// A kernel has 48 KB of shared memory, INSTEMBED_SHARED and DynamicShared together, unless it is
// allowed more. It is allowed all there is, whatever this launch needs: the limit is the kernel's,
// and another host thread may set it before this one launches.
inline void allow_shared(const void* kernel, const char* name, int64_t bytes) {
  if (bytes == 0) return;
  cudaFuncAttributes found{};
  check(cudaFuncGetAttributes(&found, kernel), name);
  const auto fixed = static_cast<int64_t>(found.sharedSizeBytes);
  if (fixed + bytes <= 48 * 1024) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(device_info().shared - fixed)),
        name);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const char* name, int64_t blocks, int threads,
            int64_t shared_bytes, Stream stream, const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::length_error(std::string(name) + ": too many blocks");
  allow_shared(reinterpret_cast<const void*>(kernel), name, shared_bytes);
  // clang-format off
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  // clang-format on
  check(cudaGetLastError(), name);
}

// The most blocks of a kernel that the device runs at once.
template <class... Parameters>
int64_t most_together(void (*kernel)(Parameters...), const char* name, int threads,
                      int64_t shared_bytes) {
  allow_shared(reinterpret_cast<const void*>(kernel), name, shared_bytes);
  int device = 0, processors = 0, blocks = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), name);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes),
        name);
  return int64_t{blocks} * processors;
}

// Launches blocks that may wait for each other: all of them run at once, or none.
template <class... Parameters, class... Arguments>
void launch_together(void (*kernel)(Parameters...), const char* name, int64_t blocks, int threads,
                     int64_t shared_bytes, Stream stream, const Arguments&... arguments) {
  if (blocks == 0) return;
  allow_shared(reinterpret_cast<const void*>(kernel), name, shared_bytes);
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

// Between two looks at memory that another block of the launch will change.
__device__ __forceinline__ void spin() {}

inline void fill_bytes(void* data, int byte, int64_t bytes, Stream stream) {
  if (bytes > 0) check(cudaMemsetAsync(data, byte, bytes, stream), "cudaMemsetAsync");
}

inline int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace instembed::cuda

#endif

namespace instembed::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// What DynamicShared::take<T>(n) takes.
template <class T>
int64_t padded_bytes(int64_t n) {
  return (n * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
}

inline Stream as_stream(int64_t stream) { return reinterpret_cast<Stream>(stream); }

// In a fixed order; every lane gets the sum.
__device__ __forceinline__ double warp_sum(double value) {
  for (int other = kWarp / 2; other > 0; other /= 2)
    value += __shfl_xor_sync(kAllLanes, value, other);
  return value;
}

// Pieces of one block of device memory, each aligned to 256 bytes. With a null base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t n) {
    const int64_t at = used_;
    used_ += (n * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace instembed::cuda
