// What decides membership. Kernels for every device share these few lines.
//
// A point is a member of the ball around `center` if the squared distance, computed in double with
// the channels added in order, is at most the squared bandwidth. Cheaper tests are used where they
// provably agree.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define INSTEMBED_HOST_DEVICE __host__ __device__
#else
#define INSTEMBED_HOST_DEVICE
#endif

namespace instembed::mean_shift {

template <class S>
INSTEMBED_HOST_DEVICE inline double squared_distance(const S* point, int64_t stride,
                                                     const double* center, int dims) {
  double total = 0;
  for (int d = 0; d < dims; ++d) {
    const double difference = static_cast<double>(point[d * stride]) - center[d];
    total += difference * difference;
  }
  return total;
}

// Relative bound on the error of a distance (not squared) computed in S: each difference, square
// and sum rounds once, which costs less than (dims + 2) / 2 units; the rest covers rounding of the
// thresholds themselves.
template <class S>
INSTEMBED_HOST_DEVICE inline double distance_error(int dims) {
  return (dims + 8) * static_cast<double>(std::numeric_limits<S>::epsilon());
}

// Whether squares of distances near `bandwidth` keep their precision in float.
INSTEMBED_HOST_DEVICE inline bool fits_float(double bandwidth) {
  return bandwidth >= 1e-15 && bandwidth <= 1e15;
}

}  // namespace instembed::mean_shift
