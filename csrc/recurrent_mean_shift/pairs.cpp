// K is symmetric, so a pair of tiles is computed once and serves the rows of both.
//
// Tiles are skipped where their caps, or the gap between them along the line through their centres,
// prove that all values between them are too small. Within a pair of tiles, blocks of a few rows
// and columns are left out after their similarities are known, if all of them are too small.
#include "recurrent_mean_shift/pairs.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/exp.h"
#include "sphere/caps.h"
#include "sphere/pairs.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace instembed::recurrent_mean_shift {
namespace {

using sphere::kBlock;
using sphere::Range;

// Kernel values below it do not count: those of which a tile has less than the tolerance, and those
// that would be subnormal.
template <class A>
double least_value(const Rule& rule) {
  return std::max<double>(rule.tolerance / kTile, std::numeric_limits<A>::min());
}

// Rows whose similarities registers hold, in vectors of P pieces.
template <int P>
constexpr int kRows = kBlock / P;
constexpr int kFewest = kRows<2>;

// Which blocks of kRows<P> rows and kBlock columns of a pair of tiles have any value.
struct Map {
  uint8_t rows[kTile / kFewest];     // bit c: block (r, c) has
  uint16_t columns[kTile / kBlock];  // bit r: block (r, c) has
};

// Kernel values of one pair of tiles.
template <class A>
struct alignas(64) Block {
  A kernel[kTile * kTile];    // K, row by row
  A weighted[kTile * kTile];  // W
  Map map;
};

template <class A>
struct Numbers {  // of the rule
  A scale;        // of -|x - y|^2 / 2 in the power of 2
  A gap;          // pairs that are further apart do not count
  A rate;
  A slack;  // what rounding adds to the products of two points and one vector

  Numbers(const Rule& rule, int64_t channels) {
    const double log2e = 1.44269504088896340736;
    scale = static_cast<A>(rule.rate() * log2e);
    gap = static_cast<A>(std::sqrt(-2 * std::log(least_value<A>(rule)) / rule.rate()));
    rate = static_cast<A>(rule.rate());
    slack = static_cast<A>(4 * sphere::rounding<A>(channels));
  }
};

template <class A>
constexpr A kFar = std::numeric_limits<A>::max() / 4;  // from everything: slots without a point

// before(x) + x . y - after(y) is -|x - y|^2 / 2, and 0 for equal points however lengths were
// rounded. Where before(x) + x . y is negative, the pair does not count: its sign is all that is
// looked at of most pairs.
template <class A>
struct Ends {
  Lines<A> before, after;
};

template <class A>
struct Side {  // a tile's part in a pair
  const A* rows;
  const A* planar;
  const A* before;
  const A* after;
  int64_t width;
  const A* a_rows;
  const A* a_planar;
  const A* b;
  double* vectors;
  double* numbers;
};

template <class A, int P, int V>
using Dots = Piece<A, P>[kRows<P>][V];

// -|v| of every lane.
template <class V>
INSTEMBED_INLINE V negative(const V& v) {
  constexpr Lane<Bits<V>> kSign = Lane<Bits<V>>{1} << (8 * sizeof(kSign) - 1);
  return reinterpret_cast<V>(reinterpret_cast<Bits<V>>(v) | kSign);
}

// Kernel values of kRows<P> rows from r0 and Q pieces of columns from c0, from their sums.
template <class A, int P, int Q, int V, bool weighted>
INSTEMBED_INLINE void fill_columns(const Side<A>& I, const Side<A>& J, int64_t channels,
                                   int64_t padded, const Numbers<A>& numbers, int64_t r0,
                                   int64_t c0, const Dots<A, P, V>& dots, int first,
                                   Block<A>* block, Piece<A, P>* row_sums,
                                   Piece<A, P>* column_sums) {
  using Part = Piece<A, P>;
  constexpr int lanes = kLanes<A> / P, R = kRows<P>;
  const Part scale = splat_as<Part>(numbers.scale);
  Part values[R][Q];
#pragma GCC unroll 2
  for (int q = 0; q < Q; ++q) {
    const int64_t c = c0 + q * lanes;
    const Part after = load<Part>(J.after + c);
    Part column_sum{};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Part power = (dots[r][first + q] - after) * scale;
      const Part value = exp2_lanes<A>(negative(power));  // rounding may leave it above
      store(block->kernel + (r0 + r) * kTile + c, value);
      if constexpr (weighted) {
        values[r][q] = value;
      } else {
        row_sums[r] += value;
        column_sum += value;
      }
    }
    if constexpr (!weighted) column_sums[c / lanes] += column_sum;
  }
  if constexpr (weighted) {
    Part slopes[R][Q];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int q = 0; q < Q; ++q) slopes[r][q] = splat_as<Part>(-I.b[r0 + r]);
    }
    sphere::add_block_dots<A, R, Q>(I.rows + r0 * padded, padded, J.a_planar + c0, J.width,
                                    channels, slopes);
    sphere::add_block_dots<A, R, Q>(I.a_rows + r0 * padded, padded, J.planar + c0, J.width,
                                    channels, slopes);
    const Part rate = splat_as<Part>(numbers.rate);
#pragma GCC unroll 2
    for (int q = 0; q < Q; ++q) {
      const int64_t c = c0 + q * lanes;
      const Part b = load<Part>(J.b + c);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        store(block->weighted + (r0 + r) * kTile + c, values[r][q] * rate * (slopes[r][q] - b));
      }
    }
  }
}

// The same for V pieces of columns, where any value counts.
template <class A, int P, int V, bool weighted>
INSTEMBED_INLINE void fill_block(const Side<A>& I, const Side<A>& J, int64_t channels,
                                 int64_t padded, const Numbers<A>& numbers, int64_t r0, int64_t c0,
                                 Block<A>* block, Piece<A, P>* row_sums, Piece<A, P>* column_sums) {
  using Part = Piece<A, P>;
  using Mask = Piece<MaskLane<A>, P>;
  constexpr int kBits = 8 * sizeof(A) - 1, lanes = kLanes<A> / P, R = kRows<P>;
  constexpr int Q = lanes < kBlock ? kBlock / lanes : 1;      // pieces that go together
  constexpr int kWide = lanes < kBlock ? 1 : lanes / kBlock;  // blocks that they cover
  Dots<A, P, V> dots;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) dots[r][v] = splat_as<Part>(I.before[r0 + r]);
  }
  sphere::add_block_dots<A, R, V>(I.rows + r0 * padded, padded, J.planar + c0, J.width, channels,
                                  dots);
  Mask far[V / Q], all = ~Mask{};
#pragma GCC unroll 4
  for (int k = 0; k < V / Q; ++k) {
    far[k] = ~Mask{};
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) far[k] &= reinterpret_cast<Mask>(dots[r][k * Q + q]);
    }
    all &= far[k];
  }
  if (!any_lane(~(all >> kBits))) return;
#pragma GCC unroll 4
  for (int k = 0; k < V / Q; ++k) {
    if (V > Q && !any_lane(~(far[k] >> kBits))) continue;
    const int64_t column = c0 + k * Q * lanes;
    block->map.rows[r0 / R] |= ((1 << kWide) - 1) << (column / kBlock);
    for (int w = 0; w < kWide; ++w) block->map.columns[column / kBlock + w] |= 1 << (r0 / R);
    fill_columns<A, P, Q, V, weighted>(I, J, channels, padded, numbers, r0, column, dots, k * Q,
                                       block, row_sums, column_sums);
  }
}

template <class A, int P, bool weighted>
INSTEMBED_INLINE void fill_pair(const Side<A>& I, const Side<A>& J, int64_t channels,
                                int64_t padded, const Numbers<A>& numbers, Block<A>* block,
                                bool both) {
  constexpr int64_t L = kLanes<A>, lanes = L / P;
  constexpr int R = kRows<P>;
  Piece<A, P> column_sums[kTile / lanes] = {};
  block->map = {};
  for (int64_t r = 0; r < I.width; r += R) {
    Piece<A, P> row_sums[R] = {};
    int64_t c = 0;
    for (; P == 1 && c + 2 * L <= J.width; c += 2 * L) {
      fill_block<A, P, 2, weighted>(I, J, channels, padded, numbers, r, c, block, row_sums,
                                    column_sums);
    }
    for (; c < J.width; c += L) {
      fill_block<A, P, P, weighted>(I, J, channels, padded, numbers, r, c, block, row_sums,
                                    column_sums);
    }
    if constexpr (!weighted) {
      if (block->map.rows[r / R]) add_lane_sums<A, R, lanes>(row_sums, I.numbers + r);
    }
  }
  if constexpr (!weighted) {
    if (!both) return;
    for (int64_t c = 0; c < J.width; c += lanes) {
      if (block->map.columns[c / kBlock])
        sphere::add_lanes<A>(J.numbers + c, column_sums[c / lanes]);
    }
  }
}

// The sums of `to`, in blocks of `height`, over the points of `from`, in blocks of `length`.
template <class A, int P, int height, int length, bool weighted, class Bits>
INSTEMBED_INLINE void multiply(const Block<A>& block, const Bits* blocks, int64_t across,
                               int64_t along, const Side<A>& from, const Side<A>& to,
                               int64_t padded) {
  if constexpr (weighted) {
    const sphere::Term<A> terms[] = {{block.kernel, from.a_rows}, {block.weighted, from.rows}};
    sphere::multiply<A, P, height, length>(terms, blocks, across, along, to.width, padded,
                                           to.vectors);
  } else {
    const sphere::Term<A> terms[] = {{block.kernel, from.rows}};
    sphere::multiply<A, P, height, length>(terms, blocks, across, along, to.width, padded,
                                           to.vectors);
  }
}

template <class A, int P, bool weighted>
INSTEMBED_INLINE void add_pair(const Side<A>& I, const Side<A>& J, int64_t channels, int64_t padded,
                               const Numbers<A>& numbers, Block<A>* block, bool both) {
  constexpr int R = kRows<P>;
  fill_pair<A, P, weighted>(I, J, channels, padded, numbers, block, both);
  if (weighted && !both) {  // along the point itself, which leaves the tangent alone
    for (int64_t r = 0; r < I.width; ++r) block->weighted[r * kTile + r] = 0;
  }
  multiply<A, P, R, kBlock, weighted>(*block, block->map.rows, kTile, 1, J, I, padded);
  if (both) multiply<A, P, kBlock, R, weighted>(*block, block->map.columns, 1, kTile, I, J, padded);
}

template <class A>
struct Work {
  const Cloud<A>& cloud;
  const Ends<A>& ends;
  const Weights<A>* weights;
  const sphere::Caps<A>& caps;
  Numbers<A> numbers;
  Sums* sums;

  Side<A> side(int64_t t) const {
    const int64_t begin = cloud.tiles.begin[t], row = begin * cloud.padded;
    const int64_t planar = begin * cloud.channels;
    Side<A> side{};
    side.rows = cloud.points.rows.data() + row;
    side.planar = cloud.points.planar.data() + planar;
    side.before = ends.before.data() + begin;
    side.after = ends.after.data() + begin;
    side.width = cloud.width(t);
    side.vectors = sums->vectors.data() + row;
    side.numbers = sums->numbers.data() + begin;
    if (weights) {
      side.a_rows = weights->a.rows.data() + row;
      side.a_planar = weights->a.planar.data() + planar;
      side.b = weights->b.data() + begin;
    }
    return side;
  }
};

// `least` and, where it is less, (centre of tile i - centre of tile j) . x, of V pieces of the
// points x of tile i from slot c.
template <class A, int P, int V>
INSTEMBED_INLINE void lower(const Work<A>& work, const Side<A>& side, int64_t i, int64_t j,
                            int64_t c, Piece<A, P>* least) {
  using Part = Piece<A, P>;
  constexpr int lanes = kLanes<A> / P;
  Part along[V] = {};
  for (int64_t d = 0; d < work.cloud.channels; ++d) {
    const A* centers = work.caps.centers.data() + d * work.caps.stride;
    const Part direction = splat_as<Part>(centers[i] - centers[j]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      along[v] += direction * load<Part>(side.planar + d * side.width + c + v * lanes);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const auto holds = load<Part>(side.after + c + v * lanes) < splat_as<Part>(kFar<A>);
    *least = (along[v] < *least) & holds ? along[v] : *least;
  }
}

template <class A, int P>
INSTEMBED_INLINE A find_lowest(const Work<A>& work, const Side<A>& side, int64_t i, int64_t j) {
  constexpr int lanes = kLanes<A> / P;
  auto least = splat_as<Piece<A, P>>(std::numeric_limits<A>::max());
  if (side.width == kTile) {
    constexpr int V = 4;
    for (int64_t c = 0; c < kTile; c += V * lanes) lower<A, P, V>(work, side, i, j, c, &least);
  } else {
    for (int64_t c = 0; c < side.width; c += P * lanes) lower<A, P, P>(work, side, i, j, c, &least);
  }
  A values[lanes];
  store(values, least);
  return *std::min_element(values, values + lanes);
}

// Whether the points of two tiles lie so far apart along the line through the tiles' centres that
// no value counts.
template <class A, int P>
INSTEMBED_INLINE bool have_gap(const Work<A>& work, const Side<A>& I, const Side<A>& J, int64_t i,
                               int64_t j) {
  double square = 0;
  for (int64_t d = 0; d < work.cloud.channels; ++d) {
    const A* centers = work.caps.centers.data() + d * work.caps.stride;
    const double difference = centers[i] - centers[j];
    square += difference * difference;
  }
  const double least = work.numbers.gap * std::sqrt(square) + work.numbers.slack;
  // The centres are about as far apart as the points, on average.
  if (least >= square) return false;
  return find_lowest<A, P>(work, I, i, j) + find_lowest<A, P>(work, J, j, i) > least;
}

// All pairs of a tile of the first range and one of the second; each once, if they are the same.
template <class A, int P, bool weighted>
INSTEMBED_INLINE void add_ranges(const Work<A>& work, Range first, Range second, A* flags,
                                 Block<A>* block) {
  const Cloud<A>& cloud = work.cloud;
  for (int64_t i = first.first; i < first.last; ++i) {
    const int64_t from = first.first == second.first ? i : second.first;
    sphere::find_near(work.caps, cloud.channels, i, from, second.last, flags);
    const Side<A> I = work.side(i);
    for (int64_t j = from; j < second.last; ++j) {
      if (flags[j - from] < 0) continue;
      const Side<A> J = work.side(j);
      if (have_gap<A, P>(work, I, J, i, j)) continue;
      add_pair<A, P, weighted>(I, J, cloud.channels, cloud.padded, work.numbers, block, i != j);
    }
  }
}

#define INSTEMBED_RANGES(A, name, weighted)                                                 \
  INSTEMBED_SIMD_WIDTHS(                                                                    \
      void name(const Work<A>& work, Range first, Range second, A* flags, Block<A>* block), \
      add_ranges<A, sphere::pieces(kBytes), weighted>(work, first, second, flags, block))
INSTEMBED_RANGES(float, add_values, false)
INSTEMBED_RANGES(double, add_values, false)
INSTEMBED_RANGES(float, add_gradients, true)
INSTEMBED_RANGES(double, add_gradients, true)
#undef INSTEMBED_RANGES

// sums += |x|^2 of every slot, as the products of a row with itself are computed.
template <class A, class V>
INSTEMBED_INLINE void square_lanes(const A* planar, int64_t width, int64_t channels, A* sums) {
  for (int64_t i = 0; i < width; i += kLanesOf<V>) {
    V sum = load<V>(sums + i);
    for (int64_t d = 0; d < channels; ++d) {
      const V x = load<V>(planar + d * width + i);
      sum += x * x;
    }
    store(sums + i, sum);
  }
}
#define INSTEMBED_SQUARE(A)                                                   \
  INSTEMBED_SIMD_WIDTHS(                                                      \
      void square(const A* planar, int64_t width, int64_t channels, A* sums), \
      square_lanes<A, Piece<A, sphere::pieces(kBytes)>>(planar, width, channels, sums))
INSTEMBED_SQUARE(float)
INSTEMBED_SQUARE(double)
#undef INSTEMBED_SQUARE

template <class A>
Ends<A> find_ends(const Cloud<A>& cloud, const Rule& rule, int threads) {
  const int64_t slots = cloud.tiles.slots();
  Ends<A> ends{Lines<A>(slots), Lines<A>(slots)};
  const auto add_squares = [&](int64_t t, A* sums) {
    const int64_t begin = cloud.tiles.begin[t];
    square(cloud.points.planar.data() + begin * cloud.channels, cloud.width(t), cloud.channels,
           sums + begin);
  };
  A* before = ends.before.data();
  A* after = ends.after.data();
  parallel_for(cloud.tiles.size(), threads, [&](int64_t t) { add_squares(t, after); });
  double least = std::numeric_limits<double>::infinity(), most = 0;
  for (int64_t s = 0; s < slots; ++s) {
    if (cloud.tiles.point[s] < 0) continue;
    least = std::min<double>(least, after[s]);
    most = std::max<double>(most, after[s]);
  }
  // The largest |x - y|^2 / 2 that counts, or that there is, short of |y|^2 / 2.
  const double largest = std::min(-std::log(least_value<A>(rule)) / rule.rate(), 2 * most);
  const double reach = largest - least / 2 + sphere::rounding<A>(cloud.channels);
  parallel_for(cloud.tiles.size(), threads, [&](int64_t t) {
    const int64_t begin = cloud.tiles.begin[t], end = cloud.tiles.begin[t + 1];
    for (int64_t s = begin; s < end; ++s) {
      before[s] = after[s] = static_cast<A>(reach) - after[s] / 2;
    }
    add_squares(t, after);
    for (int64_t s = begin; s < end; ++s) {
      if (cloud.tiles.point[s] >= 0) continue;
      before[s] = -kFar<A>;
      after[s] = kFar<A>;
    }
  });
  return ends;
}

}  // namespace

template <class A>
void add_pairs(const Cloud<A>& cloud, const Rule& rule, const Weights<A>* weights, Sums* sums,
               int threads) {
  if (cloud.tiles.slots() == 0) return;
  const double least = 1 + std::log(least_value<A>(rule)) / rule.rate();
  const sphere::Caps<A> caps = sphere::find_caps(cloud, {least}, threads);
  const Ends<A> ends = find_ends(cloud, rule, threads);
  const Work<A> work{cloud, ends, weights, caps, Numbers<A>(rule, cloud.channels), sums};
  sphere::for_ranges(cloud.tiles.size(), threads,
                     [&](int64_t, int64_t, const Range& first, const Range& second) {
                       A flags[sphere::kLongest + kLanes<A>];
                       Block<A> block;
                       if (weights) {
                         add_gradients(work, first, second, flags, &block);
                       } else {
                         add_values(work, first, second, flags, &block);
                       }
                     });
}

#define INSTEMBED_INSTANTIATE(A) \
  template void add_pairs(const Cloud<A>&, const Rule&, const Weights<A>*, Sums*, int);
INSTEMBED_INSTANTIATE(float)
INSTEMBED_INSTANTIATE(double)
#undef INSTEMBED_INSTANTIATE

}  // namespace instembed::recurrent_mean_shift
