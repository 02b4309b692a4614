// Distances between tags, and their rounding.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace instembed::group_keypoints {

// What is farther than this, or scores higher, is not told apart: costs stay finite.
constexpr double kFar = 1073741824.0;  // 2^30

// Half to even, for values from 0 to 2^51: adding 2^52 leaves a double no fraction.
template <class T>
inline T rounded(T value) {
  return (value + 4503599627370496.0) - 4503599627370496.0;
}

inline double distance(const double* a, const double* b, int64_t dims) {
  double squares = 0;
  for (int64_t d = 0; d < dims; ++d) squares += (a[d] - b[d]) * (a[d] - b[d]);
  return std::min(std::sqrt(squares), kFar);
}

}  // namespace instembed::group_keypoints
