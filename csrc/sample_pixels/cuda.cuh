// Random pixels of each instance on CUDA: the same that the CPU kernel takes.
//
// Bytes, for N pixels and labels of L bytes: N (L + 4) to find the instances and N 4 to collect
// candidates, 10 MB for 512 x 1024 and int64 labels, 3 us at 3.3 TB/s, and the outputs. Flops: one
// hash a pixel, 3 multiplications in 64 bits. What takes the time is one look-up and one atomic for
// 32 pixels or a run of them.
//
// An instance's size tells how small its K smallest keys are: pixels below a limit that is generous
// are its candidates, in no order, and those are ranked by counting, n^2 comparisons of n = K + 8
// sqrt K + 16, all pixels of an instance no larger. Should they be too few, or too many for their
// room, which happens to less than one instance in a billion, a block looks through the image once
// for each pixel to take. No float is added, and the atomics are on integers.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/id_table.cuh"
#include "common/images.cuh"
#include "sample_pixels/cuda.h"
#include "sample_pixels/formula.h"

namespace instembed::sample_pixels {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr uint64_t kEveryKey = UINT64_MAX;

using Number = unsigned long long;  // that atomics take

// Of each place in the table of ids, and of each instance, that is row of the outputs.
struct Work {
  IdTables tables;
  int32_t* places = nullptr;      // a pixel: -1 for none
  Number* sizes = nullptr;        // a place: pixels
  int32_t* rows = nullptr;        // a place
  uint64_t* limits = nullptr;     // a place: keys beyond are no candidates
  int32_t* place_of = nullptr;    // a row
  Number* found = nullptr;        // a row: candidates
  int64_t* candidates = nullptr;  // (rows, room): pixels within their image
  int64_t* invalid = nullptr;
  int64_t samples = 0, room = 0;
  double wanted = 0;  // candidates of an instance, about

  Work(Workspace* workspace, const Images& images, int64_t capacity, int64_t samples)
      : samples(samples) {
    const auto k = static_cast<double>(samples);
    wanted = k + 8 * std::sqrt(k) + 16;
    room = std::min(static_cast<int64_t>(wanted + 8 * std::sqrt(wanted)),
                    std::max<int64_t>(images.offsets ? images.total : images.pixels, 1));
    tables.take(workspace, images.images, capacity);
    const int64_t in_tables = images.images * tables.places(), in_all = images.images * capacity;
    places = workspace->take<int32_t>(images.total);
    sizes = workspace->take<Number>(in_tables);
    rows = workspace->take<int32_t>(in_tables);
    limits = workspace->take<uint64_t>(in_tables);
    place_of = workspace->take<int32_t>(in_all);
    found = workspace->take<Number>(in_all);
    candidates = workspace->take<int64_t>(in_all * room);
    invalid = workspace->take<int64_t>(1);
  }

  __device__ bool given_up(int64_t image) const {
    return *invalid != 0 || tables.counts[image] > tables.capacity;
  }
};

// A thread takes a pixel; the first of a run in a warp looks its id up for all of them.
__global__ void __launch_bounds__(kThreads)
    find_kernel(const void* labels, DType type, Strides strides, Images images, DeviceRules rules,
                Work work) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (*work.invalid != 0) return;
  const bool inside = i < images.total;
  const int64_t image = inside ? images.image_of(i) : -1;
  int64_t id = 0;
  if (inside) {
    id = load_id(labels, type,
                 strides.at(images, image) + (i - images.start(image)) * strides.pixel);
  }
  const int64_t id_before = __shfl_up_sync(kAllLanes, id, 1);
  const int64_t image_before = __shfl_up_sync(kAllLanes, image, 1);
  const bool head = lane == 0 || id != id_before || image != image_before;
  const unsigned heads = __ballot_sync(kAllLanes, head);
  int32_t place = -1;
  if (head && inside && !rules.is_background(id) && !rules.is_ignored(id)) {
    place = insert(work.tables, image, id);
  }
  const unsigned up_to_here = heads & (kAllLanes >> (kWarp - 1 - lane));
  place = __shfl_sync(kAllLanes, place, kWarp - 1 - __clz(static_cast<int>(up_to_here)));
  if (inside) work.places[i] = place;
  if (!head || place < 0) return;
  const unsigned after = heads ^ up_to_here;
  const int end = after ? __ffs(static_cast<int>(after)) - 1 : kWarp;
  atomicAdd(work.sizes + image * work.tables.places() + place, static_cast<Number>(end - lane));
}

__global__ void __launch_bounds__(kThreads) limit_kernel(Work work, int parts) {
  const int64_t image = blockIdx.x / parts, first = image * work.tables.places();
  rank_ids(work.tables, image, static_cast<int>(blockIdx.x % parts), parts,
           [&](int32_t place, int32_t rank, int64_t) {
             const double share = work.wanted / static_cast<double>(work.sizes[first + place]);
             work.rows[first + place] = rank;
             work.limits[first + place] =
                 share < 1 ? static_cast<uint64_t>(share * 0x1p64) : kEveryKey;
             work.place_of[image * work.tables.capacity + rank] = place;
           });
}

__global__ void __launch_bounds__(kThreads)
    collect_kernel(Images images, const uint64_t* words, Work work) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (*work.invalid != 0 || i >= images.total) return;
  const int32_t place = work.places[i];
  if (place < 0) return;
  const int64_t image = images.image_of(i), pixel = i - images.start(image);
  if (work.given_up(image)) return;
  const int64_t at = image * work.tables.places() + place;
  if (key(words[image], pixel) > work.limits[at]) return;
  const int64_t row = image * work.tables.capacity + work.rows[at];
  const auto n = static_cast<int64_t>(atomicAdd(work.found + row, Number{1}));
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

// The `most` pixels of a place with the smallest keys, one after the other, by a block.
template <class Key>
__device__ __forceinline__ void take_smallest(const int32_t* places, int64_t pixels, int32_t place,
                                              int64_t most, int64_t* to, Key&& key_of) {
  INSTEMBED_SHARED(uint64_t, keys, kThreads);
  INSTEMBED_SHARED(int64_t, tile, kThreads);
  const auto tid = static_cast<int>(threadIdx.x);
  Ranked last{0, -1};
  for (int64_t k = 0; k < most; ++k) {
    Ranked next{kEveryKey, INT64_MAX};
    for (int64_t i = tid; i < pixels; i += kThreads) {
      if (places[i] != place) continue;
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

// A block takes an instance.
__global__ void __launch_bounds__(kThreads)
    select_kernel(Images images, const uint64_t* words, Work work, int64_t* indices,
                  uint8_t* valid) {
  const int64_t row = blockIdx.x, capacity = work.tables.capacity, image = row / capacity;
  const int64_t samples = work.samples;
  int64_t* const own = indices + row * samples;
  const bool given_up = work.given_up(image);
  int64_t taken = 0;
  if (!given_up && row % capacity < work.tables.counts[image]) {
    const int32_t place = work.place_of[row];
    const uint64_t word = words[image];
    const auto size = static_cast<int64_t>(work.sizes[image * work.tables.places() + place]);
    const auto found = static_cast<int64_t>(work.found[row]);
    int64_t* const candidates = work.candidates + row * work.room;
    taken = size < samples ? size : samples;
    const auto key_of = [&](int64_t pixel) { return key(word, pixel); };
    if (taken <= found && found <= work.room) {
      sort_pixels(candidates, found, taken, own, key_of);
    } else {
      take_smallest(work.places + images.start(image), images.count(image), place, taken, own,
                    key_of);
    }
    sort_pixels(own, taken, taken, candidates, [](int64_t) { return uint64_t{0}; });
    const int64_t first = images.offsets ? images.start(image) : 0;
    for (int64_t k = threadIdx.x; k < taken; k += kThreads) own[k] = first + candidates[k];
  }
  for (int64_t k = threadIdx.x; k < samples; k += kThreads) {
    valid[row * samples + k] = k < taken ? 1 : 0;
    if (k >= taken) own[k] = given_up ? kTooMany : -1;
  }
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

  const DeviceGuard guard(labels.device_id);
  const Stream queue = as_stream(stream);
  images.invalid = work.invalid;
  check_offsets(images, work.invalid, queue);
  clear_tables(work.tables, images.images, queue);
  fill_bytes(work.sizes, 0, images.images * work.tables.places() * sizeof(Number), queue);
  fill_bytes(work.found, 0, images.images * capacity * sizeof(Number), queue);
  const int64_t blocks = (images.total + kThreads - 1) / kThreads;
  const DeviceRules device_rules{rules.background.value_or(0), rules.ignore_index.value_or(0),
                                 rules.background.has_value(), rules.ignore_index.has_value()};
  launch(find_kernel, "sample_pixels_find", blocks, kThreads, 0, queue, labels.data, labels.dtype,
         Strides{labels.strides[0], 0, labels.strides[1]}, images, device_rules, work);
  const auto parts = static_cast<int>(rank_blocks(capacity));
  launch(limit_kernel, "sample_pixels_limit", images.images * parts, kThreads, 0, queue, work,
         parts);
  launch(collect_kernel, "sample_pixels_collect", blocks, kThreads, 0, queue, images,
         words.as<const uint64_t>(), work);
  launch(select_kernel, "sample_pixels_select", images.images * capacity, kThreads, 0, queue,
         images, words.as<const uint64_t>(), work, indices.as<int64_t>(), valid.as<uint8_t>());
}

}  // namespace instembed::sample_pixels
