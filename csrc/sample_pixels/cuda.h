// Random pixels of each instance on CUDA: the entry points that the bindings call. No host
// synchronisation.
#pragma once

#include "sample_pixels/sample_pixels.h"

namespace instembed::sample_pixels {

// Indices of an image with more instances than there is room for, and of all images if the offsets
// are none.
constexpr int64_t kTooMany = -2;

int64_t cuda_workspace(const Array& labels, const Array* offsets, int64_t capacity,
                       int64_t samples);

// Arrays are those of Instances, and what is written is the same, for any capacity.
void sample_cuda(const Array& labels, const Array* offsets, const LabelRules& rules,
                 const Array& words, const Array& indices, const Array& valid,
                 const Array& workspace, int64_t stream);

}  // namespace instembed::sample_pixels
