// Label statistics on CUDA: the entry points that the bindings call. No host synchronisation.
#pragma once

#include "label_statistics/label_statistics.h"

namespace instembed::label_statistics {

// Bytes of workspace for labels (B, *spatial) and a capacity of instances an image.
int64_t cuda_workspace(const Array& labels, int64_t capacity);

// Outputs as Result::copy writes them. An image with more instances than the capacity has zeros
// throughout, and capacity + 1 in num_instances.
void measure_cuda(const Array& labels, const LabelRules& rules, const Array& ids,
                  const Array& boxes, const Array& areas, const Array& centroids,
                  const Array& num_instances, const Array& workspace, int64_t stream);

}  // namespace instembed::label_statistics
