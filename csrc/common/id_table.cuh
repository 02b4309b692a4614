// Arbitrary 64-bit ids to consecutive slots on the device: a hash table an image.
//
// insert() finds or adds an id by compare-and-swap. Where an id lands depends on who comes first;
// what does not is its rank among the image's ids, which is its slot: rank_ids() counts smaller
// ids. A table that meets more ids than its capacity says so by a count above it, and holds nothing
// then.
#pragma once

#include <cstdint>

#include "common/array.h"
#include "common/cuda.h"
#include "common/label_runs.h"
#include "common/numbers.cuh"

namespace instembed::cuda {

// An id that stands for an empty place. The id itself lives in a place of its own, the last.
constexpr uint64_t kEmptyKey = 0x7fff2d6b9c4e1a85u;

struct IdTables {            // of all images, image after image
  uint64_t* keys = nullptr;  // places() each
  int32_t* list = nullptr;   // capacity each: places in the order of arrival
  int32_t* counts = nullptr;
  int32_t capacity = 0;
  int32_t size = 0;  // hashed places, a power of two of at least twice the capacity

  __host__ __device__ int32_t places() const { return size + 1; }

  static int32_t size_for(int64_t capacity) {
    int64_t size = 64;
    while (size < 2 * capacity) size *= 2;
    if (size > (int64_t{1} << 30)) throw std::length_error("max_instances: too many");
    return static_cast<int32_t>(size);
  }

  void take(Workspace* workspace, int64_t images, int64_t instances) {
    capacity = static_cast<int32_t>(instances);
    size = size_for(instances);
    keys = workspace->take<uint64_t>(images * places());
    list = workspace->take<int32_t>(images * capacity);
    counts = workspace->take<int32_t>(images);
  }
};

static __global__ void __launch_bounds__(256) clear_tables_kernel(IdTables tables, int64_t images) {
  const int64_t n = images * tables.places();
  const int64_t step = static_cast<int64_t>(gridDim.x) * 256;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < n; i += step) {
    // The last place of an image is that of the id kEmptyKey: any other value says it is free.
    tables.keys[i] = i % tables.places() == tables.size ? ~kEmptyKey : kEmptyKey;
    if (i < images) tables.counts[i] = 0;
  }
}

static inline void clear_tables(const IdTables& tables, int64_t images, Stream stream) {
  const int64_t n = images * tables.places();
  launch(clear_tables_kernel, "clear_tables", (n + 1023) / 1024, 256, 0, stream, tables, images);
}

// The place of an id in an image's table, or -1 if the table is full.
__device__ __forceinline__ int32_t insert(const IdTables& tables, int64_t image, int64_t id) {
  uint64_t* keys = tables.keys + image * tables.places();
  const auto key = static_cast<uint64_t>(id);
  // Consecutive ids fall far apart, and so do multiples of a power of two.
  auto place = static_cast<int32_t>((key * 0x9e3779b97f4a7c15u) >> 33) & (tables.size - 1);
  uint64_t free = kEmptyKey;
  if (key == kEmptyKey) {
    place = tables.size;
    free = ~kEmptyKey;
  }
  for (int32_t probe = 0; probe < tables.size; ++probe) {
    uint64_t found = *static_cast<const volatile uint64_t*>(keys + place);
    if (found == key) return place;
    // Where many ids come at once, they fill the table before the first look at the count.
    if (found == free || probe % 8 == 7) {
      if (*static_cast<const volatile int32_t*>(tables.counts + image) > tables.capacity) return -1;
    }
    if (found == free) {
      found =
          atomicCAS(reinterpret_cast<unsigned long long*>(keys + place),
                    static_cast<unsigned long long>(free), static_cast<unsigned long long>(key));
      if (found == free) {
        const int32_t arrival = atomicAdd(tables.counts + image, 1);
        if (arrival < tables.capacity) {
          tables.list[image * tables.capacity + arrival] = place;
        }
        return place;
      }
      if (found == key) return place;
    }
    place = (place + 1) & (tables.size - 1);
  }
  return -1;
}

// The number of ids of an image, 0 if they are too many.
__device__ __forceinline__ int32_t instances_of(const IdTables& tables, int64_t image) {
  const int32_t count = tables.counts[image];
  return count > tables.capacity ? 0 : count;
}

// Blocks of 256 threads an image that share in the ranking.
inline int64_t rank_blocks(int64_t capacity) {
  return capacity < 8192 ? (capacity + 255) / 256 : 32;
}

// f(place, rank, id) for each id of `image`, rank by ascending id, by `parts` blocks of 256 threads
// of which this one is `part`.
template <class F>
__device__ __forceinline__ void rank_ids(const IdTables& tables, int64_t image, int part, int parts,
                                         F&& f) {
  INSTEMBED_SHARED(int64_t, tile, 256);
  const int32_t n = instances_of(tables, image);
  const uint64_t* keys = tables.keys + image * tables.places();
  const int32_t* list = tables.list + image * tables.capacity;
  for (int32_t first = part * 256; first < n; first += parts * 256) {
    const int32_t mine = first + static_cast<int32_t>(threadIdx.x);
    const int32_t place = mine < n ? list[mine] : 0;
    const auto id = static_cast<int64_t>(keys[place]);
    int32_t rank = 0;
    for (int32_t from = 0; from < n; from += 256) {
      __syncthreads();  // the tile before has been read
      const int32_t other = from + static_cast<int32_t>(threadIdx.x);
      if (other < n) tile[threadIdx.x] = static_cast<int64_t>(keys[list[other]]);
      __syncthreads();
      const int32_t count = n - from < 256 ? n - from : 256;
      for (int32_t k = 0; k < count; ++k) rank += tile[k] < id ? 1 : 0;
    }
    if (mine < n) f(place, rank, id);
  }
}

// LabelRules as a kernel takes them.
struct DeviceRules {
  int64_t background = 0, ignored = 0;
  bool has_background = false, has_ignored = false;

  static DeviceRules of(const LabelRules& rules) {
    return {rules.background.value_or(0), rules.ignore_index.value_or(0),
            rules.background.has_value(), rules.ignore_index.has_value()};
  }

  __device__ bool is_background(int64_t id) const { return has_background && id == background; }
  __device__ bool is_ignored(int64_t id) const { return has_ignored && id == ignored; }
};

}  // namespace instembed::cuda
