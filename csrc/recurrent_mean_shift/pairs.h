// Sums over all pairs of points, a tile against a tile.
#pragma once

#include "recurrent_mean_shift/formula.h"
#include "sphere/cloud.h"

namespace instembed::recurrent_mean_shift {

using sphere::Cloud;
using sphere::Field;
using sphere::kTile;

template <class A>
struct Weights {  // of the formula's gradient, at every slot
  Field<A> a;
  Lines<A> b;
};

// What a sum over pairs adds to, at every slot: sum_j K_ij x_j to the vector and sum_j K_ij to the
// number; with weights, sum_j [ K_ij a_j + W_ij x_j ] to the vector alone.
struct Sums {
  Lines<double> vectors;  // slot s: vectors + s * padded
  Lines<double> numbers;
};

// Kernel values below tolerance / kTile may be left out: a row misses less than the tolerance of a
// tile. Same bits on any number of threads.
template <class A>
void add_pairs(const Cloud<A>& cloud, const Rule& rule, const Weights<A>* weights, Sums* sums,
               int threads);

}  // namespace instembed::recurrent_mean_shift
