// Points of the unit sphere, ordered so that neighbours in memory are neighbours on the sphere, and
// cut into tiles.
#pragma once

#include <cstdint>
#include <vector>

#include "common/lines.h"

namespace instembed::sphere {

constexpr int64_t kTile = 64;   // points a tile, at most
constexpr int64_t kGroup = 16;  // a tile is padded to a multiple of this many slots

struct Tiles {
  std::vector<int64_t> begin{0};  // tile t has slots begin[t] to begin[t + 1]
  std::vector<int32_t> point;     // of each slot, -1 where there is none

  int64_t size() const { return static_cast<int64_t>(begin.size()) - 1; }
  int64_t slots() const { return begin.back(); }
};

// Point i is at rows + i * padded, whole vectors. Depends on the points alone, not on threads.
template <class A>
Tiles order_points(const A* rows, int64_t points, int64_t padded, int threads);

}  // namespace instembed::sphere
