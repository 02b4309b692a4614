// Points by instance, on the device: slots in the order of instances, so that a sum over an
// instance is one over consecutive slots, in a fixed order.
//
// Points come as entries, in the order of their pixels. The leader of a point is the first entry of
// its instance; whoever finds instances says who leads whom. Instances are numbered by their
// leaders.
#pragma once

#include "sphere/cloud.cuh"

namespace instembed::sphere::device {

// That an image's entries are cut into, for as many blocks; members are counted apart in each.
constexpr int kParts = 16;

struct Segments {                // an element a slot, of its image
  int32_t* leaders = nullptr;    // of each entry
  int32_t* members = nullptr;    // (kParts, slots), of each leader: how many it leads in the part;
                                 // in the end, in the parts up to this one
  int32_t* sizes = nullptr;      // of each leader: how many it leads
  int32_t* numbers = nullptr;    // of each leader: its instance, from 0, or -1
  int32_t* begins = nullptr;     // of each instance: its first slot
  int32_t* lengths = nullptr;    // of each instance: its slots
  int32_t* instances = nullptr;  // of each slot
  int32_t* counts = nullptr;     // of each image: its instances

  void take(Workspace* workspace, const Slots& slots) {
    for (int32_t** array : {&leaders, &sizes, &numbers, &begins, &lengths, &instances}) {
      *array = workspace->take<int32_t>(slots.slots());
    }
    members = workspace->take<int32_t>(kParts * slots.slots());
    counts = workspace->take<int32_t>(slots.images.images);
  }
};

// Entries of each part of an image but the last: whole blocks of threads.
__device__ __forceinline__ int32_t entries_a_part(int32_t count) {
  return ((count - 1) / (kParts * kThreads) + 1) * kThreads;
}

// Members, which are zero before. A thread an entry.
static __global__ void __launch_bounds__(kThreads)
    count_members_kernel(Slots entries, Segments segments) {
  const Seat seat(entries);
  if (seat.empty()) return;
  const int64_t first = entries.first_slot(seat.image);
  const int64_t part = (seat.slot - first) / entries_a_part(entries.counts[seat.image]);
  atomicAdd(segments.members + part * entries.slots() + first + segments.leaders[seat.slot], 1);
}

// Sizes, and the members in the parts before. A thread an entry.
static __global__ void __launch_bounds__(kThreads)
    sum_members_kernel(Slots entries, Segments segments) {
  const Seat seat(entries);
  if (seat.empty() || segments.leaders[seat.slot] != seat.slot - entries.first_slot(seat.image)) {
    return;
  }
  const int64_t slots = entries.slots();
  int32_t members[kParts];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    members[part] = segments.members[part * slots + seat.slot];
  }
  int32_t before = 0;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    segments.members[part * slots + seat.slot] = before;
    before += members[part];
  }
  segments.sizes[seat.slot] = before;
}

// Numbers, begins and lengths of instances; those of less than min_size points are left out. A
// block an image walks over its entries, four a thread.
static __global__ void __launch_bounds__(kThreads)
    number_kernel(Slots entries, Slots slots, Segments segments, int64_t min_size) {
  constexpr int kQuad = 4;
  INSTEMBED_SHARED(int64_t, sums, kWarps);
  const int64_t image = blockIdx.x;
  const int32_t count = entries.counts[image];
  const int64_t first = count > 0 ? entries.first_slot(image) : 0;
  int64_t before = 0;  // instances, and in the upper half their points
  for (int64_t from = 0; from < count; from += kQuad * kThreads) {
    const int64_t own = from + kQuad * threadIdx.x;
    int32_t size[kQuad];
    bool leads[kQuad];
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const int64_t slot = first + own + k;
      leads[k] = own + k < count && segments.leaders[slot] == own + k;
      size[k] = own + k < count ? segments.sizes[slot] : 0;
    }
    int64_t mine = 0, all = 0;
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      if (leads[k] && size[k] >= min_size) mine += 1 + (int64_t{size[k]} << 32);
    }
    int64_t sum = before + sum_before<kWarps, int64_t>(mine, sums, &all);
    before += all;
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      if (!leads[k]) continue;
      const bool kept = size[k] >= min_size;
      const int64_t number = sum & 0xffffffff;
      segments.numbers[first + own + k] = kept ? static_cast<int32_t>(number) : -1;
      if (!kept) continue;
      segments.begins[first + number] = static_cast<int32_t>(sum >> 32);
      segments.lengths[first + number] = size[k];
      sum += 1 + (int64_t{size[k]} << 32);
    }
  }
  if (threadIdx.x > 0) return;
  segments.counts[image] = static_cast<int32_t>(before & 0xffffffff);
  slots.counts[image] = static_cast<int32_t>(before >> 32);
}

// Instances of slots, and the slots' pixels. A block a part.
static __global__ void __launch_bounds__(kThreads)
    order_kernel(Slots entries, Slots slots, Segments segments) {
  INSTEMBED_SHARED_VECTORS(int32_t, chunk, kThreads);
  const int64_t image = blockIdx.x / kParts;
  const int64_t part = blockIdx.x % kParts;
  const int32_t count = entries.counts[image], each = entries_a_part(count);
  const int64_t end = (part + 1) * each < count ? (part + 1) * each : count;
  const int64_t first = count > 0 ? entries.first_slot(image) : 0;
  const int tid = static_cast<int>(threadIdx.x);
  int32_t* members = segments.members + part * entries.slots() + first;
  for (int64_t from = part * each; from < end; from += kThreads) {
    const int64_t entry = from + tid;
    __syncthreads();  // the chunk before has been read, and what it wrote can be
    const int32_t leader = entry < end ? segments.leaders[first + entry] : -1;
    chunk[tid] = leader;
    __syncthreads();
    const int32_t instance = leader < 0 ? -1 : segments.numbers[first + leader];
    int32_t rank = leader < 0 ? 0 : members[leader];
    bool last = true;  // of its instance in the chunk
#pragma unroll 8
    for (int other = 0; other < kThreads; ++other) {
      const bool same = chunk[other] == leader;
      rank += same && other < tid ? 1 : 0;
      last = last && !(same && other > tid);
    }
    __syncthreads();  // members have been read
    if (instance < 0) continue;
    const int64_t slot = first + segments.begins[first + instance] + rank;
    slots.pixels[slot] = entries.pixels[first + entry];
    segments.instances[slot] = instance;
    if (last) members[leader] = rank + 1;
  }
}

// All of the above, from leaders on.
static inline void order(const Slots& entries, const Slots& slots, const Segments& segments,
                         int64_t min_size, Stream queue) {
  const int64_t blocks = blocks_of(entries.slots()), images = entries.images.images;
  fill_bytes(segments.members, 0, kParts * slots.slots() * 4, queue);
  launch(count_members_kernel, "count_members", blocks, kThreads, 0, queue, entries, segments);
  launch(sum_members_kernel, "sum_members", blocks, kThreads, 0, queue, entries, segments);
  launch(number_kernel, "number", images, kThreads, 0, queue, entries, slots, segments, min_size);
  launch(order_kernel, "order", images * kParts, kThreads, 0, queue, entries, slots, segments);
}

// sums[tile * channels + d] = the sum of channel d over a tile. A block a tile, a warp a channel.
template <class A>
__global__ void __launch_bounds__(kThreads)
    sum_tiles_kernel(Slots slots, const A* points, double* sums) {
  const Place place(slots, blockIdx.x);
  if (!place.used()) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int d = static_cast<int>(threadIdx.x) / kWarp; d < slots.channels; d += kWarps) {
    const int64_t at = slots.at(place.tile * kTile, d);
    const double sum = warp_sum(static_cast<double>(points[at + lane]) + points[at + kWarp + lane]);
    if (lane == 0) sums[place.tile * slots.channels + d] = sum;
  }
}

// sums[k * channels + d] = the sum of channel d over the instance k, counted like slots: the slots
// before its first whole tile, whole tiles, and what is left. `parts` blocks an image, a warp an
// instance, a lane a channel.
template <class A>
__global__ void __launch_bounds__(kThreads)
    sum_segments_kernel(Slots slots, Segments segments, const A* points, const double* tiles,
                        double* sums, int parts) {
  const int64_t image = blockIdx.x / parts;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int32_t instances = segments.counts[image];
  const int64_t first = instances > 0 ? slots.first_slot(image) : 0;
  const int warp = static_cast<int>(blockIdx.x % parts) * kWarps + threadIdx.x / kWarp;
  for (int64_t k = warp; k < instances; k += parts * kWarps) {
    const int64_t begin = first + segments.begins[first + k];
    const int64_t end = begin + segments.lengths[first + k];
    const int64_t whole = (begin + kTile - 1) / kTile * kTile, rest = end / kTile * kTile;
    for (int d = lane; d < slots.channels; d += kWarp) {
      double sum = 0;
      int64_t s = begin;
#pragma unroll 8
      for (; s < end && s < whole; ++s) sum += points[slots.at(s, d)];
#pragma unroll 8
      for (; s < rest; s += kTile) sum += tiles[s / kTile * slots.channels + d];
#pragma unroll 8
      for (; s < end; ++s) sum += points[slots.at(s, d)];
      sums[(first + k) * slots.channels + d] = sum;
    }
  }
}

// tiles = the sums of tiles, sums = those of instances.
template <class A>
void sum_instances(const Slots& slots, const Segments& segments, const A* points, double* tiles,
                   double* sums, Stream queue) {
  constexpr int kBlocks = 32;  // an image
  launch(sum_tiles_kernel<A>, "sum_tiles", slots.tiles(), kThreads, 0, queue, slots, points, tiles);
  launch(sum_segments_kernel<A>, "sum_segments", slots.images.images * kBlocks, kThreads, 0, queue,
         slots, segments, points, tiles, sums, kBlocks);
}

}  // namespace instembed::sphere::device
