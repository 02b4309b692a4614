// The discriminative loss on CUDA for embeddings of few channels: what a lane needs of its pixel
// fits into registers.
//
// A warp takes 32 consecutive pixels at a time, a pixel a lane, and asks for all their channels at
// once: 2 KB where there are 16 of 4 bytes, and a multiprocessor has 32 warps, or 16 of twice the
// bytes. So memory is busy without tiles, barriers, or loads ahead of their use. Nothing is read of
// pixels of no instance: the code of the next pixel is asked for before this one's channels are.
//
// Sums: the warp turns its 32 pixels round in shared memory, so that a lane has some pixels of one
// channel, and adds up those of one instance at a time; mostly there is one. The sums go to a table
// of the warp in shared memory. Where there are too many instances for a table a warp, a block has
// one, in shared memory or else in global: warps leave their sums, and each column and slot has a
// thread that adds them. The order of all sums depends on shapes and numbers of instances alone.
#pragma once

#include <cmath>

#include "discriminative/instances.cuh"

namespace instembed::discriminative {
namespace {

using namespace cuda;

constexpr int kWarps = kThreads / kWarp;

template <class A>
constexpr int kMostChannels = 128 / sizeof(A);  // that a lane keeps
template <class A>
constexpr int kNearElements = 24 * 1024 / sizeof(A);  // of a block's tables in shared memory
template <class A, int D>
constexpr int kResident = sizeof(A) == 8 || D == 32 ? 2 : 4;  // blocks a multiprocessor

TileShape narrow_shape(int64_t channels) {
  TileShape shape;
  shape.channels = static_cast<int>(channels);
  shape.pixels = kThreads;
  shape.row = kThreads + 1;
  return shape;
}

// Bytes of shared memory of narrow_sums_kernel<T, D>.
template <class A, int D>
int64_t narrow_bytes() {
  return padded_bytes<A>((D + 1) * (kThreads + 1)) + padded_bytes<int32_t>(kThreads) +
         padded_bytes<uint32_t>(kWarps) + padded_bytes<A>(kNearElements<A>);
}

// f() with a constant of at least `channels`; not called where there are too many.
template <class A, class F>
void dispatch_channels(int channels, F&& f) {
  if (channels <= 8) return f(std::integral_constant<int, 8>());
  if (channels <= 16) return f(std::integral_constant<int, 16>());
  if constexpr (kMostChannels<A> >= 32) {
    if (channels <= 32) return f(std::integral_constant<int, 32>());
  }
}

// The stride, as something that may change from pixel to pixel: else compilers keep its multiples
// for all channels over the loop, in registers that there are not.
__device__ __forceinline__ int64_t unforeseen(int64_t stride) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(stride));
#endif
  return stride;
}

// x = the channels of the pixel at `at`. `packed`: they lie side by side, 16 bytes at a time.
// `last`: nobody reads them again soon.
template <bool last, class T, int D, class A>
__device__ __forceinline__ void load_pixel(const T* at, int64_t stride, bool packed, int channels,
                                           A (&x)[D]) {
  constexpr int kSize = Pack<T>::kSize;
  if (packed) {
#pragma unroll
    for (int d = 0; d < D; d += kSize) {
      if (d < channels) {
        const auto pack = *reinterpret_cast<const Pack<T>*>(at + d);
#pragma unroll
        for (int j = 0; j < kSize; ++j) x[d + j] = static_cast<A>(pack.values[j]);
      }
    }
  } else {
    stride = unforeseen(stride);
#pragma unroll
    for (int d = 0; d < D; ++d, at += stride) {
      if (d < channels) x[d] = static_cast<A>(last ? load_once(at) : *at);
    }
  }
}

template <class T, int D, class A>
__device__ __forceinline__ void store_pixel(T* at, int64_t stride, bool packed, int channels,
                                            const A (&x)[D]) {
  constexpr int kSize = Pack<T>::kSize;
  if (packed) {
#pragma unroll
    for (int d = 0; d < D; d += kSize) {
      if (d < channels) {
        Pack<T> pack;
#pragma unroll
        for (int j = 0; j < kSize; ++j) pack.values[j] = narrowed<T>(x[d + j]);
        *reinterpret_cast<Pack<T>*>(at + d) = pack;
      }
    }
  } else {
    stride = unforeseen(stride);
#pragma unroll
    for (int d = 0; d < D; ++d, at += stride) {
      if (d < channels) store_once(at, narrowed<T>(x[d]));
    }
  }
}

// x becomes x - mean. Returns the distance.
template <int norm, class A, int D>
__device__ __forceinline__ A subtract_mean(A (&x)[D], const A* mean, int channels) {
  A sum = 0;
#pragma unroll
  for (int d = 0; d < D; ++d) {
    if (d < channels) {
      x[d] -= mean[d];
      sum = add_to_norm<norm>(sum, x[d]);
    }
  }
  return finish_norm<norm>(sum);
}

// x becomes base + factor * direction(x), base null for 0. Where the factor is 0, x is finite.
template <int norm, class A, int D>
__device__ __forceinline__ void pull(A (&x)[D], A factor, const A* base, int channels) {
#pragma unroll
  for (int d = 0; d < D; ++d) {
    const A step = factor * direction<norm>(x[d]);
    x[d] = base && d < channels ? base[d] + step : step;
  }
}

// Of a pixel: x becomes base + scale * d (hinge^2 / 2) / dx. Returns the hinge.
template <int norm, class A, int D>
__device__ __forceinline__ A differentiate(A (&x)[D], const A* mean, A delta, A scale,
                                           const A* base, int channels) {
  const A distance = subtract_mean<norm>(x, mean, channels);
  const A hinge = positive_part(static_cast<A>(distance - delta));
  pull<norm>(x, slope<norm>(hinge, distance) * scale, base, channels);
  return hinge;
}

template <class T, int D, Pass pass>
__global__ void __launch_bounds__(kThreads, (kResident<accumulator_t<T>, D>))
    narrow_sums_kernel(const T* embeddings, Strides strides, Images images, TileShape shape,
                       const int32_t* slot_of_place, int32_t places, Codes codes,
                       Instances<accumulator_t<T>> instances, Rule rule, accumulator_t<T>* partials,
                       int64_t rows, int64_t first_image, int64_t blocks) {
  using A = accumulator_t<T>;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp, warp = tid / kWarp;
  // What the means pass has read last is likely still in the L2: the spread pass goes back.
  const int64_t block = pass == Pass::means ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  const int64_t image = first_image + block / blocks;
  const int32_t count = instances.of(image);
  if (pass == Pass::spread && count == 0) return;
  const int channels = shape.channels, columns = channels + 1;
  const Share share = share_of(images, image, block % blocks, parts_of(blocks, rows, count), shape);
  if (share.part >= share.parts) return;

  DynamicShared shared;
  constexpr int row = kThreads + 1;
  const auto tile = shared.take<A>((D + 1) * row);
  const auto slots = shared.take<int32_t>(kThreads);
  const auto heads = shared.take<uint32_t>(kWarps);
  const auto near_tables = shared.take<A>(kNearElements<A>);
  const int64_t cells = int64_t{count} * columns;
  const int tables =
      cells * kWarps <= kNearElements<A> ? kWarps : (cells <= kNearElements<A> ? 1 : 0);
  A* far_table = partials + ((image - first_image) * rows + share.part * count) *
                                static_cast<int64_t>(columns);
  for (int64_t k = tid; k < cells * tables; k += kThreads) near_tables[k] = A(0);
  for (int64_t k = tid; k < cells && tables == 0; k += kThreads) far_table[k] = A(0);
  __syncthreads();

  const auto piece = tile + warp * kWarp;
  const auto own_table = near_tables + (tables == kWarps ? warp * static_cast<int>(cells) : 0);
  const int64_t start = images.start(image), pixels = images.count(image);
  const T* first = embeddings + strides.at(images, image);
  const bool packed =
      packs(first, strides.channel, strides.pixel) && channels % Pack<T>::kSize == 0;
  const bool given_up = instances.found[image] < 0;
  const A* means = instances.means + image * instances.capacity * channels;
  const auto delta = static_cast<A>(rule.delta_var);
  constexpr int step = pass == Pass::means ? kThreads : -kThreads;
  int64_t p = (pass == Pass::means ? share.first : share.last - 1) * kThreads + tid;
  auto left = static_cast<int>(share.last - share.first);
  int32_t next = left > 0 && p < pixels ? codes[start + p] : kIgnored;
  for (; left > 0; --left, p += step) {
    int32_t slot = next;
    next = left > 1 && p + step < pixels ? codes[start + p + step] : kIgnored;
    bool active = slot >= 0 && count > 0;
    A x[D] = {}, square = 0;
    if (active) load_pixel<false>(first + p * strides.pixel, strides.channel, packed, channels, x);
    if (pass == Pass::means && slot >= 0) {
      slot = given_up ? kIgnored : slot_of_place[image * places + slot];
      codes.set(start + p, slot);
    }
    if (pass == Pass::spread && active) {
      const A* mean = means + int64_t{slot} * channels;
      const A hinge =
          rule.norm == 1
              ? differentiate<1>(x, mean, delta, A(1), static_cast<A*>(nullptr), channels)
              : differentiate<2>(x, mean, delta, A(1), static_cast<A*>(nullptr), channels);
      active = hinge != 0;
      square = hinge * hinge;
    }
    unsigned rest = __ballot_sync(kAllLanes, active);
    if (rest != 0) {
      __syncwarp();  // the pixels before have been read
#pragma unroll
      for (int d = 0; d < D; ++d) tile[d * row + tid] = x[d];
      __syncwarp();
      // Lane d + D g: pixels D g, ..., D g + D - 1 of channel d.
#pragma unroll
      for (int j = 0; j < D; ++j) x[j] = piece[lane % D * row + lane / D * D + j];
    }
    unsigned leaders = 0;
    while (rest != 0) {
      const int leader = __ffs(static_cast<int>(rest)) - 1;
      const int32_t here = __shfl_sync(kAllLanes, slot, leader);
      const unsigned all = __ballot_sync(kAllLanes, active && slot == here);
      rest &= ~all;
      leaders |= 1u << leader;
      const unsigned mine = all >> (lane / D * D);
      A sum = 0;
#pragma unroll
      for (int j = 0; j < D; ++j) {
        if (mine >> j & 1) sum += x[j];
      }
#pragma unroll
      for (int other = D; other < kWarp; other *= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, other);
      }
      A extra = static_cast<A>(__popc(all));
      if constexpr (pass == Pass::spread) {
        extra = active && slot == here ? square : A(0);
#pragma unroll
        for (int other = 1; other < kWarp; other *= 2) {
          extra += __shfl_xor_sync(kAllLanes, extra, other);
        }
      }
      const A value = lane < channels ? sum : extra;
      if (tables == kWarps) {
        if (lane < columns) own_table[here * columns + lane] += value;
        if (D == kWarp && columns > kWarp && lane == 0) own_table[here * columns + kWarp] += extra;
      } else {
        __syncwarp();  // every lane has its pixels
        if (lane < columns) piece[lane * row + leader] = value;
        if (D == kWarp && columns > kWarp && lane == 0) piece[kWarp * row + leader] = extra;
      }
    }
    if (tables == kWarps) continue;
    slots[tid] = slot;
    if (lane == 0) heads[warp] = leaders;
    __syncthreads();
    if (tables == 1) {
      add_sums<A>(tile, slots, heads, shape, near_tables);
    } else {
      add_sums<A>(tile, slots, heads, shape, far_table);
    }
    __syncthreads();
  }
  if (tables == 0) return;
  __syncthreads();
  for (int k = tid; k < cells; k += kThreads) {
    A sum = 0;
    for (int table = 0; table < tables; ++table) {
      sum += near_tables[table * static_cast<int>(cells) + k];
    }
    far_table[k] = sum;
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, (kResident<accumulator_t<T>, D>))
    narrow_gradient_kernel(const T* embeddings, Strides strides, Images images, TileShape shape,
                           Codes codes, Instances<accumulator_t<T>> instances, Rule rule,
                           const accumulator_t<T>* scales, const accumulator_t<T>* through_means,
                           T* grad, Strides grad_strides, int64_t blocks) {
  using A = accumulator_t<T>;
  const int channels = shape.channels, tid = static_cast<int>(threadIdx.x);
  if (images.offsets && *images.invalid) {
    return fill_with_nan(images, channels, grad, grad_strides);
  }
  const Share share = share_of(images, blockIdx.x / blocks, blockIdx.x % blocks, blocks, shape);
  const int64_t image = share.image;
  const bool given_up = instances.found[image] < 0;
  const int64_t start = images.start(image), pixels = images.count(image);
  const T* first = embeddings + strides.at(images, image);
  T* target = grad + grad_strides.at(images, image);
  const bool whole = channels % Pack<T>::kSize == 0;
  const bool packed = whole && packs(first, strides.channel, strides.pixel);
  const bool grad_packed = whole && packs(target, grad_strides.channel, grad_strides.pixel);
  const A* means = instances.means + image * instances.capacity * channels;
  const A* common = through_means + image * instances.capacity * channels;
  const A* scale = scales + image * instances.capacity;
  const auto delta = static_cast<A>(rule.delta_var);
  const int64_t last = share.last * kThreads < pixels ? share.last * kThreads : pixels;
  int64_t p = share.first * kThreads + tid;
  auto left = static_cast<int>(last - p);
  first += p * strides.pixel;
  target += p * grad_strides.pixel;
  p += start;
  int32_t next = left > 0 ? codes[p] : kIgnored;
  for (; left > 0; left -= kThreads) {
    const int32_t slot = next;
    p += kThreads;
    next = left > kThreads ? codes[p] : kIgnored;
    A x[D];
#pragma unroll
    for (int d = 0; d < D; ++d) x[d] = given_up ? static_cast<A>(NAN) : A(0);
    if (slot >= 0) {
      load_pixel<true>(first, strides.channel, packed, channels, x);
      const int64_t row = int64_t{slot} * channels;
      if (rule.norm == 1) {
        differentiate<1>(x, means + row, delta, scale[slot], common + row, channels);
      } else {
        differentiate<2>(x, means + row, delta, scale[slot], common + row, channels);
      }
    }
    store_pixel(target, grad_strides.channel, grad_packed, channels, x);
    first += kThreads * strides.pixel;
    target += kThreads * grad_strides.pixel;
  }
}

}  // namespace
}  // namespace instembed::discriminative
