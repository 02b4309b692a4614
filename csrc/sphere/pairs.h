// Work on all pairs of points, a tile against a tile: what kernels of symmetric sums share.
//
// A pair of tiles is computed once and serves the rows of both. A task has two ranges of tiles to
// itself, and tasks run in rounds, so that every slot gets its sums in one order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/simd.h"
#include "common/tournament.h"
#include "sphere/order.h"

namespace instembed::sphere {

constexpr int kBlock = 8;  // rows, or columns, that registers hold sums of
constexpr int64_t kBlocks = kTile / kBlock;

struct Range {  // of tiles
  int64_t first, last;
};

// Ranges of tiles: enough for threads to share, few enough for a range to be worth a task.
constexpr int64_t kRanges = 16, kLongest = 32;

inline int64_t range_length(int64_t tiles) {
  return std::clamp<int64_t>((tiles + kRanges - 1) / kRanges, 1, kLongest);
}

// Runs f(a, b, first, second) for all pairs of ranges of `tiles` tiles; a and b number the ranges.
template <class F>
void for_ranges(int64_t tiles, int threads, F&& f) {
  const int64_t length = range_length(tiles);
  const auto range = [&](int64_t k) {
    return Range{k * length, std::min(tiles, (k + 1) * length)};
  };
  for_pairs({(tiles + length - 1) / length}, threads,
            [&](int64_t, int64_t a, int64_t b) { f(a, b, range(a), range(b)); });
}

// Whether registers hold kBlock rows by two vectors of sums, or half the rows by one. The shape of
// a block does not change a sum's order.
extern const bool kManyRegisters;

// sums[r][v] += the dot products of R rows and V vectors of columns.
template <class A, int R, int V>
INSTEMBED_INLINE void add_block_dots(const A* rows, int64_t padded, const A* planar, int64_t width,
                                     int64_t channels, Vec<A>* sums, int stride) {
  Vec<A> own[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) own[r][v] = sums[r * stride + v];
  }
  for (int64_t d = 0; d < channels; ++d) {
    Vec<A> columns[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) columns[v] = load<Vec<A>>(planar + d * width + v * kLanes<A>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<A> row = splat(rows[r * padded + d]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) own[r][v] += row * columns[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[r * stride + v] = own[r][v];
  }
}

// The same for kBlock rows, in blocks that suit the processor.
template <class A, int V>
INSTEMBED_INLINE void add_dots(const A* rows, int64_t padded, const A* planar, int64_t width,
                               int64_t channels, Vec<A> (&sums)[kBlock][V]) {
  if (kManyRegisters) {
    add_block_dots<A, kBlock, V>(rows, padded, planar, width, channels, sums[0], V);
    return;
  }
  constexpr int R = kBlock / 2;
  for (int r = 0; r < kBlock; r += R) {
    for (int v = 0; v < V; ++v) {
      add_block_dots<A, R, 1>(rows + r * padded, padded, planar + v * kLanes<A>, width, channels,
                              &sums[r][v], V);
    }
  }
}

// Which kBlock x kBlock blocks of a pair of tiles have any value.
struct BlockMap {
  uint8_t rows[kBlocks];     // bit c: block (r, c) has
  uint8_t columns[kBlocks];  // bit r: block (r, c) has
};

// A matrix of a pair of tiles, and what its columns stand for.
template <class A>
struct Term {
  const A* values;  // kTile x kTile, row by row
  const A* rows;    // a row a point of the other tile
};

// sums[r] += sum_c values[r * across + c * along] rows[c] of R rows, over blocks of c, for U
// vectors of channels.
template <class A, int R, int U>
INSTEMBED_INLINE void add_products(const A* values, int64_t across, int64_t along, uint32_t blocks,
                                   const A* rows, int64_t padded, Vec<A> (&sums)[R][U]) {
  for (; blocks; blocks &= blocks - 1) {
    const int64_t first = __builtin_ctz(blocks) * kBlock;
#pragma GCC unroll 1
    for (int64_t c = first; c < first + kBlock; ++c) {
      Vec<A> row[U];
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) row[u] = load<Vec<A>>(rows + c * padded + u * kLanes<A>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<A> value = splat(values[r * across + c * along]);
#pragma GCC unroll 2
        for (int u = 0; u < U; ++u) sums[r][u] += value * row[u];
      }
    }
  }
}

// to[r] += sum_c of all terms, of R rows that lie `across` apart and U vectors of channels.
template <class A, int R, int U, int T>
INSTEMBED_INLINE void multiply_block(const Term<A> (&terms)[T], int64_t at, int64_t across,
                                     int64_t along, uint32_t blocks, int64_t padded, int64_t d,
                                     double* to) {
  using Wide = vector_t<double, kLanes<A>>;
  Vec<A> sums[R][U] = {};
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) {
    add_products<A, R, U>(terms[t].values + at, across, along, blocks, terms[t].rows + d, padded,
                          sums);
  }
  for (int r = 0; r < R; ++r) {
    for (int u = 0; u < U; ++u) {
      double* target = to + r * padded + d + u * kLanes<A>;
      store(target, load<Wide>(target) + __builtin_convertvector(sums[r][u], Wide));
    }
  }
}

// The same for the `width` rows of a tile.
template <class A, int T>
INSTEMBED_INLINE void multiply(const Term<A> (&terms)[T], const uint8_t* blocks, int64_t across,
                               int64_t along, int64_t width, int64_t padded, double* to) {
  constexpr int64_t L = kLanes<A>;
  constexpr int R = kBlock / 2;
  for (int64_t k = 0; k < width / kBlock; ++k) {
    if (!blocks[k]) continue;
    const int64_t row = k * kBlock, at = row * across;
    int64_t d = 0;
    for (; kManyRegisters && d + 2 * L <= padded; d += 2 * L) {
      multiply_block<A, kBlock, 2>(terms, at, across, along, blocks[k], padded, d,
                                   to + row * padded);
    }
    for (; d < padded; d += L) {
      for (int r = 0; r < kBlock; r += R) {
        multiply_block<A, R, 1>(terms, at + r * across, across, along, blocks[k], padded, d,
                                to + (row + r) * padded);
      }
    }
  }
}

}  // namespace instembed::sphere
