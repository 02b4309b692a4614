// Points in images, and the small arrays that come with them: coordinates and flags of any type.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/array.h"
#include "common/dtype.h"
#include "common/scalar.h"

namespace instembed {

// Element `index` of an array of any type as a double: one call an element, so that kernels need no
// copy for each type of a coordinate or a flag.
using Reader = double (*)(const void* data, int64_t index);

template <class T>
double read_as_double(const void* data, int64_t index) {
  return static_cast<double>(static_cast<const T*>(data)[index]);
}

inline Reader reader(DType dtype) {
  constexpr Reader readers[] = {
      // in the order of DType
      read_as_double<Half>,     read_as_double<BFloat16>, read_as_double<float>,
      read_as_double<double>,   read_as_double<int8_t>,   read_as_double<int16_t>,
      read_as_double<int32_t>,  read_as_double<int64_t>,  read_as_double<uint8_t>,
      read_as_double<uint16_t>, read_as_double<uint32_t>, read_as_double<uint64_t>};
  return readers[static_cast<int>(dtype)];
}

// The pixel that a coordinate lies in, -1 outside of [-0.5, size - 0.5) and for NaN. Ties go up.
// Not floor(x + 0.5), which is rounded itself.
INSTEMBED_INLINE int64_t nearest_pixel(double x, int64_t size) {
  const double below = floor(x);
  const double pixel = below + (x - below >= 0.5 ? 1 : 0);
  return pixel >= 0 && pixel < static_cast<double>(size) ? static_cast<int64_t>(pixel) : -1;
}

}  // namespace instembed
