// The ball of a seed, as a sum of squared differences sees it on any device.
#pragma once

#include "mean_shift/formula.h"

namespace instembed::seeds {

// The squared radius of a ball as a sum in A sees it: at most `inner` is certainly inside, more
// than `outer` certainly outside.
template <class A>
struct Radius {
  double exact = -1;
  A inner = -1, outer = -1;

  Radius() = default;
  INSTEMBED_HOST_DEVICE Radius(double squared, int dims) : exact(squared) {
    // Differences below the smallest normal number square to less than this.
    const double tiny = sizeof(A) == 4 ? 1e-36 : 1e-300;
    const double error = 2 * mean_shift::distance_error<A>(dims);
    inner = static_cast<A>(squared * (1 - error) - tiny);
    outer = static_cast<A>(squared * (1 + error) + tiny);
  }
};

}  // namespace instembed::seeds
