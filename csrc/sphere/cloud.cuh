// The points that take part, on the device, as kernels over pairs want them: in tiles, channel by
// channel, whatever the layout of the embeddings.
//
// Unlike on the CPU nothing is ordered: a point comes where its pixel is among those taken, or
// where its instance says (sphere/segments.cuh).
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/id_table.cuh"
#include "common/images.cuh"
#include "common/scan.cuh"
#include "sphere/unit.h"

namespace instembed::sphere::device {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = 64;  // points

// Where pixel i of the batch is, in elements (B, D, N), or (1, D, N) with offsets.
__device__ __forceinline__ int64_t offset_of(const Images& images, const Strides& strides,
                                             int64_t i) {
  if (images.offsets) return i * strides.pixel;
  return i / images.pixels * strides.image + i % images.pixels * strides.pixel;
}

template <class T>
struct View {
  T* data = nullptr;
  Strides strides;

  static View of(const Array& array) {
    return {array.as<T>(), {array.strides[0], array.strides[1], array.strides[2]}};
  }
  // Channel 0 of a pixel; channel d is d * strides.channel on.
  __device__ T* at(const Images& images, int64_t i) const {
    return data + offset_of(images, strides, i);
  }
};

struct Integers {  // (B, N), or (1, N) with offsets, of any integer type; or null
  const void* data = nullptr;
  DType type = DType::u8;
  Strides strides;

  static Integers of(const Array* array) {
    if (!array) return {};
    return {array->data, array->dtype, {array->strides[0], 0, array->strides[1]}};
  }
  __device__ int64_t at(const Images& images, int64_t i) const {
    return load_id(data, type, offset_of(images, strides, i));
  }
};

// An image's slots, one a point, begin at a tile of their own. Images of one size, and those that
// take at most a few points, have the same number of tiles.
struct Slots {
  Images images;
  int channels = 0;
  int64_t each = 0;           // tiles an image; 0: as many as its offsets say
  int32_t* pixels = nullptr;  // of each slot, within its image
  int32_t* counts = nullptr;  // of each image: the slots that hold a point, which come first

  // `most` points of an image take part.
  Slots(const Images& images, int64_t channels, int64_t most = INT64_MAX)
      : images(images), channels(static_cast<int>(channels)) {
    const int64_t same = (std::min(images.pixels, most) + kTile - 1) / kTile;
    if (!images.offsets || same * images.images < tiles()) each = same;
  }

  void take(Workspace* workspace) {
    pixels = workspace->take<int32_t>(slots());
    counts = workspace->take<int32_t>(images.images);
  }

  __host__ __device__ int64_t tiles() const {
    if (each > 0 || !images.offsets || images.images == 0) return images.images * each;
    return images.total / kTile + images.images;
  }
  __host__ __device__ int64_t slots() const { return tiles() * kTile; }
  int64_t elements() const { return slots() * channels; }

  __device__ int64_t first_tile(int64_t image) const {
    return each > 0 ? image * each : images.start(image) / kTile + image;
  }
  __device__ int64_t first_slot(int64_t image) const { return first_tile(image) * kTile; }
  __device__ int64_t image_of_tile(int64_t tile) const {
    if (each > 0) return tile / each;
    int64_t low = 0, high = images.images;  // first_tile(low) <= tile < first_tile(high)
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      if (first_tile(middle) <= tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
  __device__ int64_t tiles_taken(int64_t image) const {
    return (int64_t{counts[image]} + kTile - 1) / kTile;
  }
  // Where channel d of a slot is; the slots of a tile lie side by side.
  __device__ int64_t at(int64_t slot, int d) const {
    return (slot / kTile * channels + d) * kTile + slot % kTile;
  }
};

// A tile, as one block of a kernel with a block a tile, or several, sees it.
struct Place {
  int64_t image, tile;  // tile: among all
  int64_t first;        // slot of the image
  int64_t taken;        // slots that hold a point, from there on

  __device__ Place(const Slots& slots, int64_t tile)
      : image(slots.image_of_tile(tile)), tile(tile) {
    first = slots.first_slot(image);
    taken = slots.counts[image];
  }
  // Where the offsets are none, no image has a slot, and its first one is nonsense.
  __device__ bool holds(int64_t slot) const { return taken > 0 && slot < first + taken; }
  // Whether the tile has any point.
  __device__ bool used() const { return holds(tile * kTile); }
};

// The slot of a thread in a kernel with a thread a slot, and the pixel of the batch whose point it
// holds, if any.
struct Seat {
  int64_t slot, image = 0, pixel = -1;

  __device__ explicit Seat(const Slots& slots)
      : slot(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) {
    if (slot / kTile >= slots.tiles()) return;
    const Place place(slots, slot / kTile);
    image = place.image;
    if (place.holds(slot)) pixel = slots.images.start(image) + slots.pixels[slot];
  }
  __device__ bool empty() const { return pixel < 0; }
};

inline int64_t blocks_of(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

// marks[i] = 1 for every point that takes part: a unit vector that is not masked out.
template <class A>
__global__ void __launch_bounds__(kThreads)
    mark_units_kernel(Slots slots, View<const A> points, Integers mask, uint8_t* marks) {
  const Images& images = slots.images;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= images.total) return;
  const A* x = points.at(images, i);
  double square = 0;
  for (int d = 0; d < slots.channels; ++d) {
    const double value = x[d * points.strides.channel];
    square += value * value;
  }
  const bool masked_out = mask.data && mask.at(images, i) == 0;
  marks[i] = !masked_out && is_unit(square) ? 1 : 0;
}

// Pixels with mark 1 get the slots of their image in their order, and so do the first `spare` of
// those with mark 2 (null: none). A block an image walks over all its pixels: next to what pairs
// cost, that is nothing.
static __global__ void __launch_bounds__(kThreads)
    collect_kernel(Slots slots, const uint8_t* marks, const int32_t* spare) {
  INSTEMBED_SHARED(int32_t, sums, kWarps);
  const int64_t image = blockIdx.x;
  const int64_t pixels = slots.images.count(image);
  const int64_t start = pixels > 0 ? slots.images.start(image) : 0;
  const int32_t room = spare ? spare[image] : 0;
  int32_t taken = 0, doubtful = 0;  // so far
  for (int64_t from = 0; from < pixels; from += kThreads) {
    const int64_t pixel = from + threadIdx.x;
    const int mark = pixel < pixels ? marks[start + pixel] : 0;
    int32_t certain = 0, maybe = 0;
    const int32_t taken_before = taken + sum_before<kWarps, int32_t>(mark == 1, sums, &certain);
    const int32_t maybe_before = doubtful + sum_before<kWarps, int32_t>(mark == 2, sums, &maybe);
    if (mark == 1 || (mark == 2 && maybe_before < room)) {
      const int32_t slot = taken_before + (maybe_before < room ? maybe_before : room);
      slots.pixels[slots.first_slot(image) + slot] = static_cast<int32_t>(pixel);
    }
    taken += certain;
    doubtful += maybe;
  }
  if (threadIdx.x == 0) slots.counts[image] = taken + (doubtful < room ? doubtful : room);
}

// to = the points at their slots, and zero in what is left of an image's last tile. A block a tile.
template <class A>
__global__ void __launch_bounds__(kThreads) pack_kernel(Slots slots, View<const A> points, A* to) {
  const Place place(slots, blockIdx.x);
  if (!place.used()) return;
  for (int k = static_cast<int>(threadIdx.x); k < slots.channels * kTile; k += kThreads) {
    const int d = k / kTile;
    const int64_t slot = place.tile * kTile + k % kTile;
    A value = 0;
    if (place.holds(slot)) {
      const int64_t pixel = slots.images.start(place.image) + slots.pixels[slot];
      value = points.at(slots.images, pixel)[d * points.strides.channel];
    }
    to[slots.at(slot, d)] = value;
  }
}

}  // namespace instembed::sphere::device
