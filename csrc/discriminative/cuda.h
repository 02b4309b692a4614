// The discriminative loss on CUDA: the entry points that the bindings call. No host
// synchronisation.
#pragma once

#include "discriminative/discriminative.h"

namespace instembed::discriminative {

// What forward leaves for backward. A capacity of instances holds for every image; an image with
// more has terms and gradients of NaN.
struct CudaState {
  Array images;   // (2 B + 1,) int64: instances of each image (-1: too many), its background
                  // pixels, and whether the offsets are none
  Array counts;   // (B, capacity) int64: pixels of each instance, in ascending order of id
  Array vectors;  // (4, B, capacity, D) in the accumulation type, 3 without background push: mean,
                  // and d term / d mean for terms 0, 1, 3
  Array slots;    // int32 words with a slot of slot_bytes() for each pixel
};

// Bytes of the slot of a pixel.
int64_t cuda_slot_bytes(int64_t capacity);

int64_t cuda_workspace(const Array& embeddings, const Array* offsets, const Options& options,
                       int64_t capacity, bool backward);

// Arrays are those of forward() and backward() in discriminative.h.
void forward_cuda(const Array& embeddings, const Array& labels, const Array* offsets,
                  const Options& options, const Array& terms, const CudaState& state,
                  const Array& workspace, int64_t stream);

void backward_cuda(const Array& embeddings, const Array* offsets, const Options& options,
                   const Array& grad_terms, const CudaState& state, const Array& grad,
                   const Array& workspace, int64_t stream);

}  // namespace instembed::discriminative
