// What the kernels of the discriminative loss on the CPU read and add to.
//
// Tables have a row of `padded` elements an instance and a last row, of zeros, for pixels of no
// instance; what lands in that row of the sums is dropped.
#pragma once

#include <cstdint>

namespace instembed::discriminative {

template <class A>
struct Tables {
  int64_t channels, padded;
  int32_t instances;
  const A* means;
};

template <class A>
struct Spread {     // what the second pass adds up for each instance
  double* squares;  // hinge^2
  double* pulls;    // slope * direction, a row an instance; null if no gradient is wanted
};

template <class A>
struct GradientTables {
  const A* scale;         // an instance: d loss / d (hinge^2 / 2)
  const A* through_mean;  // a row an instance: what every pixel of it receives through the mean
};

// Background pixels against every mean.
template <class A>
struct Push {
  A margin;
  double* squares;     // one number, or null
  double* mean_grads;  // a row an instance: the sum of slope * direction, or null
  A* out;              // the pixels' own gradients, times `scale`, or null
  A scale;
  int64_t out_channel_stride, out_pixel_stride;
};

}  // namespace instembed::discriminative
