// Connected components of points on the unit sphere. See cpu.cpp for how.
#pragma once

#include "common/array.h"
#include "mean_shift/mean_shift.h"

namespace instembed::group_on_sphere {

struct Options {
  double threshold = 0.9;  // least cosine of two points that belong together
  int64_t min_size = 1;
  bool nearest = false;  // whether points of smaller components go to the nearest centre
};

// points (B, D, N), or (1, D, N) with offsets (B + 1,), of float32 or float64; mask (B, N) or (1,
// N) of an integer type, 0 where a point takes no part, or null; labels (B, N) or (1, N) of int64,
// contiguous, written. A point that is no unit vector gets label 0. Instances are those of mean
// shift: their centres are unit vectors.
mean_shift::Result group(const Array& points, const Array* mask, const Array* offsets,
                         const Options& options, const Array& labels, int threads);

}  // namespace instembed::group_on_sphere
