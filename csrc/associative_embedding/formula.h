// What two people add to the push term (Newell, Huang, Deng 2017, arXiv 1611.05424; the hinge is
// CornerNet's, arXiv 1808.01244).
#pragma once

#include <algorithm>
#include <cmath>

#include "common/scalar.h"

namespace instembed::associative_embedding {

class Push {
 public:
  Push(bool hinge, double sigma, double margin)
      : hinge_(hinge), rate_(std::min(0.5 / (sigma * sigma), 1e300)), margin_(margin) {}

  struct Pair {
    double value;
    double slope;  // d value / d a = slope (a - b)
  };

  // Written so that a NaN stays one: bad tags must show in the loss.
  INSTEMBED_INLINE Pair operator()(double square) const {
    if (!hinge_) {
      const double value = exp(-rate_ * square);
      return {value, -2 * rate_ * value};
    }
    const double distance = sqrt(square), gap = margin_ - distance;
    if (gap <= 0) return {0, 0};
    return {gap, distance == 0 ? 0 : -1 / distance};
  }

 private:
  bool hinge_;
  double rate_;    // exp(-rate |a - b|^2), finite for any sigma
  double margin_;  // [margin - |a - b|]+
};

}  // namespace instembed::associative_embedding
