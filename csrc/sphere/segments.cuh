// Points by instance, on the device: slots in the order of instances, so that a sum over an
// instance is one over consecutive slots, in a fixed order.
//
// Points come as entries, in the order of their pixels. The leader of a point is the first entry of
// its instance; whoever finds instances says who leads whom. Instances are numbered by their
// leaders.
#pragma once

#include "sphere/cloud.cuh"

namespace instembed::sphere::device {

struct Segments {                // an element a slot, of its image
  int32_t* leaders = nullptr;    // of each entry
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
    counts = workspace->take<int32_t>(slots.images.images);
  }
};

// Sizes, which are zero before. A thread an entry.
static __global__ void __launch_bounds__(kThreads)
    count_members_kernel(Slots entries, Segments segments) {
  const Seat seat(entries);
  if (seat.empty()) return;
  const int64_t first = entries.first_slot(seat.image);
  atomicAdd(segments.sizes + first + segments.leaders[seat.slot], 1);
}

// Everything else, and the slots' pixels; instances of less than min_size points get no slots. A
// block an image walks over its entries twice.
static __global__ void __launch_bounds__(kThreads)
    order_kernel(Slots entries, Slots slots, Segments segments, int64_t min_size) {
  INSTEMBED_SHARED(int32_t, sums, kWarps);
  INSTEMBED_SHARED(int32_t, chunk, kThreads);
  const int64_t image = blockIdx.x;
  const int32_t count = entries.counts[image];
  const int64_t first = count > 0 ? entries.first_slot(image) : 0;
  const int tid = static_cast<int>(threadIdx.x);
  const int32_t* leaders = segments.leaders + first;
  const int32_t* sizes = segments.sizes + first;
  int32_t* numbers = segments.numbers + first;
  int32_t* begins = segments.begins + first;
  int32_t* lengths = segments.lengths + first;

  int32_t instances = 0, taken = 0;  // so far
  for (int32_t from = 0; from < count; from += kThreads) {
    const int32_t entry = from + tid;
    const bool leads = entry < count && leaders[entry] == entry;
    const bool kept = leads && sizes[entry] >= min_size;
    int32_t all_kept = 0, all_taken = 0;
    const int32_t number = instances + sum_before<kWarps, int32_t>(kept, sums, &all_kept);
    const int32_t begin =
        taken + sum_before<kWarps, int32_t>(kept ? sizes[entry] : 0, sums, &all_taken);
    if (leads) numbers[entry] = kept ? number : -1;
    if (kept) {
      begins[number] = begin;
      lengths[number] = 0;
    }
    instances += all_kept;
    taken += all_taken;
  }
  if (tid == 0) {
    segments.counts[image] = instances;
    slots.counts[image] = taken;
  }
  for (int32_t from = 0; from < count; from += kThreads) {
    const int32_t entry = from + tid;
    __syncthreads();  // the chunk before has been read, and what it wrote can be
    const int32_t instance = entry < count ? numbers[leaders[entry]] : -1;
    chunk[tid] = instance;
    __syncthreads();
    int32_t before = 0;
    bool last = true;  // of its instance in the chunk
    for (int other = 0; other < kThreads; ++other) {
      if (chunk[other] != instance) continue;
      before += other < tid ? 1 : 0;
      last = last && other <= tid;
    }
    const int32_t rank = instance < 0 ? 0 : lengths[instance] + before;
    __syncthreads();  // lengths have been read
    if (instance < 0) continue;
    const int64_t slot = first + begins[instance] + rank;
    slots.pixels[slot] = entries.pixels[first + entry];
    segments.instances[slot] = instance;
    if (last) lengths[instance] = rank + 1;
  }
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
#pragma unroll 1
      for (; s < end && s < whole; ++s) sum += points[slots.at(s, d)];
#pragma unroll 4
      for (; s < rest; s += kTile) sum += tiles[s / kTile * slots.channels + d];
#pragma unroll 1
      for (; s < end; ++s) sum += points[slots.at(s, d)];
      sums[(first + k) * slots.channels + d] = sum;
    }
  }
}

}  // namespace instembed::sphere::device
