// One iteration of mean shift on the unit sphere, and its gradient. See cpu.cpp for how.
#pragma once

#include "common/array.h"
#include "recurrent_mean_shift/formula.h"

namespace instembed::recurrent_mean_shift {

// What the forward pass leaves for the backward pass, in the points' type: 1 for points that take
// no part.
struct State {
  Array norms;         // (B, N): |z_i|
  Array denominators;  // (B, N): sum_j K_ij
};

// points (B, D, N), or (1, D, N) with offsets (B + 1,), of float32 or float64 and any strides; mask
// (B, N) or (1, N) of an integer type, 0 where a point takes no part, or null. shifted has the
// points' shape and type. A point that takes no part, or is no unit vector, is copied.
void forward(const Array& points, const Array* mask, const Array* offsets, const Rule& rule,
             const Array& shifted, const State& state, int threads);

// grad_shifted and grad have the points' shape and type. The gradient is tangent to the sphere at
// every point that takes part.
void backward(const Array& grad_shifted, const Array& points, const Array& shifted,
              const Array* mask, const Array* offsets, const Rule& rule, const State& state,
              const Array& grad, int threads);

}  // namespace instembed::recurrent_mean_shift
