// Tiles: some consecutive pixels of an image, all channels, in shared memory in the type that sums
// are taken in. Whatever the layout of the embeddings, kernels see tile[channel * row + pixel].
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/cuda.h"
#include "common/dtype.h"
#include "common/images.cuh"

namespace instembed::cuda {

constexpr int kThreads = 256;
constexpr int kPiece = kWarp;        // pixels whose sums one thread takes
constexpr int kTileElements = 8192;  // floats, half as many doubles

struct TileShape {
  int channels = 0;
  int pixels = 0;  // a power of two of 32 to 1024
  int bits = 0;    // pixels is 1 << bits: a shift costs one instruction, a division twenty
  int row = 0;     // odd: neighbouring channels lie in different banks

  // `copies`: tiles that a kernel keeps.
  template <class A>
  static TileShape of(int64_t channels, int copies = 1) {
    TileShape shape;
    shape.channels = static_cast<int>(channels);
    shape.bits = 10;
    const int64_t room = kTileElements * 4 / static_cast<int64_t>(sizeof(A)) / copies;
    while ((1 << shape.bits) > kPiece && (channels << shape.bits) > room) --shape.bits;
    shape.pixels = 1 << shape.bits;
    shape.row = shape.pixels + 1;
    return shape;
  }
};

template <class T>
struct alignas(16) Pack {  // what one load or store moves
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <class T>
using Bits =
    std::conditional_t<sizeof(T) == 2, unsigned short,
                       std::conditional_t<sizeof(T) == 4, unsigned int, unsigned long long>>;

template <class T, class A>
__device__ __forceinline__ T narrowed(A value) {
  if constexpr (sizeof(T) == 2) {
    return T::from(value);
  } else {
    return value;
  }
}

// Reads, and writes, what nobody reads again soon: the caches keep other things.
template <class T>
__device__ __forceinline__ T load_once(const T* at) {
  return bit_cast<T>(__ldcs(reinterpret_cast<const Bits<T>*>(at)));
}
template <class T>
__device__ __forceinline__ void store_once(T* at, T value) {
  __stcs(reinterpret_cast<Bits<T>*>(at), bit_cast<Bits<T>>(value));
}

// Whether runs of pixels (or of channels) of an image can be moved 16 bytes at a time.
template <class T>
__device__ __forceinline__ bool packs(const T* first, int64_t step, int64_t stride) {
  return step == 1 && reinterpret_cast<uintptr_t>(first) % 16 == 0 &&
         stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

// tile[d * row + p] = element d of pixel p for the n pixels at `first`.
template <class T, class A>
__device__ __forceinline__ void load_tile(const T* first, const Strides& strides, int n,
                                          const TileShape& shape, SharedPtr<A> tile) {
  constexpr int kSize = Pack<T>::kSize;
  const int tid = static_cast<int>(threadIdx.x);
  if (n == shape.pixels && packs(first, strides.pixel, strides.channel)) {
    const int packs_in_all = shape.pixels / kSize * shape.channels;
#pragma unroll 4
    for (int k = tid; k < packs_in_all; k += kThreads) {
      const int d = k * kSize >> shape.bits, p = k * kSize & (shape.pixels - 1);
      const auto pack = *reinterpret_cast<const Pack<T>*>(first + d * strides.channel + p);
      for (int j = 0; j < kSize; ++j) tile[d * shape.row + p + j] = static_cast<A>(pack.values[j]);
    }
  } else if (shape.channels % kSize == 0 && packs(first, strides.channel, strides.pixel)) {
    const int packs_a_pixel = shape.channels / kSize;
    const int packs_in_all = packs_a_pixel * n;
#pragma unroll 4
    for (int k = tid; k < packs_in_all; k += kThreads) {
      const int p = k / packs_a_pixel, d = k % packs_a_pixel * kSize;
      const auto pack = *reinterpret_cast<const Pack<T>*>(first + p * strides.pixel + d);
      for (int j = 0; j < kSize; ++j) {
        tile[(d + j) * shape.row + p] = static_cast<A>(pack.values[j]);
      }
    }
  } else if (strides.channel == 1) {
    for (int k = tid; k < n * shape.channels; k += kThreads) {
      const int p = k / shape.channels, d = k % shape.channels;
      tile[d * shape.row + p] = static_cast<A>(first[p * strides.pixel + d]);
    }
  } else {
    for (int k = tid; k < shape.pixels * shape.channels; k += kThreads) {
      const int d = k >> shape.bits, p = k & (shape.pixels - 1);
      if (p < n) {
        tile[d * shape.row + p] = static_cast<A>(first[d * strides.channel + p * strides.pixel]);
      }
    }
  }
}

// Element d of pixel p = value(d, p) for the n pixels at `first`.
template <class T, class Value>
__device__ __forceinline__ void store_tile(T* first, const Strides& strides, int n,
                                           const TileShape& shape, Value&& value) {
  constexpr int kSize = Pack<T>::kSize;
  const int tid = static_cast<int>(threadIdx.x);
  if (n == shape.pixels && packs(first, strides.pixel, strides.channel)) {
    const int packs_in_all = shape.pixels / kSize * shape.channels;
    for (int k = tid; k < packs_in_all; k += kThreads) {
      const int d = k * kSize >> shape.bits, p = k * kSize & (shape.pixels - 1);
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < kSize; ++j) pack.values[j] = narrowed<T>(value(d, p + j));
      *reinterpret_cast<Pack<T>*>(first + d * strides.channel + p) = pack;
    }
  } else if (shape.channels % kSize == 0 && packs(first, strides.channel, strides.pixel)) {
    const int packs_a_pixel = shape.channels / kSize;
    for (int k = tid; k < packs_a_pixel * n; k += kThreads) {
      const int p = k / packs_a_pixel, d = k % packs_a_pixel * kSize;
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < kSize; ++j) pack.values[j] = narrowed<T>(value(d + j, p));
      *reinterpret_cast<Pack<T>*>(first + p * strides.pixel + d) = pack;
    }
  } else if (strides.channel == 1) {
    for (int k = tid; k < n * shape.channels; k += kThreads) {
      const int p = k / shape.channels, d = k % shape.channels;
      first[p * strides.pixel + d] = narrowed<T>(value(d, p));
    }
  } else {
    for (int k = tid; k < shape.pixels * shape.channels; k += kThreads) {
      const int d = k >> shape.bits, p = k & (shape.pixels - 1);
      if (p < n) first[d * strides.channel + p * strides.pixel] = narrowed<T>(value(d, p));
    }
  }
}

// The tiles that a block works on: those of part `part` of `parts` of image `image`.
struct Share {
  int64_t image, part, parts, first, last;
};

__device__ __forceinline__ Share share_of(const Images& images, int64_t image, int64_t part,
                                          int64_t parts, const TileShape& shape) {
  const int64_t tiles = (images.count(image) + shape.pixels - 1) / shape.pixels;
  return {image, part, parts, tiles * part / parts, tiles * (part + 1) / parts};
}

// Blocks that share an image's sums: as many as there is room for tables.
__device__ __forceinline__ int64_t parts_of(int64_t blocks, int64_t rows, int32_t instances) {
  if (instances == 0) return blocks;
  const int64_t fit = rows / instances;
  return fit < 1 ? 1 : (fit < blocks ? fit : blocks);
}

}  // namespace instembed::cuda
