// Which pixels take part, on the device: those that belong to instances, or of those the ones with
// the least keys.
//
// The key up to which pixels are taken is found digit by digit: all pixels whose key begins like it
// are counted by their next 8 bits, and the digit is the one that its rank falls into. Counts are
// integers, so their order does not matter. A block counts its pixels for itself first: the numbers
// in [0.5, 1), half of all, begin with the same 8 bits.
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "cosine_margin/cosine_margin.h"
#include "sphere/cloud.cuh"

namespace instembed::cosine_margin {
namespace {

using namespace sphere::device;

constexpr int kDigits = 4, kDigitBits = 8, kDigitValues = 1 << kDigitBits;
static_assert(kDigitValues == kThreads);

struct Keys {  // of pixels; float32 and not negative: their order is that of their bits
  View<const float> view;
  Sampling sampling;

  __device__ void load(const Images& images, const Quad& quad,
                       uint32_t (&key)[Quad::kPixels]) const {
#pragma unroll
    for (int k = 0; k < Quad::kPixels; ++k) {
      key[k] = k < quad.pixels ? bit_cast<uint32_t>(*view.at(images, quad.first + k)) : 0;
    }
  }
};

struct Limits {                // of each image
  uint32_t* keys = nullptr;    // the digits found so far of the key up to which pixels are taken
  int32_t* ranks = nullptr;    // its rank among the pixels that begin so; at last, how many of it
  int32_t* numbers = nullptr;  // (images, kDigitValues): pixels by their next digit

  void take(Workspace* workspace, int64_t images) {
    keys = workspace->take<uint32_t>(images);
    ranks = workspace->take<int32_t>(images);
    numbers = workspace->take<int32_t>(images * kDigitValues);
  }
};

// marks[i] = 1 for pixels of instances.
static __global__ void __launch_bounds__(kThreads)
    mark_labels_kernel(Images images, Integers labels, DeviceRules rules, uint8_t* marks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= images.total) return;
  const int64_t id = labels.at(images, i);
  marks[i] = rules.is_background(id) || rules.is_ignored(id) ? 0 : 1;
}

// A block a chunk.
static __global__ void __launch_bounds__(kThreads)
    count_digits_kernel(Marks marks, Keys keys, Limits limits, int digit) {
  INSTEMBED_SHARED(int32_t, numbers, kDigitValues);
  numbers[threadIdx.x] = 0;
  __syncthreads();
  const Quad quad(marks.chunks);
  uint32_t key[Quad::kPixels];
  keys.load(marks.chunks.images, quad, key);
  const unsigned taken = quad.marked(marks, 1);
  const uint32_t known = digit > 0 ? limits.keys[quad.image] : 0;
  const int left = (kDigits - 1 - digit) * kDigitBits;  // bits after this digit
#pragma unroll
  for (int k = 0; k < Quad::kPixels; ++k) {
    const bool counts = digit == 0 || key[k] >> (left + kDigitBits) == known;
    if (counts && taken >> k & 1) atomicAdd(numbers + (key[k] >> left) % kDigitValues, 1);
  }
  __syncthreads();
  const int32_t number = numbers[threadIdx.x];
  if (number) atomicAdd(limits.numbers + quad.image * kDigitValues + threadIdx.x, number);
}

// The next digit, and numbers of zero for the one after. A block an image, a thread a digit.
static __global__ void __launch_bounds__(kThreads)
    find_digit_kernel(Sampling sampling, Limits limits, int digit) {
  INSTEMBED_SHARED(int32_t, sums, kWarps);
  const int64_t image = blockIdx.x;
  int32_t* number = limits.numbers + image * kDigitValues + threadIdx.x;
  const int32_t here = *number;
  int32_t all = 0;
  const int32_t before = sum_before<kWarps, int32_t>(here, sums, &all);
  int64_t rank = limits.ranks[image];
  if (digit == 0) {
    const auto share = static_cast<int64_t>(ceil(sampling.fraction * static_cast<double>(all)));
    rank = min(min(int64_t{all}, share), sampling.most);
  }
  __syncthreads();  // the rank has been read
  *number = 0;
  if (rank == 0 ? threadIdx.x == 0 : before < rank && rank <= before + here) {
    limits.keys[image] = (digit == 0 ? 0 : limits.keys[image] << kDigitBits) | threadIdx.x;
    limits.ranks[image] = static_cast<int32_t>(rank == 0 ? 0 : rank - before);
  }
}

// 1 for pixels before the limit, 2 for those at it. A block a chunk.
static __global__ void __launch_bounds__(kThreads)
    mark_sample_kernel(Marks marks, Keys keys, Limits limits) {
  const Quad quad(marks.chunks);
  uint32_t key[Quad::kPixels];
  keys.load(marks.chunks.images, quad, key);
  const unsigned taken = quad.marked(marks, 1);
  const uint32_t limit = limits.keys[quad.image];
#pragma unroll
  for (int k = 0; k < Quad::kPixels; ++k) {
    if (taken >> k & 1) marks.values[quad.first + k] = key[k] < limit ? 1 : key[k] == limit ? 2 : 0;
  }
}

// Gives the pixels that take part their entries.
static inline void choose(const Slots& entries, const Array& labels, const LabelRules& rules,
                          const Array* keys, const Sampling& sampling, const Limits& limits,
                          const Marks& marks, Stream queue) {
  const Images& images = entries.images;
  launch(mark_labels_kernel, "mark_labels", blocks_of(images.total), kThreads, 0, queue, images,
         Integers::of(&labels), DeviceRules::of(rules), marks.values);
  if (keys) {
    const Keys view{{keys->as<const float>(), {keys->strides[0], 0, keys->strides[1]}}, sampling};
    const int64_t chunks = marks.chunks.number();
    fill_bytes(limits.numbers, 0, images.images * kDigitValues * 4, queue);
    for (int digit = 0; digit < kDigits; ++digit) {
      launch(count_digits_kernel, "count_digits", chunks, kThreads, 0, queue, marks, view, limits,
             digit);
      launch(find_digit_kernel, "find_digit", images.images, kThreads, 0, queue, sampling, limits,
             digit);
    }
    launch(mark_sample_kernel, "mark_sample", chunks, kThreads, 0, queue, marks, view, limits);
  }
  give_slots(entries, marks, keys ? limits.ranks : nullptr, queue);
}

}  // namespace
}  // namespace instembed::cosine_margin
