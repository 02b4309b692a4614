// What a point reads: the pixels around it, at the corners of a cell, with their weights.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/scalar.h"

namespace instembed::gather_at {

// A point's place along one axis: between the centres of two pixels, or on one.
struct Between {
  int64_t low = 0, high = 0;
  double share = 0;  // of high
  double slope = 0;  // of the share with the coordinate: 0 beyond the outermost centres
};

INSTEMBED_INLINE Between on_pixel(int64_t pixel) { return {pixel, pixel, 0, 0}; }

INSTEMBED_INLINE Between between(double x, int64_t size) {
  if (!(x >= 0)) return on_pixel(0);
  if (x >= static_cast<double>(size - 1)) return on_pixel(size - 1);
  const double low = floor(x);
  return {static_cast<int64_t>(low), static_cast<int64_t>(low) + 1, x - low, 1};
}

// The place along x, y and z; along an axis that features lack, on pixel 0. Bit k of a corner says
// that it is the high one of axis k, so that the corners of the first axes come first.
struct Cell {
  Between on[3];

  INSTEMBED_INLINE int64_t pixel(int corner, int axis) const {
    return corner >> axis & 1 ? on[axis].high : on[axis].low;
  }
  INSTEMBED_INLINE double share(int corner, int axis) const {
    return corner >> axis & 1 ? on[axis].share : 1 - on[axis].share;
  }
  INSTEMBED_INLINE double weight(int corner) const {
    return share(corner, 0) * share(corner, 1) * share(corner, 2);
  }
  // The derivative of the weight along an axis.
  INSTEMBED_INLINE double slope(int corner, int axis) const {
    double slope = corner >> axis & 1 ? on[axis].slope : -on[axis].slope;
    for (int other = 0; other < 3; ++other) {
      if (other != axis) slope *= share(corner, other);
    }
    return slope;
  }
  INSTEMBED_INLINE int64_t offset(int corner, const int64_t* strides) const {
    return pixel(corner, 0) * strides[0] + pixel(corner, 1) * strides[1] +
           pixel(corner, 2) * strides[2];
  }
};

}  // namespace instembed::gather_at
