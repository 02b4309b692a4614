// Seeds, and the instances that grow from them, on CUDA: the entry points that the bindings call.
// No host synchronisation. Arrays are those of seeds.h, and what is written is the same; a seed
// that is neither a pixel nor -1 has an IoU that is NaN, and grows into nothing.
#pragma once

#include "seeds/seeds.h"

namespace instembed::seeds {

int64_t mask_iou_cuda_workspace(const Array& embeddings, const Array& seeds);
void mask_iou_cuda(const Array& embeddings, const Array& labels, const Array& seeds,
                   const std::vector<double>& squared_radii, const LabelRules& rules,
                   const Array& iou, const Array& workspace, int64_t stream);

int64_t select_cuda_workspace(const Array& embeddings);
void select_cuda(const Array& embeddings, const Array& seediness, const Array* mask,
                 const Selection& selection, const Array& indices, const Array& scores,
                 const Array& workspace, int64_t stream);

int64_t grow_cuda_workspace(const Array& embeddings, const Array& seeds);
void grow_cuda(const Array& embeddings, const Array* mask, const Array& seeds, const Array& scores,
               const Array& squared_radii, const Growth& growth, const Array& labels,
               const Array& order, const Array& counts, const Array& instances,
               const Array& workspace, int64_t stream);

}  // namespace instembed::seeds
