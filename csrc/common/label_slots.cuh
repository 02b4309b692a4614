// The labels of a batch to slots on the device: 0, 1, ... for the instances of an image, in
// ascending order of id.
//
// Labels are looked up in a hash table an image (common/id_table.cuh), by the run of one id and not
// by the pixel, and every pixel keeps the place of its id; then places are numbered. Whoever uses a
// pixel's place next turns it into the slot, or number_pixels() does.
#pragma once

#include <algorithm>

#include "common/id_table.cuh"
#include "common/images.cuh"
#include "common/label_runs.h"

namespace instembed::cuda {

constexpr int64_t kSegment = 512;  // pixels that one warp walks over

// A slot, or a place, for each pixel: in 16 bits where that is enough.
struct Codes {
  void* data;
  bool wide;

  __device__ int32_t operator[](int64_t i) const {
    return wide ? static_cast<const int32_t*>(data)[i] : static_cast<const int16_t*>(data)[i];
  }
  __device__ void set(int64_t i, int32_t code) const {
    if (wide) {
      static_cast<int32_t*>(data)[i] = code;
    } else {
      static_cast<int16_t*>(data)[i] = static_cast<int16_t>(code);
    }
  }
};

static __global__ void __launch_bounds__(256, 4)
    insert_labels_kernel(const void* labels, DType type, Strides strides, Images images,
                         DeviceRules rules, IdTables tables, Codes codes, int64_t* background) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (256 / kWarp) + threadIdx.x / kWarp;
  int64_t from = warp * kSegment;
  const int64_t end = from + kSegment < images.total ? from + kSegment : images.total;
  if (images.offsets && *images.invalid) return;
  while (from < end) {
    const int64_t image = images.image_of(from);
    const int64_t start = images.start(image);
    const int64_t image_end = start + images.count(image);
    const int64_t to = image_end < end ? image_end : end;
    const int64_t base = strides.at(images, image);
    int64_t last_id = 0;  // of the pixel before, and its code
    int last_code = 0;
    int64_t behind = 0;
    for (int64_t first = from; first < to; first += kAhead * kWarp) {
      int64_t at[kAhead], ids[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        at[k] = base + (first + k * kWarp + lane - start) * strides.pixel;
      }
      load_ids(labels, type, at, to - first - lane, ids);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int64_t i = first + k * kWarp + lane, id = ids[k];
        const bool inside = i < to;
        int64_t previous = __shfl_up_sync(kAllLanes, id, 1);
        if (lane == 0) previous = last_id;
        const bool head = inside && (i == from || id != previous);
        const unsigned heads = __ballot_sync(kAllLanes, head);
        int code = last_code;
        if (head) {
          if (rules.is_ignored(id)) {
            code = kIgnored;
          } else if (rules.is_background(id)) {
            code = kBackground;
          } else {
            const int32_t place = insert(tables, image, id);
            code = place < 0 ? kIgnored : place;  // a full table: the image is given up
          }
        }
        const unsigned before = heads & (0xffffffffu >> (kWarp - 1 - lane));
        const int source = before ? kWarp - 1 - __clz(static_cast<int>(before)) : lane;
        code = __shfl_sync(kAllLanes, code, source);
        if (inside) codes.set(i, code);
        const unsigned outside = __ballot_sync(kAllLanes, inside && code == kBackground);
        behind += __popc(outside);
        last_id = __shfl_sync(kAllLanes, id, kWarp - 1);
        last_code = __shfl_sync(kAllLanes, code, kWarp - 1);
      }
    }
    if (lane == 0 && behind > 0 && background) {
      atomicAdd(reinterpret_cast<unsigned long long*>(background + image),
                static_cast<unsigned long long>(behind));
    }
    from = to;
  }
}

// slots[place] is the rank of the id there, and ids, if wanted, are in that order.
static __global__ void __launch_bounds__(256)
    number_places_kernel(IdTables tables, int32_t* slots, int64_t* ids, int64_t* found, int parts) {
  const int64_t image = blockIdx.x / parts;
  const int part = static_cast<int>(blockIdx.x % parts);
  rank_ids(tables, image, part, parts, [&](int32_t place, int32_t rank, int64_t id) {
    slots[image * tables.places() + place] = rank;
    if (ids) ids[image * tables.capacity + rank] = id;
  });
  if (part == 0 && threadIdx.x == 0) {
    const int32_t count = tables.counts[image];
    found[image] = count > tables.capacity ? -1 : count;
  }
}

// The pixels' places to slots, kIgnored in images that are given up; counts (B, capacity), all zero
// before, become the slots' pixels. A warp takes kSegment of them, and adds to a count once a run.
static __global__ void __launch_bounds__(256)
    number_pixels_kernel(Images images, IdTables tables, const int32_t* slots, const int64_t* found,
                         Codes codes, int64_t* counts) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (256 / kWarp) + threadIdx.x / kWarp;
  int64_t from = warp * kSegment;
  const int64_t end = from + kSegment < images.total ? from + kSegment : images.total;
  if (images.offsets && *images.invalid) return;
  while (from < end) {
    const int64_t image = images.image_of(from);
    const int64_t image_end = images.start(image) + images.count(image);
    const int64_t to = image_end < end ? image_end : end;
    const bool given_up = found[image] < 0;
    const int32_t* of_place = slots + image * tables.places();
    const auto add = [&](int32_t slot, int length) {
      if (slot < 0) return;
      atomicAdd(reinterpret_cast<unsigned long long*>(counts + image * tables.capacity + slot),
                static_cast<unsigned long long>(length));
    };
    int32_t last = kIgnored;  // the slot of the pixel before, and the run that ends there
    int run = 0;
    for (; from < to; from += kAhead * kWarp) {
      int32_t own[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int64_t i = from + k * kWarp + lane;
        own[k] = i < to ? codes[i] : kIgnored;
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (own[k] >= 0) own[k] = given_up ? kIgnored : of_place[own[k]];
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int64_t i = from + k * kWarp + lane;
        if (i < to) codes.set(i, own[k]);
        int32_t before = __shfl_up_sync(kAllLanes, own[k], 1);
        if (lane == 0) before = last;
        const unsigned heads = __ballot_sync(kAllLanes, own[k] != before);
        if (heads == 0) {
          run += kWarp;
          continue;
        }
        const int first = __ffs(static_cast<int>(heads)) - 1;
        if (lane == first) add(before, run + first);
        const unsigned later = heads >> lane >> 1;  // of the lanes after
        if ((heads >> lane & 1) && later) add(own[k], __ffs(static_cast<int>(later)));
        last = __shfl_sync(kAllLanes, own[k], kWarp - 1);
        run = 1 + __clz(static_cast<int>(heads));
      }
    }
    if (lane == 0) add(last, run);
    from = to;
  }
}

struct LabelSlots {  // what the device needs meanwhile
  IdTables tables;
  int32_t* of_place = nullptr;  // tables.places() each image: the slot of the id there

  void take(Workspace* workspace, int64_t images, int64_t capacity) {
    tables.take(workspace, images, capacity);
    of_place = workspace->take<int32_t>(images * tables.places());
  }
};

// Bytes that a pixel's place, and slot, needs.
inline int64_t slot_bytes(int64_t capacity) {
  return IdTables::size_for(capacity) < INT16_MAX ? 2 : 4;
}

// Fills the places of all pixels of labels (B, N), or (1, N) with offsets, and slots.of_place.
// `found` has the number of an image's instances, -1 where they are more than the capacity. Wanted
// or null: `background`, an image's pixels of background, and `ids` (B, capacity), of which this
// sets those that are found.
static inline void find_slots(const LabelSlots& slots, const Array& labels, const Images& images,
                              const LabelRules& rules, const Codes& places, int64_t* found,
                              int64_t* background, int64_t* ids, Stream stream) {
  constexpr int kThreads = 256;
  clear_tables(slots.tables, images.images, stream);
  if (background) fill_bytes(background, 0, images.images * 8, stream);
  fill_bytes(slots.of_place, 0xff, images.images * slots.tables.places() * 4, stream);
  const DeviceRules device_rules = DeviceRules::of(rules);
  const int64_t warps = (images.total + kSegment - 1) / kSegment;
  launch(insert_labels_kernel, "insert_labels", (warps * kWarp + kThreads - 1) / kThreads, kThreads,
         0, stream, labels.data, labels.dtype, Strides{labels.strides[0], 0, labels.strides[1]},
         images, device_rules, slots.tables, places, background);
  const auto rankers = static_cast<int>(rank_blocks(slots.tables.capacity));
  launch(number_places_kernel, "number_places", images.images * rankers, kThreads, 0, stream,
         slots.tables, slots.of_place, ids, found, rankers);
}

// After find_slots(): places become slots, which are counted.
static inline void number_pixels(const LabelSlots& slots, const Images& images,
                                 const int64_t* found, const Codes& codes, int64_t* counts,
                                 Stream stream) {
  fill_bytes(counts, 0, images.images * slots.tables.capacity * 8, stream);
  const int64_t warps = (images.total + kSegment - 1) / kSegment;
  launch(number_pixels_kernel, "number_pixels", (warps * kWarp + 255) / 256, 256, 0, stream, images,
         slots.tables, slots.of_place, found, codes, counts);
}

}  // namespace instembed::cuda
