// The loss's sums over pairs of different instances.
#pragma once

#include <vector>

#include "cosine_margin/formula.h"
#include "sphere/cloud.h"

namespace instembed::cosine_margin {

// What the points of a cloud are, at every slot: zero where a slot holds no point.
template <class A>
struct Members {
  Lines<MaskLane<A>> ids;  // of instances, from 0
  Lines<A> weights;        // w_i
  Lines<A> weighted;       // w_i x_i, a row of whole vectors for each
};

// Returns sum_ij w_i w_j h(s_ij) over pairs of different instances, and adds sum_j w_j h'(s_ij) x_j
// to each row of `sums` (slot s: sums + s * padded) unless it is null. Same bits on any number of
// threads.
template <class A>
double add_hinges(const sphere::Cloud<A>& cloud, const Members<A>& members, const Rule& rule,
                  double* sums, int threads);

}  // namespace instembed::cosine_margin
