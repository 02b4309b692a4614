// Maps (B, C, H, W) of a floating type, with any strides, read as they lie.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/array.h"
#include "common/dtype.h"

namespace instembed::group_keypoints {

// A rectangle of a map: rows [y, y + rows), columns [x, x + columns).
struct Window {
  int64_t y, x, rows, columns;
};

struct Maps {
  Array array;

  int64_t images() const { return array.shape[0]; }
  int64_t channels() const { return array.shape[1]; }
  int64_t height() const { return array.shape[2]; }
  int64_t width() const { return array.shape[3]; }
  int64_t offset(int64_t b, int64_t c, int64_t y, int64_t x) const {
    return b * array.strides[0] + c * array.strides[1] + y * array.strides[2] +
           x * array.strides[3];
  }

  double at(int64_t b, int64_t c, int64_t pixel) const {
    const int64_t at = offset(b, c, pixel / width(), pixel % width());
    return dispatch_floating(array.dtype, "maps", [&](auto type) {
      return static_cast<double>(array.as<const decltype(type)>()[at]);
    });
  }

  // Into rows `stride` apart.
  void copy(int64_t b, int64_t c, const Window& window, float* to, int64_t stride) const;
  void copy(int64_t b, int64_t c, const Window& window, double* to, int64_t stride) const;
};

}  // namespace instembed::group_keypoints
