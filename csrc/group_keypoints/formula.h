// What the grouping of keypoints decides by, on any device.
#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace instembed::group_keypoints {

// What is farther than this, or scores higher, is not told apart: costs stay finite.
constexpr double kFar = 1073741824.0;  // 2^30

// Half to even, for values from 0 to 2^51: adding 2^52 leaves a double no fraction.
template <class T>
INSTEMBED_INLINE T rounded(T value) {
  return (value + 4503599627370496.0) - 4503599627370496.0;
}

INSTEMBED_INLINE bool is_finite(double value) { return value - value == 0; }

// A quarter of a pixel towards the higher of two neighbours.
INSTEMBED_INLINE double quarter(double before, double after) {
  if (!is_finite(before) || !is_finite(after) || before == after) return 0;
  return after > before ? 0.25 : -0.25;
}

struct Point {
  double x, y;
};

// A joint at a pixel of a heatmap, at(pixel), adjusted or not.
template <class At>
INSTEMBED_INLINE Point place(At&& at, int64_t pixel, int64_t height, int64_t width, bool adjust) {
  const int64_t x = pixel % width, y = pixel / width;
  Point point{static_cast<double>(x), static_cast<double>(y)};
  if (adjust && x > 0 && x + 1 < width) point.x += quarter(at(pixel - 1), at(pixel + 1));
  if (adjust && y > 0 && y + 1 < height) point.y += quarter(at(pixel - width), at(pixel + width));
  return point;
}

}  // namespace instembed::group_keypoints
