// Functions for vectors as wide as the target's registers.
//
// GCC keeps a vector of 64 bytes in memory where registers are narrower. Where that decides the
// speed, INSTEMBED_SIMD_WIDTHS(signature, body)
// defines the function once for each target, and the body finds its target's width in kBytes.
#pragma once

#include "common/simd.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__)
#define INSTEMBED_SIMD_WIDTH(architecture, bytes, signature, ...) \
  __attribute__((target(architecture), flatten)) signature {      \
    constexpr int kBytes = bytes;                                 \
    __VA_ARGS__;                                                  \
  }
#define INSTEMBED_SIMD_WIDTHS(signature, ...)                        \
  INSTEMBED_SIMD_WIDTH("default", 16, signature, __VA_ARGS__)        \
  INSTEMBED_SIMD_WIDTH("arch=x86-64-v3", 32, signature, __VA_ARGS__) \
  INSTEMBED_SIMD_WIDTH("arch=x86-64-v4", 64, signature, __VA_ARGS__)
#else
#define INSTEMBED_SIMD_WIDTHS(signature, ...) \
  signature {                                 \
    constexpr int kBytes = 16;                \
    __VA_ARGS__;                              \
  }
#endif

namespace instembed {

// One register of kBytes.
template <class A, int kBytes>
using Register = vector_t<A, kBytes / static_cast<int>(sizeof(A))>;

template <class V>
constexpr int kLanesOf = sizeof(V) / sizeof(Lane<V>);

// All bits set in the first `count` lanes.
template <class V>
INSTEMBED_INLINE auto first_of(int64_t count) {
  return first_lanes<Lane<V>, vector_t<MaskLane<Lane<V>>, kLanesOf<V>>>(count);
}

// A Vec<double> of sums in registers of kBytes: its total is that of the Vec, to the last bit.
template <int kBytes>
struct RegisterSum {
  static constexpr int lanes = kBytes / 8, count = 64 / kBytes;
  using V = vector_t<double, lanes>;
  V parts[count] = {};

  // Adds values(k), the `lanes` values from lane k on, of any type.
  template <class Values>
  INSTEMBED_INLINE void add(Values&& values) {
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) parts[k] += __builtin_convertvector(values(k * lanes), V);
  }

  INSTEMBED_INLINE double total() {
#pragma GCC unroll 4
    for (int n = count / 2; n > 0; n /= 2) {
#pragma GCC unroll 4
      for (int k = 0; k < n; ++k) parts[k] += parts[k + n];
    }
    return sum_lanes(parts[0]);
  }
};

}  // namespace instembed
