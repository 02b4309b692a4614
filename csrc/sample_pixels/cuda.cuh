// Random pixels of each instance on CUDA: the same that the CPU kernel takes.
//
// Bytes, for N pixels and labels of L bytes: N (L + 2) to find their instances, N 4 to number them
// and N 2 to collect candidates, 8 MB for 512 x 1024 and int64 labels, 3 us at 3.3 TB/s, and the
// outputs, 9 each. Flops: a hash and a division a pixel.
//
// An instance's size tells how small its K smallest keys are: pixels below a limit that is generous
// are its candidates, in no order, and those are ranked by counting, n^2 comparisons of n = K + 8
// sqrt K + 16, all pixels of an instance no larger. Should they be too few, or too many for their
// room, which happens to less than one instance in a billion, a block looks through the image once
// for each pixel to take. No float is added, and the atomics are on integers.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/label_slots.cuh"
#include "sample_pixels/cuda.h"
#include "sample_pixels/formula.h"

namespace instembed::sample_pixels {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr uint64_t kEveryKey = UINT64_MAX;

using Number = unsigned long long;  // that atomics take

struct Work {
  LabelSlots slots;
  void* codes = nullptr;          // a pixel: its slot
  int64_t* found = nullptr;       // an image: instances, -1 where they are too many
  int64_t* sizes = nullptr;       // (images, capacity): pixels of an instance
  Number* wanted = nullptr;       // (images, capacity): its candidates, even those without room
  int64_t* candidates = nullptr;  // (images, capacity, room): pixels within their image
  int64_t* invalid = nullptr;
  int64_t capacity = 0, samples = 0, room = 0;
  double expected = 0;  // candidates of an instance, about

  Work(Workspace* workspace, const Images& images, int64_t capacity, int64_t samples)
      : capacity(capacity), samples(samples) {
    const auto k = static_cast<double>(samples);
    expected = k + 8 * std::sqrt(k) + 16;
    room = std::min(static_cast<int64_t>(expected + 8 * std::sqrt(expected)),
                    std::max<int64_t>(images.offsets ? images.total : images.pixels, 1));
    slots.take(workspace, images.images, capacity);
    codes = workspace->take<char>(images.total * slot_bytes(capacity));
    found = workspace->take<int64_t>(images.images);
    sizes = workspace->take<int64_t>(images.images * capacity);
    wanted = workspace->take<Number>(images.images * capacity);
    candidates = workspace->take<int64_t>(images.images * capacity * room);
    invalid = workspace->take<int64_t>(1);
  }

  Codes slot_of() const { return {codes, slot_bytes(capacity) == 4}; }
  __device__ bool given_up(int64_t image) const { return *invalid != 0 || found[image] < 0; }
};

// A thread takes a pixel.
__global__ void __launch_bounds__(kThreads)
    collect_kernel(Images images, const uint64_t* words, Work work, Codes slots) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (*work.invalid != 0 || i >= images.total) return;
  const int32_t slot = slots[i];
  if (slot < 0) return;
  const int64_t image = images.image_of(i), pixel = i - images.start(image);
  const int64_t row = image * work.capacity + slot;
  const double share = work.expected / static_cast<double>(work.sizes[row]);
  const uint64_t limit = share < 1 ? static_cast<uint64_t>(share * 0x1p64) : kEveryKey;
  if (key(words[image], pixel) > limit) return;
  const auto n = static_cast<int64_t>(atomicAdd(work.wanted + row, Number{1}));
  if (n < work.room) work.candidates[row * work.room + n] = pixel;
}

// A pixel and what it is ordered by.
struct Ranked {
  uint64_t key = 0;
  int64_t pixel = 0;

  __device__ bool operator<(const Ranked& other) const {
    return key != other.key ? key < other.key : pixel < other.pixel;
  }
};

// to[rank] = each of n pixels whose rank is below `most`, in the order of Ranked, by a block.
template <class Key>
__device__ __forceinline__ void sort_pixels(const int64_t* pixels, int64_t n, int64_t most,
                                            int64_t* to, Key&& key_of) {
  INSTEMBED_SHARED(uint64_t, keys, kThreads);
  INSTEMBED_SHARED(int64_t, tile, kThreads);
  const int64_t tid = threadIdx.x;
  for (int64_t first = 0; first < n; first += kThreads) {
    Ranked mine;
    if (first + tid < n) {
      mine.pixel = pixels[first + tid];
      mine.key = key_of(mine.pixel);
    }
    int64_t rank = 0;
    for (int64_t from = 0; from < n; from += kThreads) {
      __syncthreads();  // the tile before has been read
      if (from + tid < n) {
        const int64_t pixel = pixels[from + tid];
        tile[tid] = pixel;
        keys[tid] = key_of(pixel);
      }
      __syncthreads();
      const auto count = static_cast<int>(n - from < kThreads ? n - from : kThreads);
      for (int k = 0; k < count; ++k) rank += Ranked{keys[k], tile[k]} < mine ? 1 : 0;
    }
    if (first + tid < n && rank < most) to[rank] = mine.pixel;
  }
  __syncthreads();
}

// The `most` pixels of an instance with the smallest keys, one after the other, by a block. Pixels
// are counted from `start`.
template <class Key>
__device__ __forceinline__ void take_smallest(const Codes& slots, int64_t start, int64_t pixels,
                                              int32_t slot, int64_t most, int64_t* to,
                                              Key&& key_of) {
  INSTEMBED_SHARED(uint64_t, keys, kThreads);
  INSTEMBED_SHARED(int64_t, tile, kThreads);
  const auto tid = static_cast<int>(threadIdx.x);
  Ranked last{0, -1};
  for (int64_t k = 0; k < most; ++k) {
    Ranked next{kEveryKey, INT64_MAX};
    for (int64_t i = tid; i < pixels; i += kThreads) {
      if (slots[start + i] != slot) continue;
      const Ranked here{key_of(i), i};
      if (last < here && here < next) next = here;
    }
    keys[tid] = next.key;
    tile[tid] = next.pixel;
    __syncthreads();
    for (int other = 0; other < kThreads; ++other) {
      const Ranked theirs{keys[other], tile[other]};
      if (theirs < next) next = theirs;
    }
    __syncthreads();
    if (tid == 0) to[k] = next.pixel;
    last = next;
  }
  __syncthreads();
}

// Whatever select_kernel() does not write: no block need look at a row without an instance. A
// thread takes an element.
__global__ void __launch_bounds__(kThreads)
    fill_kernel(Work work, int64_t elements, int64_t* indices, uint8_t* valid) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= elements) return;
  const int64_t row = k / work.samples;
  const bool taken = k % work.samples < work.sizes[row];  // 0 where there is no such instance
  valid[k] = taken ? 1 : 0;
  if (!taken) indices[k] = work.given_up(row / work.capacity) ? kTooMany : -1;
}

// A block takes the instances of an image one after the other, every parts-th of them.
__global__ void __launch_bounds__(kThreads)
    select_kernel(Images images, const uint64_t* words, Work work, Codes slots, int64_t* indices,
                  int64_t parts) {
  const int64_t image = blockIdx.x / parts;
  if (work.given_up(image)) return;
  const int64_t start = images.start(image), found = work.found[image];
  for (int64_t slot = blockIdx.x % parts; slot < found; slot += parts) {
    const int64_t row = image * work.capacity + slot, size = work.sizes[row];
    const int64_t taken = size < work.samples ? size : work.samples;
    int64_t* const own = indices + row * work.samples;
    const auto wanted = static_cast<int64_t>(work.wanted[row]);
    int64_t* const candidates = work.candidates + row * work.room;
    const auto key_of = [word = words[image]](int64_t pixel) { return key(word, pixel); };
    if (taken <= wanted && wanted <= work.room) {
      sort_pixels(candidates, wanted, taken, own, key_of);
    } else {
      take_smallest(slots, start, images.count(image), static_cast<int32_t>(slot), taken, own,
                    key_of);
    }
    sort_pixels(own, taken, taken, candidates, [](int64_t) { return uint64_t{0}; });
    const int64_t first = images.offsets ? start : 0;
    for (int64_t k = threadIdx.x; k < taken; k += kThreads) own[k] = first + candidates[k];
  }
}

// Blocks an image that select its pixels: enough to fill the device.
int64_t parts_an_image(int64_t images, int64_t capacity) {
  return std::clamp<int64_t>(8 * int64_t{device_info().processors} / images, 1, capacity);
}

}  // namespace

int64_t cuda_workspace(const Array& labels, const Array* offsets, int64_t capacity,
                       int64_t samples) {
  Workspace workspace(nullptr);
  Work(&workspace, Images::of(labels, offsets, nullptr), capacity, samples);
  return workspace.used();
}

void sample_cuda(const Array& labels, const Array* offsets, const LabelRules& rules,
                 const Array& words, const Array& indices, const Array& valid,
                 const Array& workspace, int64_t stream) {
  expect(labels.ndim == 2, "labels: expected 2 dimensions (images, pixels)");
  Images images = Images::of(labels, offsets, nullptr);
  expect(indices.ndim == 3 && indices.shape[0] == images.images && indices.shape[1] >= 1,
         "indices: expected (images, instances, samples)");
  const int64_t capacity = indices.shape[1], samples = indices.shape[2];
  expect_contiguous(words, DType::i64, images.images, "words");
  expect_contiguous(indices, DType::i64, images.images * capacity * samples, "indices");
  expect_contiguous(valid, DType::u8, indices.size(), "valid");
  expect_contiguous(workspace, DType::u8, workspace.size(), "workspace");
  Workspace pieces(workspace.data);
  const Work work(&pieces, images, capacity, samples);
  expect(workspace.size() >= pieces.used(), "workspace: too small");
  if (indices.size() == 0) return;

  const Stream queue = as_stream(stream);
  images.invalid = work.invalid;
  check_offsets(images, work.invalid, queue);
  find_slots(work.slots, labels, images, rules, work.slot_of(), work.found, nullptr, nullptr,
             queue);
  number_pixels(work.slots, images, work.found, work.slot_of(), work.sizes, queue);
  fill_bytes(work.wanted, 0, images.images * capacity * 8, queue);
  launch(collect_kernel, "sample_pixels_collect", (images.total + kThreads - 1) / kThreads,
         kThreads, 0, queue, images, words.as<const uint64_t>(), work, work.slot_of());
  launch(fill_kernel, "sample_pixels_fill", (indices.size() + kThreads - 1) / kThreads, kThreads, 0,
         queue, work, indices.size(), indices.as<int64_t>(), valid.as<uint8_t>());
  const int64_t parts = parts_an_image(images.images, capacity);
  launch(select_kernel, "sample_pixels_select", images.images * parts, kThreads, 0, queue, images,
         words.as<const uint64_t>(), work, work.slot_of(), indices.as<int64_t>(), parts);
}

}  // namespace instembed::sample_pixels
