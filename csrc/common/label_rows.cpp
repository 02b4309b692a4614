#include "common/label_rows.h"

#include <algorithm>
#include <limits>

#include "common/simd.h"

namespace instembed {
namespace {

template <class U>
INSTEMBED_INLINE void find(const U* line, int64_t n, uint8_t* changed) {
  changed[0] = 0;
  for (int64_t i = 1; i < n; ++i) changed[i] = line[i] != line[i - 1];
  for (int64_t i = n; i % 8 != 0; ++i) changed[i] = 0;
}

}  // namespace

LabelGrid::LabelGrid(const Array& labels) {
  expect(labels.ndim >= 2 && labels.ndim <= 4,
         "labels: expected 1 to 3 dimensions after the batch");
  images = labels.shape[0];
  image_stride = labels.strides[0];
  int64_t* const sizes[] = {&width, &height, &depth};
  int64_t* const strides[] = {&x_stride, &y_stride, &z_stride};
  for (int k = 0; k < labels.ndim - 1; ++k) {
    *sizes[k] = labels.shape[labels.ndim - 1 - k];
    *strides[k] = labels.strides[labels.ndim - 1 - k];
  }
  if (std::max({depth, height, width}) > std::numeric_limits<int32_t>::max()) {
    throw std::length_error("labels: a dimension of 2^31 or more");
  }
}

INSTEMBED_SIMD void find_changes(const uint8_t* line, int64_t n, uint8_t* changed) {
  find(line, n, changed);
}
INSTEMBED_SIMD void find_changes(const uint16_t* line, int64_t n, uint8_t* changed) {
  find(line, n, changed);
}
INSTEMBED_SIMD void find_changes(const uint32_t* line, int64_t n, uint8_t* changed) {
  find(line, n, changed);
}
INSTEMBED_SIMD void find_changes(const uint64_t* line, int64_t n, uint8_t* changed) {
  find(line, n, changed);
}

}  // namespace instembed
