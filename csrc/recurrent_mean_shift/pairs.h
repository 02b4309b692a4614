// Sums over all pairs of points, a tile against a tile.
#pragma once

#include <vector>

#include "recurrent_mean_shift/formula.h"
#include "recurrent_mean_shift/order.h"

namespace instembed::recurrent_mean_shift {

// A vector at every slot, twice: a row of whole vectors for each, and channel by channel for each
// tile.
template <class A>
struct Field {
  Lines<A> rows;    // slot s: rows + s * padded
  Lines<A> planar;  // channel d of tile t: planar + begin[t] * channels + d * width(t)

  Field() = default;
  Field(int64_t channels, int64_t padded, int64_t slots)
      : rows(slots * padded), planar(slots * channels) {}
};

// Slots that hold no point are far from everything.
template <class A>
struct Cloud {
  int64_t channels = 0, padded = 0;  // padded: whole vectors
  Tiles tiles;
  Field<A> points;
  Lines<A> halves;  // |x|^2 / 2: x . y - halves is -|x - y|^2 / 2 however lengths were rounded

  int64_t width(int64_t tile) const { return tiles.begin[tile + 1] - tiles.begin[tile]; }
};

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

// Fills the planar half of a field from its rows.
template <class A>
void fill_planar(const Cloud<A>& cloud, Field<A>* field, int threads);

template <class A>
void fill_halves(Cloud<A>* cloud, int threads);

// Kernel values below tolerance / kTile may be left out: a row misses less than the tolerance of a
// tile. Same bits on any number of threads.
template <class A>
void add_pairs(const Cloud<A>& cloud, const Rule& rule, const Weights<A>* weights, Sums* sums,
               int threads);

}  // namespace instembed::recurrent_mean_shift
