// The cosine margin loss on CUDA: the entry points that the bindings call. No host synchronisation.
#pragma once

#include "cosine_margin/cosine_margin.h"

namespace instembed::cosine_margin {

int64_t cuda_workspace(const Array& points, const Array* offsets, const Array* keys,
                       const Sampling& sampling, bool gradient);

// Arrays are those of forward() in cosine_margin.h; keys are not negative. Where the offsets are
// none, losses and gradient are NaN.
void forward_cuda(const Array& points, const Array& labels, const Array* offsets, const Array* keys,
                  const Options& options, const Array& losses, const Array* gradient,
                  const Array& workspace, int64_t stream);

}  // namespace instembed::cosine_margin
