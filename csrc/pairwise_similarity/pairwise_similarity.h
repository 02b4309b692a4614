// The loss of deep metric learning over all pairs of sampled pixels, and its gradient. See cpu.cpp
// for how.
#pragma once

#include "common/array.h"

namespace instembed::pairwise_similarity {

// embeddings (B, D, N), or (1, D, N) for points, whose images are told apart by their indices only;
// indices (B, C, K) int64: pixels of each instance, counted over all N, -1 for none. Written, in
// the accumulation type: losses (B,), and if there is a `slopes` (B, C, K, D), the gradient of an
// image's loss with respect to the embedding of each pixel, zeros where there is none.
void forward(const Array& embeddings, const Array& indices, const Array& losses,
             const Array* slopes, int threads);

// grad (B, D, N), or (1, D, N), becomes grad_losses (B,) times the slopes, and zero at all other
// pixels. Its pixels or its channels lie side by side.
void backward(const Array& grad_losses, const Array& slopes, const Array& indices,
              const Array& grad, int threads);

}  // namespace instembed::pairwise_similarity
