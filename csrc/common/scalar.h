// Formulas that are written for vectors (common/simd.h), for one number at a time on any device.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define INSTEMBED_INLINE __host__ __device__ __forceinline__
#else
#define INSTEMBED_INLINE inline __attribute__((always_inline))
#endif

namespace instembed {

INSTEMBED_INLINE float sqrt_lanes(float v) { return sqrtf(v); }
INSTEMBED_INLINE double sqrt_lanes(double v) { return sqrt(v); }

// Zero for what is negative; a NaN stays one.
template <class V>
INSTEMBED_INLINE V clamp_negative(const V& v) {
  return v < 0 ? V{} : v;
}

// Zero where `by` is zero.
template <class V>
INSTEMBED_INLINE V keep_nonzero(const V& v, const V& by) {
  return by == 0 ? V{} : v;
}

}  // namespace instembed
