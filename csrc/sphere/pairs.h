// Work on all pairs of points, a tile against a tile: what kernels of symmetric sums share.
//
// A pair of tiles is computed once and serves the rows of both. A task has two ranges of tiles to
// itself, and tasks run in rounds, so that every slot gets its sums in one order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/simd_widths.h"
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

// The pieces P in which registers of kBytes (common/simd_widths.h) take a Vec. The shape of a block
// does not change a sum's order.
constexpr int pieces(int bytes) { return bytes == 64 ? 1 : 2; }

// sums += the dot products of R rows and V pieces of columns.
template <class A, int R, int V, int W, class Piece>
INSTEMBED_INLINE void add_block_dots(const A* rows, int64_t padded, const A* planar, int64_t width,
                                     int64_t channels, Piece (*sums)[W]) {
  constexpr int lanes = sizeof(Piece) / sizeof(A);
  Piece own[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) own[r][v] = sums[r][v];
  }
  for (int64_t d = 0; d < channels; ++d) {
    Piece columns[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) columns[v] = load<Piece>(planar + d * width + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Piece row = splat_as<Piece>(rows[r * padded + d]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) own[r][v] += row * columns[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[r][v] = own[r][v];
  }
}

// The dot products of kBlock rows and V vectors of columns, each in P pieces.
template <class A, int P, int V>
INSTEMBED_INLINE void find_dots(const A* rows, int64_t padded, const A* planar, int64_t width,
                                int64_t channels, Piece<A, P> (&sums)[kBlock][V * P]) {
  constexpr int R = kBlock / P;  // as many sums as registers can hold
  constexpr int held = P == 1 ? V : 1;
#pragma GCC unroll 2
  for (int v = 0; v < V; v += held) {
#pragma GCC unroll 2
    for (int r = 0; r < kBlock; r += R) {
      Piece<A, P> own[R][held * P] = {};
      add_block_dots<A, R, held * P>(rows + r * padded, padded, planar + v * kLanes<A>, width,
                                     channels, own);
#pragma GCC unroll 8
      for (int k = 0; k < R; ++k) {
#pragma GCC unroll 2
        for (int p = 0; p < held * P; ++p) sums[r + k][v * P + p] = own[k][p];
      }
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

// to += the lanes of v, in double.
template <class A, class V>
INSTEMBED_INLINE void add_lanes(double* to, const V& v) {
  if constexpr (sizeof(A) == sizeof(double)) {
    store(to, load<V>(to) + v);
  } else {
    constexpr int half = sizeof(V) / sizeof(A) / 2;
    using Wide = vector_t<double, half>;
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const auto part = half_of(v, k, std::make_index_sequence<half>());
      store(to + k * half, load<Wide>(to + k * half) + __builtin_convertvector(part, Wide));
    }
  }
}

// to[r] += sum_c of all terms, of R rows that lie `across` apart and U pieces of channels, over
// blocks of `length` columns c: a term is values[r * across + c * along] rows[c].
template <class A, int P, int R, int U, int length, int T>
INSTEMBED_INLINE void multiply_block(const Term<A> (&terms)[T], int64_t at, int64_t across,
                                     int64_t along, uint32_t blocks, int64_t padded, int64_t d,
                                     double* to) {
  using V = Piece<A, P>;
  constexpr int lanes = kLanes<A> / P;
  V sums[R][U] = {};
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) {
    const A* values = terms[t].values + at;
    const A* rows = terms[t].rows + d;
    for (uint32_t rest = blocks; rest; rest &= rest - 1) {
      const int64_t first = __builtin_ctz(rest) * length;
#pragma GCC unroll 1
      for (int64_t c = first; c < first + length; ++c) {
        V row[U];
#pragma GCC unroll 2
        for (int u = 0; u < U; ++u) row[u] = load<V>(rows + c * padded + u * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const V value = splat_as<V>(values[r * across + c * along]);
#pragma GCC unroll 2
          for (int u = 0; u < U; ++u) sums[r][u] += value * row[u];
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) add_lanes<A>(to + r * padded + d + u * lanes, sums[r][u]);
  }
}

// The same for the `width` rows of a tile and all channels. blocks[k] has a bit for every `length`
// columns that rows k * height to (k + 1) * height have values at.
template <class A, int P, int height = kBlock, int length = kBlock, class Bits, int T>
INSTEMBED_INLINE void multiply(const Term<A> (&terms)[T], const Bits* blocks, int64_t across,
                               int64_t along, int64_t width, int64_t padded, double* to) {
  constexpr int64_t L = kLanes<A>;
  constexpr int R = kBlock / P;
  static_assert(height % R == 0);
  for (int64_t k = 0; k < width / height; ++k) {
    if (!blocks[k]) continue;
    for (int64_t row = k * height; row < (k + 1) * height; row += R) {
      const int64_t at = row * across;
      double* target = to + row * padded;
      int64_t d = 0;
      for (; P == 1 && d + 2 * L <= padded; d += 2 * L) {
        multiply_block<A, P, R, 2, length>(terms, at, across, along, blocks[k], padded, d, target);
      }
      for (; d < padded; d += L) {
        multiply_block<A, P, R, P, length>(terms, at, across, along, blocks[k], padded, d, target);
      }
    }
  }
}

}  // namespace instembed::sphere
