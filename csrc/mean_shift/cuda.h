// Mean-shift grouping on CUDA: the entry points that the bindings call. No host synchronisation.
#pragma once

#include "mean_shift/mean_shift.h"

namespace instembed::mean_shift {

// Outputs as in Result::copy(), with a capacity that holds for every image. An image with more
// instances has a count of capacity + 1, and if the offsets are none, -1; its labels and tables are
// zero then.
struct CudaOutput {
  Array labels;      // (B, N) or (1, N) int64
  Array centers;     // (B, capacity, D) float32 or float64
  Array counts;      // (B, capacity) int64
  Array instances;   // (B,) int64
  Array iterations;  // (B,) int64
};

int64_t cuda_workspace(const Array& embeddings, const Array* mask, const Array* offsets,
                       const Options& options, int64_t capacity);

// Arrays are those of group() in mean_shift.h.
void group_cuda(const Array& embeddings, const Array* mask, const Array* offsets,
                const Options& options, const CudaOutput& output, const Array& workspace,
                int64_t stream);

}  // namespace instembed::mean_shift
