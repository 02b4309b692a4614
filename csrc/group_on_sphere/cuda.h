// Connected components on the sphere on CUDA: the entry points that the bindings call. No host
// synchronisation.
#pragma once

#include "group_on_sphere/group_on_sphere.h"

namespace instembed::group_on_sphere {

int64_t cuda_workspace(const Array& points, const Array* offsets);

// Arrays are those of group() in group_on_sphere.h; results are those of mean shift
// (mean_shift/cuda.h), but for iterations.
struct CudaOutput {
  Array labels, centers, counts, instances;
};

void group_cuda(const Array& points, const Array* mask, const Array* offsets,
                const Options& options, const CudaOutput& output, const Array& workspace,
                int64_t stream);

}  // namespace instembed::group_on_sphere
