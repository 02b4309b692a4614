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

// Images in pieces of `size` pixels or less: no piece has pixels of two images, and an image's lie
// side by side. Images of one size have the same number of pieces, and so have those of at most a
// few pixels; others as many as their offsets say, some of which are empty.
template <int size>
struct Pieces {
  Images images;
  int64_t each = 0;  // pieces an image; 0: as the offsets say

  // `most` pixels of an image count.
  explicit Pieces(const Images& images, int64_t most = INT64_MAX) : images(images) {
    const int64_t same = (std::min(images.pixels, most) + size - 1) / size;
    if (!images.offsets || same * images.images < number()) each = same;
  }

  __host__ __device__ int64_t number() const {
    if (each > 0 || !images.offsets || images.images == 0) return images.images * each;
    return images.total / size + images.images;
  }
  __device__ int64_t first(int64_t image) const {
    return each > 0 ? image * each : images.start(image) / size + image;
  }
  __device__ int64_t image_of(int64_t piece) const {
    if (each > 0) return piece / each;
    int64_t low = 0, high = images.images;  // first(low) <= piece < first(high)
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      if (first(middle) <= piece) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// An image's slots, one a point, begin at a tile of their own.
struct Slots : Pieces<kTile> {
  int channels = 0;
  int32_t* pixels = nullptr;  // of each slot, within its image
  int32_t* counts = nullptr;  // of each image: the slots that hold a point, which come first

  // `most` points of an image take part.
  Slots(const Images& images, int64_t channels, int64_t most = INT64_MAX)
      : Pieces(images, most), channels(static_cast<int>(channels)) {}

  void take(Workspace* workspace) {
    pixels = workspace->take<int32_t>(slots());
    counts = workspace->take<int32_t>(images.images);
  }

  __host__ __device__ int64_t tiles() const { return number(); }
  __host__ __device__ int64_t slots() const { return tiles() * kTile; }
  int64_t elements() const { return slots() * channels; }

  __device__ int64_t first_tile(int64_t image) const { return first(image); }
  __device__ int64_t first_slot(int64_t image) const { return first(image) * kTile; }
  __device__ int64_t image_of_tile(int64_t tile) const { return image_of(tile); }
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

// What is said of each pixel, and how often in each chunk of an image. Pixels with mark 1 take
// part, and the first few of an image's pixels with mark 2.
struct Marks {
  using Chunks = Pieces<4 * kThreads>;
  Chunks chunks;
  uint8_t* values = nullptr;  // of each pixel
  int64_t* counts = nullptr;  // of each chunk: marks 1, and in the upper half marks 2; in the end,
                              // of the chunks of its image that come before

  explicit Marks(const Images& images) : chunks(images) {}

  void take(Workspace* workspace) {
    values = workspace->take<uint8_t>(chunks.images.total);
    counts = workspace->take<int64_t>(chunks.number());
  }

  __device__ static int64_t certain(int64_t counts) { return counts & 0xffffffff; }
  __device__ static int64_t doubtful(int64_t counts) { return counts >> 32; }
};

// What a thread of a kernel with a block a chunk sees: four pixels side by side.
struct Quad {
  static constexpr int kPixels = 4;
  int64_t image;
  int64_t first = 0;  // pixel of the batch
  int pixels = 0;     // 0 to 4, from there on

  __device__ explicit Quad(const Marks::Chunks& chunks) : image(chunks.image_of(blockIdx.x)) {
    const int64_t count = chunks.images.count(image);
    if (count == 0) return;  // the offsets may be none
    const int64_t chunk = blockIdx.x - chunks.first(image);
    const int64_t pixel = (chunk * kThreads + threadIdx.x) * kPixels, left = count - pixel;
    first = chunks.images.start(image) + pixel;
    pixels = static_cast<int>(left < 0 ? 0 : left < kPixels ? left : kPixels);
  }
  // Bit k: whether pixel k has this mark.
  __device__ unsigned marked(const Marks& marks, int mark) const {
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      if (k < pixels && marks.values[first + k] == mark) bits |= 1u << k;
    }
    return bits;
  }
};

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

// The marks of each chunk. A block a chunk.
static __global__ void __launch_bounds__(kThreads) count_marks_kernel(Marks marks) {
  INSTEMBED_SHARED(int64_t, sums, kWarps);
  const Quad quad(marks.chunks);
  const int64_t mine =
      __popc(quad.marked(marks, 1)) + (int64_t{__popc(quad.marked(marks, 2))} << 32);
  int64_t all = 0;
  sum_before<kWarps, int64_t>(mine, sums, &all);
  if (threadIdx.x == 0) marks.counts[blockIdx.x] = all;
}

// To the marks of the chunks before, and the number of slots. A block an image.
static __global__ void __launch_bounds__(kThreads)
    sum_marks_kernel(Slots slots, Marks marks, const int32_t* spare) {
  INSTEMBED_SHARED(int64_t, sums, kWarps);
  constexpr int64_t kChunk = Quad::kPixels * kThreads;
  const int64_t image = blockIdx.x;
  const int64_t chunks = (slots.images.count(image) + kChunk - 1) / kChunk;
  int64_t* counts = marks.counts + (chunks > 0 ? marks.chunks.first(image) : 0);
  int64_t before = 0;
  for (int64_t from = 0; from < chunks; from += kThreads) {
    const int64_t chunk = from + threadIdx.x;
    int64_t all = 0;
    const int64_t mine = chunk < chunks ? counts[chunk] : 0;
    const int64_t sum = before + sum_before<kWarps, int64_t>(mine, sums, &all);
    if (chunk < chunks) counts[chunk] = sum;
    before += all;
  }
  if (threadIdx.x == 0) {
    const int64_t room = spare ? spare[image] : 0;
    slots.counts[image] =
        static_cast<int32_t>(Marks::certain(before) + min(Marks::doubtful(before), room));
  }
}

// Pixels that take part get the slots of their image in their order. A block a chunk.
static __global__ void __launch_bounds__(kThreads)
    give_slots_kernel(Slots slots, Marks marks, const int32_t* spare) {
  INSTEMBED_SHARED(int64_t, sums, kWarps);
  const Quad quad(marks.chunks);
  const unsigned ones = quad.marked(marks, 1), twos = quad.marked(marks, 2);
  int64_t all = 0;
  const int64_t inside =
      sum_before<kWarps, int64_t>(__popc(ones) + (int64_t{__popc(twos)} << 32), sums, &all);
  if (quad.pixels == 0) return;
  const int64_t before = marks.counts[blockIdx.x] + inside;
  int64_t taken = Marks::certain(before), maybe = Marks::doubtful(before);
  const int64_t room = spare ? spare[quad.image] : 0;
  const int64_t first = slots.first_slot(quad.image), start = slots.images.start(quad.image);
#pragma unroll
  for (int k = 0; k < Quad::kPixels; ++k) {
    const bool one = ones >> k & 1, two = twos >> k & 1;
    if (one || (two && maybe < room)) {
      slots.pixels[first + taken + min(maybe, room)] = static_cast<int32_t>(quad.first + k - start);
    }
    taken += one;
    maybe += two;
  }
}

// Gives slots to the pixels with mark 1, and to the first `spare` of those with mark 2 (null:
// none).
static inline void give_slots(const Slots& slots, const Marks& marks, const int32_t* spare,
                              Stream queue) {
  const int64_t chunks = marks.chunks.number();
  launch(count_marks_kernel, "count_marks", chunks, kThreads, 0, queue, marks);
  launch(sum_marks_kernel, "sum_marks", slots.images.images, kThreads, 0, queue, slots, marks,
         spare);
  launch(give_slots_kernel, "give_slots", chunks, kThreads, 0, queue, slots, marks, spare);
}

// to = the points at their slots, and zero in what is left of an image's last tile. A block a tile.
template <class A>
__global__ void __launch_bounds__(kThreads) pack_kernel(Slots slots, View<const A> points, A* to) {
  const Place place(slots, blockIdx.x);
  if (!place.used()) return;
  constexpr int kStep = kThreads / kTile, kAhead = 4;  // channels: of two threads, and read at once
  const int64_t slot = place.tile * kTile + threadIdx.x % kTile;
  const bool holds = place.holds(slot);
  const A* from = nullptr;
  if (holds) {
    from = points.at(slots.images, slots.images.start(place.image) + slots.pixels[slot]);
  }
  for (int first = static_cast<int>(threadIdx.x) / kTile; first < slots.channels;
       first += kAhead * kStep) {
    A values[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int d = first + k * kStep;
      values[k] = holds && d < slots.channels ? from[d * points.strides.channel] : A(0);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int d = first + k * kStep;
      if (d < slots.channels) to[slots.at(slot, d)] = values[k];
    }
  }
}

}  // namespace instembed::sphere::device
