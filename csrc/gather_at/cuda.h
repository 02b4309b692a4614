// Features at points on CUDA: the entry points that the bindings call. No host synchronisation.
#pragma once

#include "gather_at/gather_at.h"

namespace instembed::gather_at {

// As forward() and backward(). backward_cuda() needs a workspace for the gradient of the features.
void forward_cuda(const Array& features, const Query& query, const Array& values, int64_t stream);

int64_t cuda_workspace(const Array& features, const Query& query);

void backward_cuda(const Array& grad_values, const Array& features, const Query& query,
                   const Array* grad_features, const Array* grad_points, const Array& workspace,
                   int64_t stream);

}  // namespace instembed::gather_at
