// Sets that are united by many threads at once, without locks: a forest in which every entry knows
// a parent that comes before it, or itself.
//
// Only a root gets another parent, by compare-and-swap, and never becomes a root again. So what
// hangs together depends on the unions alone, not on their order, and the root of a set is its
// first entry.
#pragma once

#include <cstdint>

#include "common/cuda.h"

namespace instembed::group_on_sphere {

class Forest {
 public:
  __device__ explicit Forest(int32_t* parents) : parents_(parents) {}

  // Another thread may have changed it since.
  __device__ int32_t parent(int32_t entry) const {
    return *static_cast<const volatile int32_t*>(parents_ + entry);
  }

  // The root, and a shorter way to it. An entry that has been passed is no root: whatever is
  // written to it is an ancestor, by whoever comes last.
  __device__ int32_t find(int32_t entry) const {
    int32_t above = parent(entry);
    while (above != entry) {
      const int32_t next = parent(above);
      if (next != above) *static_cast<volatile int32_t*>(parents_ + entry) = next;
      entry = above;
      above = next;
    }
    return entry;
  }

  __device__ void unite(int32_t a, int32_t b) const {
    while (true) {
      a = find(a);
      b = find(b);
      if (a == b) return;
      const int32_t high = a < b ? b : a, low = a < b ? a : b;
      if (atomicCAS(parents_ + high, high, low) == high) return;
    }
  }

 private:
  int32_t* parents_;
};

}  // namespace instembed::group_on_sphere
