// CUDA on the CPU, for tests: the names that csrc/common/cuda.h gives kernels, with every access to
// shared memory watched.
//
// One fiber a thread; the blocks of a grid one after the other in a random order, those of a
// cooperative launch side by side, a random one of them at a time; within a block
// the next thread to run is drawn at random whenever one waits at a barrier or in a warp operation.
// Blocks that all wait for each other, a barrier that not every thread reaches, threads that wait
// at different barriers, a warp operation that a lane of its mask does not reach, a shuffle from a
// lane outside the mask, and, in shared memory, an index out of bounds, a read of what nobody
// wrote, and two threads at one element without a barrier or warp operation between them stop the
// program and name the thread.
//
// What it cannot see: most races in global memory, since threads only switch at barriers (out of
// bounds there is what AddressSanitizer is for), a missing fence, and speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

struct Dim {
  unsigned x = 0, y = 0, z = 0;
};

namespace instembed::cuda {

using Stream = void*;

namespace simulator {

// The state of the thread that runs.
inline Dim thread_index, block_index, block_dim, grid_dim;

[[noreturn]] void fail(const std::string& what);

struct Options {
  uint64_t seed = 0;           // of the schedule
  int64_t resident = 3;        // blocks that run side by side
  int64_t shared = 64 * 1024;  // bytes that a block may have
};
inline Options options;

// Barriers and warp operations of the last launch: how much a kernel did, without a clock.
inline int64_t operations = 0;

void run(int64_t blocks, int threads, int64_t shared_bytes, bool cooperative,
         const std::function<void()>& kernel);

void spin();
void barrier(const char* file, int line);
int barrier_count(bool value, const char* file, int line);

// A warp operation: every lane of `mask` brings a value. What a lane gets: the value of lane
// `source`, if that is in the mask, and the lanes whose value is not 0.
struct Given {
  uint64_t value = 0;
  unsigned votes = 0;
};
Given warp(unsigned mask, const char* operation, uint64_t value, int source = 0);
int lane();

// What is known of one element of shared memory.
struct Shadow {
  bool written = false;
  bool atomic = false;               // written so, last
  int16_t writer = -1, reader = -1;  // threads; -2 for several
  int16_t reader_warp = -1;
  int32_t write_epoch = -1, read_epoch = -1;  // barriers that the thread had passed
  int32_t write_step = -1, read_step = -1;    // warp operations that it had passed
};

struct Array {
  std::string name;
  int64_t size = 0;
  std::vector<unsigned char> bytes;
  std::vector<Shadow> shadows;
};

// The array of the block that runs which `key` stands for; the first thread to ask makes it.
Array* shared_array(const void* key, const char* name, int64_t n, int64_t element);
Array* dynamic_array(int64_t offset, int64_t n, int64_t element);

void on_read(Array* array, int64_t index);
void on_write(Array* array, int64_t index);
void on_atomic(Array* array, int64_t index);

}  // namespace simulator

// One element of shared memory.
template <class T>
class SharedRef {
 public:
  SharedRef(simulator::Array* array, int64_t index) : array_(array), index_(index) {}
  operator T() const {
    simulator::on_read(array_, index_);
    T value;
    std::memcpy(&value, array_->bytes.data() + index_ * sizeof(T), sizeof(T));
    return value;
  }
  const SharedRef& operator=(T value) const {
    simulator::on_write(array_, index_);
    std::memcpy(array_->bytes.data() + index_ * sizeof(T), &value, sizeof(T));
    return *this;
  }
  const SharedRef& operator=(const SharedRef& other) const { return *this = static_cast<T>(other); }
  const SharedRef& operator+=(T value) const {
    return *this = static_cast<T>(static_cast<T>(*this) + value);
  }

 private:
  simulator::Array* array_;
  int64_t index_;
};

template <class T>
class SharedPtr {
 public:
  SharedPtr() = default;
  SharedPtr(simulator::Array* array, int64_t offset) : array_(array), offset_(offset) {}
  SharedRef<T> operator[](int64_t i) const { return {array_, offset_ + i}; }
  SharedPtr operator+(int64_t i) const { return {array_, offset_ + i}; }
  T atomic_add(T value) const {
    simulator::on_atomic(array_, offset_);
    T before;
    unsigned char* at = array_->bytes.data() + offset_ * sizeof(T);
    std::memcpy(&before, at, sizeof(T));
    value = static_cast<T>(before + value);
    std::memcpy(at, &value, sizeof(T));
    return before;
  }

 private:
  simulator::Array* array_ = nullptr;
  int64_t offset_ = 0;
};

#define INSTEMBED_SHARED(T, name, n)          \
  static const char name##_key = 0;           \
  const ::instembed::cuda::SharedPtr<T> name( \
      ::instembed::cuda::simulator::shared_array(&name##_key, #name, n, sizeof(T)), 0)
#define INSTEMBED_SHARED_VECTORS(T, name, n) INSTEMBED_SHARED(T, name, n)

class DynamicShared {
 public:
  template <class T>
  SharedPtr<T> take(int n) {
    SharedPtr<T> piece(simulator::dynamic_array(next_, n, sizeof(T)), 0);
    next_ += (n * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return piece;
  }

 private:
  int64_t next_ = 0;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const char*, int64_t blocks, int threads,
            int64_t shared_bytes, Stream, const Arguments&... arguments) {
  simulator::run(blocks, threads, shared_bytes, false, [&] { kernel(arguments...); });
}

template <class... Parameters, class... Arguments>
void launch_together(void (*kernel)(Parameters...), const char*, int64_t blocks, int threads,
                     int64_t shared_bytes, Stream, const Arguments&... arguments) {
  simulator::run(blocks, threads, shared_bytes, true, [&] { kernel(arguments...); });
}

template <class... Parameters>
int64_t most_together(void (*)(Parameters...), const char*, int, int64_t) {
  return simulator::options.resident;
}

inline void spin() { simulator::spin(); }

inline void fill_bytes(void* data, int byte, int64_t bytes, Stream) {
  if (bytes > 0) std::memset(data, byte, bytes);
}

struct DeviceInfo {
  int processors = 0;
  int64_t cache = 0;
  int64_t shared = 0;
};

// A small device, so that small images make several blocks and several groups of images.
inline DeviceInfo device_info() { return {2, 1 << 16, simulator::options.shared}; }
inline int device_count() { return 0; }

namespace simulator {

template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  static_assert(sizeof(T) <= 8);
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffle(unsigned mask, T value, int source, const char* operation) {
  const Given given = warp(mask, operation, to_bits(value), source);
  if (!(mask >> source & 1)) {
    fail(std::string(operation) + ": reads lane " + std::to_string(source) +
         ", which is not in the mask");
  }
  return from_bits<T>(given.value);
}

}  // namespace simulator
}  // namespace instembed::cuda

#define threadIdx ::instembed::cuda::simulator::thread_index
#define blockIdx ::instembed::cuda::simulator::block_index
#define blockDim ::instembed::cuda::simulator::block_dim
#define gridDim ::instembed::cuda::simulator::grid_dim

#define __syncthreads() ::instembed::cuda::simulator::barrier(__FILE__, __LINE__)
#define __syncthreads_count(value) \
  ::instembed::cuda::simulator::barrier_count((value) != 0, __FILE__, __LINE__)
#define __syncthreads_or(value) \
  (::instembed::cuda::simulator::barrier_count((value) != 0, __FILE__, __LINE__) > 0)

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = instembed::cuda::simulator::lane();
  return instembed::cuda::simulator::shuffle(
      mask, value, (lane & ~(width - 1)) + (source & (width - 1)), "__shfl_sync");
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = instembed::cuda::simulator::lane();
  const int source = lane - static_cast<int>(delta);
  return instembed::cuda::simulator::shuffle(
      mask, value, source < (lane & ~(width - 1)) ? lane : source, "__shfl_up_sync");
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = instembed::cuda::simulator::lane();
  const int source = lane + static_cast<int>(delta);
  return instembed::cuda::simulator::shuffle(
      mask, value, source > (lane | (width - 1)) ? lane : source, "__shfl_down_sync");
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32) {
  const int lane = instembed::cuda::simulator::lane();
  const int source = lane ^ other;
  return instembed::cuda::simulator::shuffle(
      mask, value, source > (lane | (width - 1)) ? lane : source, "__shfl_xor_sync");
}

inline unsigned __ballot_sync(unsigned mask, bool value) {
  return instembed::cuda::simulator::warp(mask, "__ballot_sync", value).votes;
}

inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline bool __all_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) == mask; }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  instembed::cuda::simulator::warp(mask, "__syncwarp", 0);
}

inline void __threadfence() {}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  const T before = *address;
  *address = static_cast<T>(before + value);
  return before;
}

template <class T>
T atomicAdd(const instembed::cuda::SharedPtr<T>& address, std::common_type_t<T> value) {
  return address.atomic_add(value);
}

template <class T>
T atomicMin(T* address, std::common_type_t<T> value) {
  const T before = *address;
  *address = std::min(before, value);
  return before;
}

template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
  const T before = *address;
  *address = std::max(before, value);
  return before;
}

template <class T>
T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
  const T before = *address;
  if (before == compare) *address = value;
  return before;
}

template <class T>
T atomicOr(T* address, std::common_type_t<T> value) {
  const T before = *address;
  *address = before | value;
  return before;
}

using std::max;
using std::min;
