// What decides membership. Kernels for every device share these few lines.
//
// A point is a member of the ball around `center` if the squared distance, computed in double with
// the channels added in order, is at most the squared bandwidth. Cheaper tests are used where they
// provably agree.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace instembed::mean_shift {

// `center` is anything with an index. A GPU loads `together` channels at a time.
template <int together = 4, class S, class Center>
INSTEMBED_HOST_DEVICE inline double squared_distance(const S* point, int64_t stride,
                                                     const Center& center, int dims) {
  double total = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll together
#endif
  for (int d = 0; d < dims; ++d) {
    const double difference =
        static_cast<double>(point[d * stride]) - static_cast<double>(center[d]);
    total += difference * difference;
  }
  return total;
}

// Relative bound on the error of a distance (not squared) computed in S: each difference, square
// and sum rounds once, which costs less than (dims + 2) / 2 units; the rest covers rounding of the
// thresholds themselves.
template <class S>
INSTEMBED_HOST_DEVICE inline double distance_error(int dims) {
  return (dims + 8) * (sizeof(S) == sizeof(float) ? 0x1p-23 : 0x1p-52);
}

// Whether squares of distances near `bandwidth` keep their precision in float.
INSTEMBED_HOST_DEVICE inline bool fits_float(double bandwidth) {
  return bandwidth >= 1e-15 && bandwidth <= 1e15;
}

// The distances below and above which a test in S, about a centre that is rounded to S, is certain.
template <class S>
struct Certain {
  S inner = 0, outer = 0;    // for bounding balls
  S inner2 = 0, outer2 = 0;  // squared, for points

  // `error2`: the squared distance between the centre and the rounded one.
  INSTEMBED_HOST_DEVICE static Certain of(int dims, double bandwidth, double error2) {
    Certain certain;
    const double relative = distance_error<S>(dims);
    const double error = sqrt(error2) * (1 + 1e-12);
    const double below = (bandwidth - error) * (1 - relative);
    const double above = (bandwidth + error) * (1 + relative);
    certain.inner = static_cast<S>(below);
    certain.outer = static_cast<S>(above);
    if (sizeof(S) == sizeof(double)) {
      certain.inner2 = certain.outer2 = static_cast<S>(bandwidth * bandwidth);
    } else {
      certain.inner2 = below > 0 ? static_cast<S>(below * below) : static_cast<S>(-1);
      certain.outer2 = static_cast<S>(above * above);
    }
    return certain;
  }
};

}  // namespace instembed::mean_shift
