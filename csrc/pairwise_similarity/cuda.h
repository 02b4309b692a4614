// The pairwise similarity loss on CUDA: the entry points that the bindings call. No host
// synchronisation.
#pragma once

#include "pairwise_similarity/pairwise_similarity.h"

namespace instembed::pairwise_similarity {

// Bytes of workspace for the forward pass.
int64_t cuda_workspace(const Array& embeddings, const Array& indices);

// Arrays are those of forward() and backward(). An image with an index that is neither of a pixel
// nor -1 has a loss that is NaN. No pixel is twice among an image's indices.
void forward_cuda(const Array& embeddings, const Array& indices, const Array& losses,
                  const Array* slopes, const Array& workspace, int64_t stream);

void backward_cuda(const Array& grad_losses, const Array& slopes, const Array& indices,
                   const Array& grad, int64_t stream);

}  // namespace instembed::pairwise_similarity
