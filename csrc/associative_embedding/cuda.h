// The associative embedding loss on CUDA: the entry points that the bindings call. No host
// synchronisation.
#pragma once

#include "associative_embedding/associative_embedding.h"

namespace instembed::associative_embedding {

// Bytes of workspace, forward and backward.
int64_t cuda_workspace(int64_t images, int64_t people);

// As forward() and backward().
void forward_cuda(const Array& tags, const Array* keypoints, const Array& visible, const Push& push,
                  const Array& terms, const State& state, const Array& workspace, int64_t stream);

void backward_cuda(const Array& grad_terms, const Array& tags, const State& state, bool gathered,
                   const Array& grad, const Array& workspace, int64_t stream);

}  // namespace instembed::associative_embedding
