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

}  // namespace instembed
