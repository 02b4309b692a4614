// Instance pooling on CUDA: the entry points that the bindings call. No host synchronisation.
#pragma once

#include "instance_pool/instance_pool.h"

namespace instembed::instance_pool {

// Bytes of workspace for pool_cuda() and for spread_cuda(), which has no use for `reduce`.
int64_t pool_workspace(const Array& features, const Array* offsets, Reduce reduce,
                       int64_t capacity);
int64_t spread_workspace(const Array& features, const Array* offsets, int64_t capacity);

// features (B, C, N) and labels (B, N), or (1, C, N) and (1, N) with offsets (B + 1,). An image
// with more instances than outputs have rows has pooled features of NaN and nothing else;
// num_instances (B,) int64 is one more than the rows then, and -1 everywhere where the offsets are
// none.
void pool_cuda(const Array& features, const Array& labels, const Array* offsets,
               const LabelRules& rules, Reduce reduce, const Outputs& outputs,
               const Array& num_instances, const Array& workspace, int64_t stream);

// As Instances::spread(), and zero in images that do not fit.
void spread_cuda(const Array& grad, const Array& labels, const Array* offsets,
                 const LabelRules& rules, Reduce reduce, const Array& grad_features,
                 const Array& workspace, int64_t stream);

// As spread_max().
void spread_max_cuda(const Array& grad, const Array& argmax, const Array* offsets,
                     const Array& grad_features, int64_t stream);

}  // namespace instembed::instance_pool
