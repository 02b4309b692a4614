// Seeds, and the instances that grow from them: the entry points that the bindings call.
//
// A pixel q belongs to the mask of a seed p at similarity tau if sigma(p, q) = 2 / (1 + exp(|e_p -
// e_q|^2)) is at least tau, that is if the squared distance, in double with the channels added in
// order, is at most log(2 - tau) - log(tau).
#pragma once

#include <cstdint>
#include <vector>

#include "common/array.h"
#include "common/label_runs.h"

namespace instembed::seeds {

// embeddings (B, D, N), labels (B, N) of an integer type, seeds (B, S) int64 pixels, -1 for none.
// iou (B, S, T) in the accumulation type: of the mask at each of T squared radii with the instance
// of the seed.
void mask_iou(const Array& embeddings, const Array& labels, const Array& seeds,
              const std::vector<double>& squared_radii, const LabelRules& rules, const Array& iou,
              int threads);

}  // namespace instembed::seeds
