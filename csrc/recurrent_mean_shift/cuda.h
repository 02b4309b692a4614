// Mean shift on the sphere on CUDA: the entry points that the bindings call. No host
// synchronisation.
#pragma once

#include "recurrent_mean_shift/recurrent_mean_shift.h"

namespace instembed::recurrent_mean_shift {

int64_t cuda_workspace(const Array& points, const Array* offsets, bool backward);

// Arrays are those of forward() and backward() in recurrent_mean_shift.h. Where the offsets are
// none, everything written is NaN.
void forward_cuda(const Array& points, const Array* mask, const Array* offsets, const Rule& rule,
                  const Array& shifted, const State& state, const Array& workspace, int64_t stream);

void backward_cuda(const Array& grad_shifted, const Array& points, const Array& shifted,
                   const Array* mask, const Array* offsets, const Rule& rule, const State& state,
                   const Array& grad, const Array& workspace, int64_t stream);

}  // namespace instembed::recurrent_mean_shift
