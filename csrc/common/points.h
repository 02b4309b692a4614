// Points in images, and the small arrays that come with them: coordinates and flags of any type.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/array.h"
#include "common/dtype.h"

namespace instembed {

// Element `index` of an array of any type as a double: one call an element, so that kernels need no
// copy for each type of a coordinate or a flag.
using Reader = double (*)(const void* data, int64_t index);

inline Reader reader(DType dtype) {
  const auto of = [](auto type) -> Reader {
    using T = decltype(type);
    return [](const void* data, int64_t index) {
      return static_cast<double>(static_cast<const T*>(data)[index]);
    };
  };
  return dtype <= DType::f64 ? dispatch_floating(dtype, "points", of)
                             : dispatch_integer(dtype, "points", of);
}

// The pixel that a coordinate lies in, -1 outside of [-0.5, size - 0.5) and for NaN. Ties go up.
// Not floor(x + 0.5), which is rounded itself.
inline int64_t nearest_pixel(double x, int64_t size) {
  const double below = std::floor(x);
  const double pixel = below + (x - below >= 0.5 ? 1 : 0);
  return pixel >= 0 && pixel < static_cast<double>(size) ? static_cast<int64_t>(pixel) : -1;
}

}  // namespace instembed
