// Sums of the rows that a matrix of zeros and ones selects, by the method of the four Russians: all
// 16 sums of every four rows are made once for a tile, and a row of the matrix adds one of them
// where a product would multiply and add four times.
#pragma once

#include <cstdint>
#include <utility>

#include "common/simd.h"
#include "sphere/pairs.h"

namespace instembed::cosine_margin {

constexpr int kSet = 4;  // rows whose sums are tabled
constexpr int64_t kSets = sphere::kTile / kSet, kSubsets = 1 << kSet;

// The subsets of a pair of tiles: of each set of columns that which a row selects, and of each set
// of rows that which a column selects. In whole vectors, as select() writes them.
template <class A>
struct alignas(64) Subsets {
  MaskLane<A> rows[kSets * sphere::kTile];
  MaskLane<A> columns[kSets * sphere::kTile];
};

// Where the subset of a row is, in vectors of as many lanes: one holds kSet rows.
template <int lanes>
constexpr int64_t row_place(int64_t row, int64_t set) {
  constexpr int64_t sets = lanes / kSet;  // in a vector
  const int64_t vector = row / kSet * (sphere::kTile / lanes) + set / sets;
  return vector * lanes + row % kSet * sets + set % sets;
}

constexpr int64_t column_place(int64_t column, int64_t set) { return set * sphere::kTile + column; }

template <class A>
struct SetBits {
  MaskLane<A> values[kLanes<A>];
  constexpr SetBits() : values() {
    for (int k = 0; k < kLanes<A>; ++k) values[k] = 1 << k % kSet;
  }
};
template <class A>
inline constexpr SetBits<A> set_bits{};

// Writes the subsets of kBlock rows from r and a vector of columns from c: all bits of a lane are
// set where the row selects the column.
template <class A, class Mask>
INSTEMBED_INLINE void select(const Mask (&selected)[sphere::kBlock], int64_t r, int64_t c,
                             Subsets<A>* subsets) {
  constexpr int lanes = sizeof(Mask) / sizeof(A);
  constexpr std::make_index_sequence<lanes> all;
  const Mask bits = load<Mask>(set_bits<A>.values);
#pragma GCC unroll 2
  for (int k = 0; k < sphere::kBlock; k += kSet, r += kSet) {
    const Mask* rows = selected + k;
    store(subsets->columns + column_place(c, r / kSet),
          (rows[0] & 1) | (rows[1] & 2) | (rows[2] & 4) | (rows[3] & 8));
    const Mask first = add_group_halves<lanes, kSet>(rows[0] & bits, rows[1] & bits, all);
    const Mask second = add_group_halves<lanes, kSet>(rows[2] & bits, rows[3] & bits, all);
    store(subsets->rows + row_place<lanes>(r, c / kSet),
          add_group_halves<lanes, kSet / 2>(first, second, all));
  }
}

// table[s] = the sum of the rows of subset s, a vector of each.
template <class A, int P>
INSTEMBED_INLINE void fill_table(const A* rows, int64_t padded, A (*table)[kLanes<A>]) {
  using Part = Piece<A, P>;
  constexpr int lanes = kLanes<A> / P;
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
    Part row[kSet], sums[kSubsets] = {};
#pragma GCC unroll 4
    for (int k = 0; k < kSet; ++k) row[k] = load<Part>(rows + k * padded + p * lanes);
#pragma GCC unroll 16
    for (int s = 1; s < kSubsets; ++s) sums[s] = sums[s & (s - 1)] + row[__builtin_ctz(s)];
#pragma GCC unroll 16
    for (int s = 0; s < kSubsets; ++s) store(table[s] + p * lanes, sums[s]);
  }
}

// to[r] += the sum of the rows that row r of the matrix selects, for `width` rows of it. blocks[k]
// has a bit for every kBlock rows of which rows k * kBlock and on may select any
// (sphere::BlockMap).
template <class A, int P, class Place>
INSTEMBED_INLINE void add_selected(const MaskLane<A>* subsets, Place&& place, const uint8_t* blocks,
                                   const A* rows, int64_t width, int64_t padded, double* to) {
  using Part = Piece<A, P>;
  constexpr int L = kLanes<A>, lanes = L / P;
  constexpr int R = sphere::kBlock / P;  // as many sums as registers can hold
  constexpr int sets = sphere::kBlock / kSet;
  alignas(64) A table[kSets][kSubsets][L];
  uint32_t used = 0;
  for (int64_t k = 0; k < width / sphere::kBlock; ++k) used |= blocks[k];
  for (int64_t d = 0; d < padded; d += L) {
    for (uint32_t rest = used; rest; rest &= rest - 1) {
      const int64_t first = int64_t{__builtin_ctz(rest)} * sets;
      for (int64_t set = first; set < first + sets; ++set) {
        fill_table<A, P>(rows + set * kSet * padded + d, padded, table[set]);
      }
    }
    for (int64_t r = 0; r < width; r += R) {
      const uint32_t own = blocks[r / sphere::kBlock];
      if (!own) continue;
      Part sums[R][P] = {};
      for (uint32_t rest = own; rest; rest &= rest - 1) {
        const int64_t first = int64_t{__builtin_ctz(rest)} * sets;
#pragma GCC unroll 1
        for (int64_t set = first; set < first + sets; ++set) {
#pragma GCC unroll 8
          for (int k = 0; k < R; ++k) {
            const A* sum = table[set][subsets[place(r + k, set)]];
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) sums[k][p] += load<Part>(sum + p * lanes);
          }
        }
      }
      for (int k = 0; k < R; ++k) {
        A added[L];
        for (int p = 0; p < P; ++p) store(added + p * lanes, sums[k][p]);
        double* target = to + (r + k) * padded + d;
        for (int i = 0; i < L; ++i) target[i] += added[i];
      }
    }
  }
}

}  // namespace instembed::cosine_margin
