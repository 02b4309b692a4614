// What the kernels of the discriminative loss share: the tables of its instances, and the formula.
#pragma once

#include <cmath>

#include "common/label_slots.cuh"
#include "common/tile.cuh"
#include "discriminative/formula.h"

namespace instembed::discriminative {
namespace {

using namespace cuda;

enum class Pass { means, spread };  // embeddings and counts; pulls towards the mean and hinge^2

template <class A>
struct Instances {      // tables with `capacity` rows an image
  int64_t* found;       // an image: its instances, -1 where they are too many
  int64_t* background;  // an image: its background pixels
  int64_t* counts;      // a row
  A* means;             // D a row, like the rest
  A* variance_grads;    // d term / d mean, but for the weight of the instance's variance
  A* distance_grads;
  A* push_grads;    // null without background push
  double* squares;  // a row: sum of hinge^2
  double* gaps;     // a row: sum over the other instances of hinge^2
  double* pushes;   // a row: sum over the background
  int64_t capacity;
  int channels;

  __device__ int32_t of(int64_t image) const {
    return found[image] < 0 ? 0 : static_cast<int32_t>(found[image]);
  }
};

struct Rule {
  double delta_var, delta_dist;
  bool pooled_variance;
  int norm;
};

// The formula with the norm as an argument, which is the same for all threads: kernels for both
// would take twice as long to compile.
template <class A>
__device__ __forceinline__ A add_to_norm_by(int norm, A sum, A difference) {
  return norm == 1 ? add_to_norm<1>(sum, difference) : add_to_norm<2>(sum, difference);
}
template <class A>
__device__ __forceinline__ A finish_norm_by(int norm, A sum) {
  return norm == 1 ? finish_norm<1>(sum) : finish_norm<2>(sum);
}
template <class A>
__device__ __forceinline__ A slope_by(int norm, A hinge, A distance) {
  return norm == 1 ? slope<1>(hinge, distance) : slope<2>(hinge, distance);
}
template <class A>
__device__ __forceinline__ A direction_by(int norm, A difference) {
  return norm == 1 ? direction<1>(difference) : direction<2>(difference);
}

// Adds sums over some pixels of one slot to the table's rows, those of one column and slot by one
// thread. They are at the pixels that have a bit in `heads`, a word for every 32; the last row of
// the tile is that of the extra column.
template <class A, class Table>
__device__ __forceinline__ void add_sums(SharedPtr<A> tile, SharedPtr<int32_t> slots,
                                         SharedPtr<uint32_t> heads, const TileShape& shape,
                                         Table table) {
  const int columns = shape.channels + 1;
  int groups = 1;  // of threads: each takes the slots of one residue
  while (2 * groups * columns <= kThreads) groups *= 2;
  const int group = static_cast<int>(threadIdx.x) / columns;
  if (group >= groups && columns <= kThreads) return;
  for (int column = columns <= kThreads ? static_cast<int>(threadIdx.x) % columns
                                        : static_cast<int>(threadIdx.x);
       column < columns; column += columns <= kThreads ? columns : kThreads) {
    const int mine = columns <= kThreads ? group : 0;
    const SharedPtr<A> row = tile + column * shape.row;
    int32_t slot = -1;
    A sum = 0;
    for (int piece = 0; piece < shape.pixels / kPiece; ++piece) {
      for (uint32_t bits = heads[piece]; bits; bits &= bits - 1) {
        const int p = piece * kPiece + __ffs(static_cast<int>(bits)) - 1;
        const int32_t here = slots[p];
        if ((here & (groups - 1)) != mine) continue;
        if (here != slot) {
          if (slot >= 0) table[slot * columns + column] += sum;
          slot = here;
          sum = 0;
        }
        sum += row[p];
      }
    }
    if (slot >= 0) table[slot * columns + column] += sum;
  }
}

// The gradient where offsets are none: no image is where, and every pixel shows it.
template <class T>
__device__ __forceinline__ void fill_with_nan(const Images& images, int channels, T* grad,
                                              const Strides& strides) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < images.total;
       i += step) {
    for (int d = 0; d < channels; ++d) {
      grad[i * strides.pixel + d * strides.channel] =
          narrowed<T>(static_cast<accumulator_t<T>>(NAN));
    }
  }
}

}  // namespace
}  // namespace instembed::discriminative
