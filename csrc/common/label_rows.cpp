#include "common/label_rows.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/simd.h"

namespace instembed {
namespace {

// Bit i says whether a[i] != b[i], for 64 elements.
template <class U>
INSTEMBED_INLINE uint64_t differences(const U* a, const U* b) {
  U any = 0;
  for (int i = 0; i < 64; ++i) any |= a[i] ^ b[i];
  if (!any) return 0;  // so it is inside of instances
  uint8_t flags[64];
  for (int i = 0; i < 64; ++i) flags[i] = a[i] != b[i];
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, flags + i, 8);
    bits |= (eight * 0x0102040810204080u >> 56) << i;  // byte k's lowest bit becomes bit k
  }
  return bits;
}

template <class U>
INSTEMBED_INLINE void find(const U* line, int64_t n, uint64_t* changed) {
  for (int64_t from = 0; from < n; from += 64) {
    uint64_t& bits = changed[from / 64];
    if (from > 0 && from + 64 <= n) {
      bits = differences(line + from, line + from - 1);
    } else if (n > 64 && from == 0) {
      bits = differences(line + 1, line) << 1;
    } else {
      bits = 0;
      for (int64_t i = from > 1 ? from : 1; i < n && i < from + 64; ++i) {
        bits |= static_cast<uint64_t>(line[i] != line[i - 1]) << (i - from);
      }
    }
  }
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

INSTEMBED_SIMD void find_changes(const uint8_t* line, int64_t n, uint64_t* changed) {
  find(line, n, changed);
}
INSTEMBED_SIMD void find_changes(const uint16_t* line, int64_t n, uint64_t* changed) {
  find(line, n, changed);
}
INSTEMBED_SIMD void find_changes(const uint32_t* line, int64_t n, uint64_t* changed) {
  find(line, n, changed);
}
INSTEMBED_SIMD void find_changes(const uint64_t* line, int64_t n, uint64_t* changed) {
  find(line, n, changed);
}

}  // namespace instembed
