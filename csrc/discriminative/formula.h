// The discriminative loss's formulas for a vector of distances, shared by every kernel
// (De Brabandere, Neven, Van Gool 2017, arXiv 1708.02551).
#pragma once

#if defined(__CUDACC__) || defined(INSTEMBED_CUDA_ON_CPU)
#include "common/scalar.h"
#else
#include "common/simd.h"
#endif

namespace instembed::discriminative {

// Written so that a NaN stays one: bad embeddings must show in the loss.
template <class V>
INSTEMBED_INLINE V positive_part(const V& v) {
  return v < 0 ? V{} : v;
}

// |v| as a sum over channels goes on: squares for norm 2, magnitudes for norm 1.
template <int norm, class V>
INSTEMBED_INLINE V add_to_norm(const V& sum, const V& difference) {
  if constexpr (norm == 2) return sum + difference * difference;
  return sum + (difference < 0 ? -difference : difference);
}

template <int norm, class V>
INSTEMBED_INLINE V finish_norm(const V& sum) {
  if constexpr (norm == 2) return sqrt_lanes(sum);
  return sum;
}

// hinge * d|v|/dv = slope * direction(v), with subgradient 0 at zero distance.
template <int norm, class V>
INSTEMBED_INLINE V slope(const V& hinge, const V& distance) {
  if constexpr (norm == 2) {
    const V quotient = hinge / distance;  // by all lanes, whatever the distance: no branch
    return distance == 0 ? V{} : quotient;
  }
  return hinge;
}

template <int norm, class V>
INSTEMBED_INLINE V direction(const V& difference) {
  if constexpr (norm == 2) return difference;
  return difference > 0 ? V{} + 1 : (difference < 0 ? V{} - 1 : V{});
}

}  // namespace instembed::discriminative
