#include "group_keypoints/maps.h"

#include "common/simd.h"
#include "common/tiles.h"

namespace instembed::group_keypoints {
namespace {

template <class A>
INSTEMBED_INLINE void copy_body(const Array& array, int64_t from, const Window& window, A* to,
                                int64_t stride) {
  dispatch_floating(array.dtype, "maps", [&](auto type) __attribute__((always_inline)) {
    using T = decltype(type);
    for (int64_t y = 0; y < window.rows; ++y) {
      const T* row = array.as<const T>() + from + y * array.strides[2];
      A* target = to + y * stride;
      if (array.strides[3] == 1) {
        for (int64_t x = 0; x < window.columns; ++x) target[x] = static_cast<A>(row[x]);
      } else {
        const int64_t step = array.strides[3];
        for (int64_t x = 0; x < window.columns; ++x) target[x] = static_cast<A>(row[x * step]);
      }
    }
  });
}

INSTEMBED_SIMD void copy_window(const Array& array, int64_t from, const Window& window, float* to,
                                int64_t stride) {
  copy_body(array, from, window, to, stride);
}
INSTEMBED_SIMD void copy_window(const Array& array, int64_t from, const Window& window, double* to,
                                int64_t stride) {
  copy_body(array, from, window, to, stride);
}

}  // namespace

void Maps::copy(int64_t b, int64_t c, const Window& window, float* to, int64_t stride) const {
  copy_window(array, offset(b, c, window.y, window.x), window, to, stride);
}

void Maps::copy(int64_t b, int64_t c, const Window& window, double* to, int64_t stride) const {
  copy_window(array, offset(b, c, window.y, window.x), window, to, stride);
}

}  // namespace instembed::group_keypoints
