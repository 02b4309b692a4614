#include "group_keypoints/maps.h"

#include "common/simd.h"

namespace instembed::group_keypoints {
namespace {

constexpr int64_t kGroup = 16;

template <class T, class A>
INSTEMBED_INLINE void copy_body(const T* from, int64_t row_stride, int64_t column_stride,
                                const Window& window, A* to, int64_t stride) {
  for (int64_t y = 0; y < window.rows; ++y) {
    const T* row = from + y * row_stride;
    A* target = to + y * stride;
    int64_t x = 0;
    if (column_stride == 1) {  // windows are often small: no loop of unknown length for most of it
      for (; x + kGroup <= window.columns; x += kGroup) {
        for (int64_t i = 0; i < kGroup; ++i) target[x + i] = static_cast<A>(row[x + i]);
      }
    }
    for (; x < window.columns; ++x) target[x] = static_cast<A>(row[x * column_stride]);
  }
}

#define INSTEMBED_COPY(T, A)                                                                \
  INSTEMBED_SIMD void copy_window(const T* from, int64_t row_stride, int64_t column_stride, \
                                  const Window& window, A* to, int64_t stride) {            \
    copy_body(from, row_stride, column_stride, window, to, stride);                         \
  }
INSTEMBED_COPY(Half, float)
INSTEMBED_COPY(BFloat16, float)
INSTEMBED_COPY(float, float)
INSTEMBED_COPY(double, float)
INSTEMBED_COPY(Half, double)
INSTEMBED_COPY(BFloat16, double)
INSTEMBED_COPY(float, double)
INSTEMBED_COPY(double, double)
#undef INSTEMBED_COPY

template <class A>
void dispatch_copy(const Maps& maps, int64_t b, int64_t c, const Window& window, A* to,
                   int64_t stride) {
  const Array& array = maps.array;
  dispatch_floating(array.dtype, "maps", [&](auto type) {
    copy_window(array.as<const decltype(type)>() + maps.offset(b, c, window.y, window.x),
                array.strides[2], array.strides[3], window, to, stride);
  });
}

}  // namespace

void Maps::copy(int64_t b, int64_t c, const Window& window, float* to, int64_t stride) const {
  dispatch_copy(*this, b, c, window, to, stride);
}

void Maps::copy(int64_t b, int64_t c, const Window& window, double* to, int64_t stride) const {
  dispatch_copy(*this, b, c, window, to, stride);
}

}  // namespace instembed::group_keypoints
