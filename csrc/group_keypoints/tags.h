// Distances between tags.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace instembed::group_keypoints {

// What is farther than this, or scores higher, is not told apart: costs stay finite.
constexpr double kFar = 1073741824.0;  // 2^30

inline double distance(const double* a, const double* b, int64_t dims) {
  double squares = 0;
  for (int64_t d = 0; d < dims; ++d) squares += (a[d] - b[d]) * (a[d] - b[d]);
  return std::min(std::sqrt(squares), kFar);
}

}  // namespace instembed::group_keypoints
