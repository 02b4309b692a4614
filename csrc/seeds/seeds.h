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

struct Selection {
  double diversity = 0.3;
  double min_seediness = 0;
};

// Greedy choice of seeds. embeddings (B, D, N), seediness (B, N) of a floating type, mask (B, N) of
// bytes or null; indices (B, S) int64, -1 where no pixel is left, and scores (B, S) in float32 or
// float64, the seediness there and 0.
void select(const Array& embeddings, const Array& seediness, const Array* mask,
            const Selection& selection, const Array& indices, const Array& scores, int threads);

struct Growth {
  int64_t min_size = 1;
  double overlap = 0.5;
};

// Instances from seeds. embeddings (B, D, N), mask (B, N) of bytes or null, seeds (B, S) int64, -1
// for none, with their scores and squared radii (B, S) in float64. Written: labels (B, N) int64;
// and of the instances in the order of their labels, from 1: order (B, S) int64, the place of the
// seed among S, -1 beyond the last; counts (B, S) int64; instances (B,) int64.
void grow(const Array& embeddings, const Array* mask, const Array& seeds, const Array& scores,
          const Array& squared_radii, const Growth& growth, const Array& labels, const Array& order,
          const Array& counts, const Array& instances, int threads);

}  // namespace instembed::seeds
