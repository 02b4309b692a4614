// Distances between tags.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "group_keypoints/formula.h"

namespace instembed::group_keypoints {

inline double distance(const double* a, const double* b, int64_t dims) {
  double squares = 0;
  for (int64_t d = 0; d < dims; ++d) squares += (a[d] - b[d]) * (a[d] - b[d]);
  return std::min(std::sqrt(squares), kFar);
}

}  // namespace instembed::group_keypoints
