// A pair of tiles is left out where caps prove that no similarity exceeds the margin, or where both
// hold one and the same instance. Where caps prove that all exceed it and the instances differ, the
// hinge is linear, and what the tiles hold in all says everything.
#include "cosine_margin/hinge.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cosine_margin/subsets.h"
#include "sphere/caps.h"
#include "sphere/pairs.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace instembed::cosine_margin {
namespace {

using sphere::BlockMap;
using sphere::Cloud;
using sphere::kBlock;
using sphere::kTile;
using sphere::Range;

// The instances of a tile: none is outside [first, last].
struct Span {
  int64_t first, last;

  bool one() const { return first == last; }
  bool meets(const Span& other) const { return first <= other.last && other.first <= last; }
};

// What a tile holds in all.
template <class A>
struct Totals {
  Lines<double> weighted;  // sum of w_i x_i; tile t: weighted + t * padded
  Lines<double> pushes;    // what each point of the tile is to get added at the end, likewise
  std::vector<double> weights;
};

// h' of one pair of tiles: numbers, row by row, of the squared hinge, zeros and ones of the other.
template <class A>
struct alignas(64) Block {
  A values[kTile * kTile];
  Subsets<A> subsets;
  BlockMap map;
};

template <class A>
struct Side {  // a tile's part in a pair
  const A* rows;
  const A* planar;
  const A* weighted;
  const A* weights;
  const MaskLane<A>* ids;
  int64_t width;
  double* sums;
};

template <class A>
struct Work {
  const Cloud<A>& cloud;
  const Members<A>& members;
  const Rule& rule;
  const sphere::Caps<A>& caps;
  const std::vector<Span>& spans;
  Totals<A>* totals;
  double* sums;

  Side<A> side(int64_t t) const {
    const int64_t begin = cloud.tiles.begin[t], row = begin * cloud.padded;
    return {cloud.points.rows.data() + row, cloud.points.planar.data() + begin * cloud.channels,
            members.weighted.data() + row,  members.weights.data() + begin,
            members.ids.data() + begin,     cloud.width(t),
            sums ? sums + row : nullptr};
  }
};

// kBlock rows and V vectors of columns, each in P pieces: adds w_i w_j h to `total`, and stores h'.
template <class A, int P, int V, bool squared>
INSTEMBED_INLINE void fill_block(const Side<A>& I, const Side<A>& J, int64_t channels,
                                 int64_t padded, A least, bool compare, int64_t r0, int64_t c0,
                                 Block<A>* block, Piece<A, P>* total) {
  using Part = Piece<A, P>;
  using Mask = Piece<MaskLane<A>, P>;
  constexpr int kBits = 8 * sizeof(A) - 1, lanes = kLanes<A> / P;
  Part dots[kBlock][V * P];
  sphere::find_dots<A, P, V>(I.rows + r0 * padded, padded, J.planar + c0, J.width, channels, dots);
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const int64_t column = c0 + v * kLanes<A>;
    Mask any{};
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      const int64_t c = column + p * lanes;
      const Mask ids = load<Mask>(J.ids + c);
      Mask active[kBlock];
      Part sum{};
#pragma GCC unroll 8
      for (int r = 0; r < kBlock; ++r) {
        const Part above = dots[r][v * P + p] - splat_as<Part>(least);
        // Not the sign of -above, which is set for zero.
        active[r] = reinterpret_cast<Mask>(splat_as<Part>(least) - dots[r][v * P + p]) >> kBits;
        if (compare) {
          const Mask other = ids ^ splat_as<Mask>(I.ids[r0 + r]);
          active[r] &= (other | -other) >> kBits;
        }
        any |= active[r];
        const Part hinge = keep(above, active[r]);
        sum += splat_as<Part>(I.weights[r0 + r]) * (squared ? hinge * hinge : hinge);
        if (squared) store(block->values + (r0 + r) * kTile + c, hinge);
      }
      if (!squared && I.sums) select<A>(active, r0, c, &block->subsets);
      *total += sum * load<Part>(J.weights + c);
    }
    if (!any_lane(any)) continue;
    constexpr int kWide = kLanes<A> / kBlock;
    block->map.rows[r0 / kBlock] |= ((1 << kWide) - 1) << (column / kBlock);
    for (int k = 0; k < kWide; ++k) block->map.columns[column / kBlock + k] |= 1 << (r0 / kBlock);
  }
}

// Returns the sum of w_i w_j [g_ij]+ over a pair of tiles.
template <class A, int P, bool squared>
INSTEMBED_INLINE double add_pair(const Side<A>& I, const Side<A>& J, int64_t channels,
                                 int64_t padded, A least, bool compare, Block<A>* block,
                                 bool both) {
  constexpr int64_t L = kLanes<A>;
  Piece<A, P> total{};
  block->map = {};
  for (int64_t r = 0; r < I.width; r += kBlock) {
    int64_t c = 0;
    for (; P == 1 && c + 2 * L <= J.width; c += 2 * L) {
      fill_block<A, P, 2, squared>(I, J, channels, padded, least, compare, r, c, block, &total);
    }
    for (; c < J.width; c += L) {
      fill_block<A, P, 1, squared>(I, J, channels, padded, least, compare, r, c, block, &total);
    }
  }
  if (I.sums && !squared) {
    constexpr int lanes = kLanes<A> / P;
    add_selected<A, P>(block->subsets.rows, row_place<lanes>, block->map.rows, J.weighted, I.width,
                       padded, I.sums);
    if (both) {
      add_selected<A, P>(block->subsets.columns, column_place, block->map.columns, I.weighted,
                         J.width, padded, J.sums);
    }
  } else if (I.sums) {
    const sphere::Term<A> rows[] = {{block->values, J.weighted}};
    sphere::multiply<A, P>(rows, block->map.rows, kTile, 1, I.width, padded, I.sums);
    if (both) {
      const sphere::Term<A> columns[] = {{block->values, I.weighted}};
      sphere::multiply<A, P>(columns, block->map.columns, 1, kTile, J.width, padded, J.sums);
    }
  }
  return sum_lanes(total) * (both ? 2 : 1);
}

// The same where all pairs exceed the margin: sum_ij w_i w_j (x_i . x_j - least).
template <class A>
double add_joined(const Work<A>& work, int64_t i, int64_t j) {
  const int64_t padded = work.cloud.padded;
  Totals<A>& totals = *work.totals;
  const double* a = totals.weighted.data() + i * padded;
  const double* b = totals.weighted.data() + j * padded;
  double* to_a = totals.pushes.data() + i * padded;
  double* to_b = totals.pushes.data() + j * padded;
  double sum = 0;
  for (int64_t d = 0; d < padded; ++d) {
    sum += a[d] * b[d];
    to_a[d] += b[d];
    to_b[d] += a[d];
  }
  return 2 * (sum - work.rule.least() * totals.weights[i] * totals.weights[j]);
}

// All pairs of a tile of the first range and one of the second; each once, if they are the same.
template <class A, int P, bool squared>
INSTEMBED_INLINE double add_ranges(const Work<A>& work, const Range& first, const Range& second,
                                   A* near, A* joined, Block<A>* block) {
  const Cloud<A>& cloud = work.cloud;
  const auto least = static_cast<A>(work.rule.least());
  double sum = 0;
  for (int64_t i = first.first; i < first.last; ++i) {
    const int64_t from = first.first == second.first ? i : second.first;
    sphere::find_near(work.caps, cloud.channels, i, from, second.last, near, joined);
    const Side<A> I = work.side(i);
    for (int64_t j = from; j < second.last; ++j) {
      const Span &a = work.spans[i], &b = work.spans[j];
      if (near[j - from] < 0 || (a.one() && b.one() && a.first == b.first)) continue;
      if (!squared && joined[j - from] > 0 && !a.meets(b)) {
        sum += add_joined(work, i, j);
      } else {
        sum += add_pair<A, P, squared>(I, work.side(j), cloud.channels, cloud.padded, least,
                                       a.meets(b), block, i != j);
      }
    }
  }
  return sum;
}

#define INSTEMBED_RANGES(A, name, squared)                                                        \
  INSTEMBED_SIMD_WIDTHS(double name(const Work<A>& work, const Range& first, const Range& second, \
                                    A* near, A* joined, Block<A>* block),                         \
                        return add_ranges<A, sphere::pieces(kBytes), squared>(                    \
                            work, first, second, near, joined, block))
INSTEMBED_RANGES(float, add_linear, false)
INSTEMBED_RANGES(double, add_linear, false)
INSTEMBED_RANGES(float, add_squares, true)
INSTEMBED_RANGES(double, add_squares, true)
#undef INSTEMBED_RANGES

// Cosines at which tiles are apart or joined, for points of lengths around 1.
template <class A>
sphere::Reach find_reach(const Cloud<A>& cloud, double least) {
  double smallest = std::numeric_limits<double>::infinity(), largest = 0;
  for (int64_t s = 0; s < cloud.tiles.slots(); ++s) {
    if (cloud.tiles.point[s] < 0) continue;
    const A* row = cloud.points.rows.data() + s * cloud.padded;
    double square = 0;
    for (int64_t d = 0; d < cloud.channels; ++d) square += static_cast<double>(row[d]) * row[d];
    largest = std::max(largest, square);
    if (square > 0) smallest = std::min(smallest, square);
  }
  if (largest == 0) return {least < 0 ? -2.0 : 2.0};
  const double a = least / smallest, b = least / largest;
  return {std::min(a, b), std::max(a, b)};
}

template <class A>
Totals<A> find_totals(const Cloud<A>& cloud, const Members<A>& members, int threads) {
  const int64_t tiles = cloud.tiles.size(), padded = cloud.padded;
  Totals<A> totals{Lines<double>(tiles * padded), Lines<double>(tiles * padded),
                   std::vector<double>(tiles)};
  parallel_for(tiles, threads, [&](int64_t t) {
    double* sum = totals.weighted.data() + t * padded;
    for (int64_t s = cloud.tiles.begin[t]; s < cloud.tiles.begin[t + 1]; ++s) {
      const A* row = members.weighted.data() + s * padded;
      for (int64_t d = 0; d < padded; ++d) sum[d] += row[d];
      totals.weights[t] += members.weights.data()[s];
    }
  });
  return totals;
}

template <class A>
std::vector<Span> find_spans(const Cloud<A>& cloud, const Members<A>& members) {
  std::vector<Span> spans;
  for (int64_t t = 0; t < cloud.tiles.size(); ++t) {
    Span span{std::numeric_limits<int64_t>::max(), -1};
    for (int64_t s = cloud.tiles.begin[t]; s < cloud.tiles.begin[t + 1]; ++s) {
      if (cloud.tiles.point[s] < 0) continue;
      span.first = std::min<int64_t>(span.first, members.ids.data()[s]);
      span.last = std::max<int64_t>(span.last, members.ids.data()[s]);
    }
    spans.push_back(span);
  }
  return spans;
}

}  // namespace

template <class A>
double add_hinges(const Cloud<A>& cloud, const Members<A>& members, const Rule& rule, double* sums,
                  int threads) {
  const int64_t tiles = cloud.tiles.size(), padded = cloud.padded;
  const sphere::Caps<A> caps = sphere::find_caps(cloud, find_reach(cloud, rule.least()), threads);
  const std::vector<Span> spans = find_spans(cloud, members);
  Totals<A> totals = find_totals(cloud, members, threads);
  const Work<A> work{cloud, members, rule, caps, spans, &totals, sums};
  // A range meets the others in a fixed order: so do its sums.
  std::vector<double> of_range(tiles / sphere::range_length(std::max<int64_t>(tiles, 1)) + 1);
  sphere::for_ranges(
      tiles, threads, [&](int64_t a, int64_t, const Range& first, const Range& second) {
        A near[sphere::kLongest + kLanes<A>], joined[sphere::kLongest + kLanes<A>];
        Block<A> block;
        of_range[a] += rule.squared ? add_squares(work, first, second, near, joined, &block)
                                    : add_linear(work, first, second, near, joined, &block);
      });
  if (sums) {
    parallel_for(tiles, threads, [&](int64_t t) {
      const double* push = totals.pushes.data() + t * padded;
      for (int64_t s = cloud.tiles.begin[t]; s < cloud.tiles.begin[t + 1]; ++s) {
        for (int64_t d = 0; d < padded; ++d) sums[s * padded + d] += push[d];
      }
    });
  }
  double sum = 0;
  for (const double part : of_range) sum += part;
  return rule.scale() * sum;
}

template double add_hinges(const Cloud<float>&, const Members<float>&, const Rule&, double*, int);
template double add_hinges(const Cloud<double>&, const Members<double>&, const Rule&, double*, int);

}  // namespace instembed::cosine_margin
