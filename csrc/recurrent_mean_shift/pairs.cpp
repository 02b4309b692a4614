// K is symmetric, so a pair of tiles is computed once and serves the rows of both. A task has two
// ranges of tiles to itself, and tasks run in rounds, so that every slot gets its sums in one
// order.
//
// Tiles are skipped by caps: x . y <= cos(angle between the centres - both radii). Within a pair of
// tiles, a block of kBlock rows and one vector of columns is left out after its similarities are
// known, if all of them are too small.
#include "recurrent_mean_shift/pairs.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/exp.h"
#include "common/parallel.h"
#include "common/tournament.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace instembed::recurrent_mean_shift {
namespace {

constexpr int kBlock = 8;  // rows, or columns, that registers hold sums of
constexpr int64_t kBlocks = kTile / kBlock;

// Kernel values below it do not count: those of which a tile has less than the tolerance, and those
// that would be subnormal.
template <class A>
double least_value(const Rule& rule) {
  return std::max<double>(rule.tolerance / kTile, std::numeric_limits<A>::min());
}

// A cap around the points of each tile, half the angle at which the kernel falls below the
// tolerance added to its radius: where two such caps do not meet, the tiles can be skipped.
template <class A>
struct Caps {
  int64_t stride;
  Lines<A> centers;  // channel d: centers + d * stride
  Lines<A> cosine, sine, open;

  Caps(int64_t channels, int64_t tiles)
      : stride((tiles + 2 * kLanes<A>) / kLanes<A> * kLanes<A>),
        centers(channels * stride),
        cosine(stride),
        sine(stride),
        open(stride) {}
};

template <class A>
Caps<A> find_caps(const Cloud<A>& cloud, const Rule& rule, int threads) {
  constexpr double kOpen = 4;  // more than any cosine can undo
  const int64_t tiles = cloud.tiles.size(), padded = cloud.padded;
  Caps<A> caps(cloud.channels, tiles);
  // What rounding adds to a dot product of unit vectors, generously.
  const double slack =
      4 * (static_cast<double>(cloud.channels) + 8) * std::numeric_limits<A>::epsilon();
  const double least = 1 + std::log(least_value<A>(rule)) / rule.rate();
  const double half_reach = least > -1 ? 0.5 * std::acos(least) : kOpen;
  parallel_for((tiles + kTile - 1) / kTile, threads, [&](int64_t chunk) {
    std::vector<double> center(cloud.channels);
    for (int64_t t = chunk * kTile; t < std::min(tiles, (chunk + 1) * kTile); ++t) {
      const int64_t begin = cloud.tiles.begin[t], end = cloud.tiles.begin[t + 1];
      std::fill(center.begin(), center.end(), 0.0);
      for (int64_t s = begin; s < end; ++s) {
        const A* row = cloud.points.rows.data() + s * padded;
        for (int64_t d = 0; d < cloud.channels; ++d) center[d] += row[d];
      }
      double square = 0, smallest = 1;
      for (const double c : center) square += c * c;
      const double scale = square > 0 ? 1 / std::sqrt(square) : 0;
      for (double& c : center) c *= scale;
      for (int64_t s = begin; s < end; ++s) {
        if (cloud.tiles.point[s] < 0) continue;
        const A* row = cloud.points.rows.data() + s * padded;
        double similarity = 0;
        for (int64_t d = 0; d < cloud.channels; ++d) similarity += center[d] * row[d];
        smallest = std::min(smallest, similarity);
      }
      const double angle = std::acos(std::max(-1.0, smallest - slack)) + half_reach;
      for (int64_t d = 0; d < cloud.channels; ++d) {
        caps.centers.data()[d * caps.stride + t] = static_cast<A>(center[d]);
      }
      caps.cosine.data()[t] = static_cast<A>(std::cos(angle));
      caps.sine.data()[t] = static_cast<A>(std::sin(angle));
      // The cosine of a sum of angles falls up to pi only, which two angles below pi / 2 do not
      // reach.
      caps.open.data()[t] = static_cast<A>(slack + (angle < 1.57 ? 0 : kOpen));
    }
  });
  return caps;
}

// flags[k] is not negative where tiles `tile` and first + k may not be skipped; in whole vectors.
template <class A>
INSTEMBED_INLINE void find_near(const Caps<A>& caps, int64_t channels, int64_t tile, int64_t first,
                                int64_t last, A* flags) {
  const A* centers = caps.centers.data();
  const Vec<A> cosine = splat(caps.cosine.data()[tile]), sine = splat(caps.sine.data()[tile]);
  const Vec<A> open = splat(caps.open.data()[tile]);
  for (int64_t t = first; t < last; t += kLanes<A>) {
    Vec<A> sum = open + load<Vec<A>>(caps.open.data() + t);
    sum += sine * load<Vec<A>>(caps.sine.data() + t);
    sum -= cosine * load<Vec<A>>(caps.cosine.data() + t);
    for (int64_t d = 0; d < channels; ++d) {
      sum += splat(centers[d * caps.stride + tile]) * load<Vec<A>>(centers + d * caps.stride + t);
    }
    store(flags + t - first, sum);
  }
}

// Kernel values of one pair of tiles, and which blocks of kBlock x kBlock have any.
template <class A>
struct alignas(64) Block {
  A kernel[kTile * kTile];    // K, row by row
  A weighted[kTile * kTile];  // W
  uint8_t rows[kBlocks];      // bit c: block (r, c) is there
  uint8_t columns[kBlocks];   // bit r: block (r, c) is there
};

template <class A>
struct Numbers {  // of the rule
  A scale;        // of -|x - y|^2 / 2 in the power of 2
  A least;        // powers below it do not count
  A rate;

  explicit Numbers(const Rule& rule) {
    const double log2e = 1.44269504088896340736;
    scale = static_cast<A>(rule.rate() * log2e);
    least = static_cast<A>(std::log2(least_value<A>(rule)));
    rate = static_cast<A>(rule.rate());
  }
};

// sums[r][v] += the dot products of kBlock rows and V vectors of columns.
template <class A, int V>
INSTEMBED_INLINE void add_dots(const A* rows, int64_t padded, const A* planar, int64_t width,
                               int64_t channels, Vec<A> (&sums)[kBlock][V]) {
  for (int64_t d = 0; d < channels; ++d) {
    Vec<A> columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[v] = load<Vec<A>>(planar + d * width + v * kLanes<A>);
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
      const Vec<A> row = splat(rows[r * padded + d]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += row * columns[v];
    }
  }
}

template <class A>
struct Side {  // a tile's part in a pair
  const A* rows;
  const A* planar;
  const A* halves;
  int64_t width;
  const A* a_rows;
  const A* a_planar;
  const A* b;
  double* vectors;
  double* numbers;
};

template <class A, int V, bool weighted>
INSTEMBED_INLINE void fill_block(const Side<A>& I, const Side<A>& J, int64_t channels,
                                 int64_t padded, const Numbers<A>& numbers, int64_t r0, int64_t c0,
                                 Block<A>* block, Vec<A>* row_sums, Vec<A>* column_sums) {
  constexpr int kBits = 8 * sizeof(A) - 1;
  using Mask = Vec<MaskLane<A>>;
  const Vec<A> scale = splat(numbers.scale), least = splat(numbers.least);
  Vec<A> powers[kBlock][V] = {};
  add_dots<A, V>(I.rows + r0 * padded, padded, J.planar + c0, J.width, channels, powers);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const int64_t c = c0 + v * kLanes<A>;
    const Vec<A> halves = load<Vec<A>>(J.halves + c);
    Mask any{};
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
      Vec<A>& power = powers[r][v];
      power = (power - splat(I.halves[r0 + r]) - halves) * scale;
      any |= reinterpret_cast<Mask>(least - power);
    }
    if (!any_lane(any >> kBits)) continue;
    constexpr int kWide = kLanes<A> / kBlock;
    block->rows[r0 / kBlock] |= ((1 << kWide) - 1) << (c / kBlock);
    for (int k = 0; k < kWide; ++k) block->columns[c / kBlock + k] |= 1 << (r0 / kBlock);
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
      Vec<A>& power = powers[r][v];
      power = keep(power, reinterpret_cast<Mask>(power) >> kBits);  // rounding may leave it above 0
      power = exp2_lanes<A>(power);
      store(block->kernel + (r0 + r) * kTile + c, power);
      if constexpr (!weighted) {
        row_sums[r] += power;
        column_sums[c / kLanes<A>] += power;
      }
    }
    if constexpr (weighted) {
      Vec<A> dots[kBlock][1] = {};
      add_dots<A, 1>(I.rows + r0 * padded, padded, J.a_planar + c, J.width, channels, dots);
      add_dots<A, 1>(I.a_rows + r0 * padded, padded, J.planar + c, J.width, channels, dots);
      const Vec<A> b = load<Vec<A>>(J.b + c), rate = splat(numbers.rate);
#pragma GCC unroll 8
      for (int r = 0; r < kBlock; ++r) {
        store(block->weighted + (r0 + r) * kTile + c,
              powers[r][v] * rate * (dots[r][0] - splat(I.b[r0 + r]) - b));
      }
    }
  }
}

template <class A, bool weighted>
INSTEMBED_INLINE void fill_pair(const Side<A>& I, const Side<A>& J, int64_t channels,
                                int64_t padded, const Numbers<A>& numbers, Block<A>* block,
                                bool both) {
  constexpr int64_t L = kLanes<A>;
  Vec<A> column_sums[kTile / L] = {};
  std::fill_n(block->rows, kBlocks, uint8_t(0));
  std::fill_n(block->columns, kBlocks, uint8_t(0));
  for (int64_t r = 0; r < I.width; r += kBlock) {
    Vec<A> row_sums[kBlock] = {};
    int64_t c = 0;
    for (; c + 2 * L <= J.width; c += 2 * L) {
      fill_block<A, 2, weighted>(I, J, channels, padded, numbers, r, c, block, row_sums,
                                 column_sums);
    }
    if (c < J.width) {
      fill_block<A, 1, weighted>(I, J, channels, padded, numbers, r, c, block, row_sums,
                                 column_sums);
    }
    if constexpr (!weighted) add_lane_sums<A, kBlock>(row_sums, I.numbers + r);
  }
  if constexpr (!weighted) {
    if (!both) return;
    for (int64_t c = 0; c < J.width; c += L) {
      using Wide = vector_t<double, static_cast<int>(L)>;
      store(J.numbers + c,
            load<Wide>(J.numbers + c) + __builtin_convertvector(column_sums[c / L], Wide));
    }
  }
}

// to[r] += sum_c values[r * across + c * along] rows[c] of kBlock rows, over blocks of c, for U
// vectors of channels.
template <class A, int U>
INSTEMBED_INLINE void add_products(const A* values, int64_t across, int64_t along, uint32_t blocks,
                                   const A* rows, int64_t padded, Vec<A> (&sums)[kBlock][U]) {
  for (; blocks; blocks &= blocks - 1) {
    const int64_t first = __builtin_ctz(blocks) * kBlock;
#pragma GCC unroll 1
    for (int64_t c = first; c < first + kBlock; ++c) {
      Vec<A> row[U];
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) row[u] = load<Vec<A>>(rows + c * padded + u * kLanes<A>);
#pragma GCC unroll 8
      for (int r = 0; r < kBlock; ++r) {
        const Vec<A> value = splat(values[r * across + c * along]);
#pragma GCC unroll 2
        for (int u = 0; u < U; ++u) sums[r][u] += value * row[u];
      }
    }
  }
}

template <class A, int U, bool weighted>
INSTEMBED_INLINE void multiply_channels(const Block<A>& block, int64_t at, int64_t across,
                                        int64_t along, uint32_t blocks, const Side<A>& from,
                                        int64_t padded, int64_t d, double* to) {
  using Wide = vector_t<double, kLanes<A>>;
  Vec<A> sums[kBlock][U] = {};
  if constexpr (weighted) {
    add_products<A, U>(block.kernel + at, across, along, blocks, from.a_rows + d, padded, sums);
    add_products<A, U>(block.weighted + at, across, along, blocks, from.rows + d, padded, sums);
  } else {
    add_products<A, U>(block.kernel + at, across, along, blocks, from.rows + d, padded, sums);
  }
  for (int r = 0; r < kBlock; ++r) {
    for (int u = 0; u < U; ++u) {
      double* target = to + r * padded + d + u * kLanes<A>;
      store(target, load<Wide>(target) + __builtin_convertvector(sums[r][u], Wide));
    }
  }
}

// The sums of `to`, whose blocks lie `across` apart, over the points of `from`.
template <class A, bool weighted>
INSTEMBED_INLINE void multiply(const Block<A>& block, const uint8_t* blocks, int64_t across,
                               int64_t along, const Side<A>& from, const Side<A>& to,
                               int64_t padded) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t k = 0; k < to.width / kBlock; ++k) {
    if (!blocks[k]) continue;
    const int64_t at = k * kBlock * across;
    double* target = to.vectors + k * kBlock * padded;
    int64_t d = 0;
    for (; d + 2 * L <= padded; d += 2 * L) {
      multiply_channels<A, 2, weighted>(block, at, across, along, blocks[k], from, padded, d,
                                        target);
    }
    if (d < padded) {
      multiply_channels<A, 1, weighted>(block, at, across, along, blocks[k], from, padded, d,
                                        target);
    }
  }
}

template <class A, bool weighted>
INSTEMBED_INLINE void add_pair(const Side<A>& I, const Side<A>& J, int64_t channels, int64_t padded,
                               const Numbers<A>& numbers, Block<A>* block, bool both) {
  fill_pair<A, weighted>(I, J, channels, padded, numbers, block, both);
  if (weighted && !both) {  // along the point itself, which leaves the tangent alone
    for (int64_t r = 0; r < I.width; ++r) block->weighted[r * kTile + r] = 0;
  }
  multiply<A, weighted>(*block, block->rows, kTile, 1, J, I, padded);
  if (both) multiply<A, weighted>(*block, block->columns, 1, kTile, I, J, padded);
}

template <class A>
struct Work {
  const Cloud<A>& cloud;
  const Weights<A>* weights;
  const Caps<A>& caps;
  Numbers<A> numbers;
  Sums* sums;

  Side<A> side(int64_t t) const {
    const int64_t begin = cloud.tiles.begin[t], row = begin * cloud.padded;
    const int64_t planar = begin * cloud.channels;
    Side<A> side{};
    side.rows = cloud.points.rows.data() + row;
    side.planar = cloud.points.planar.data() + planar;
    side.halves = cloud.halves.data() + begin;
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

struct Range {
  int64_t first, last;
};

// All pairs of a tile of the first range and one of the second; each once, if they are the same.
template <class A, bool weighted>
INSTEMBED_INLINE void add_ranges(const Work<A>& work, Range first, Range second, A* flags,
                                 Block<A>* block) {
  const Cloud<A>& cloud = work.cloud;
  for (int64_t i = first.first; i < first.last; ++i) {
    const int64_t from = first.first == second.first ? i : second.first;
    find_near(work.caps, cloud.channels, i, from, second.last, flags);
    const Side<A> I = work.side(i);
    for (int64_t j = from; j < second.last; ++j) {
      if (flags[j - from] < 0) continue;
      add_pair<A, weighted>(I, work.side(j), cloud.channels, cloud.padded, work.numbers, block,
                            i != j);
    }
  }
}

INSTEMBED_SIMD void add_values(const Work<float>& work, Range first, Range second, float* flags,
                               Block<float>* block) {
  add_ranges<float, false>(work, first, second, flags, block);
}
INSTEMBED_SIMD void add_values(const Work<double>& work, Range first, Range second, double* flags,
                               Block<double>* block) {
  add_ranges<double, false>(work, first, second, flags, block);
}
INSTEMBED_SIMD void add_gradients(const Work<float>& work, Range first, Range second, float* flags,
                                  Block<float>* block) {
  add_ranges<float, true>(work, first, second, flags, block);
}
INSTEMBED_SIMD void add_gradients(const Work<double>& work, Range first, Range second,
                                  double* flags, Block<double>* block) {
  add_ranges<double, true>(work, first, second, flags, block);
}

// Halves of the squared lengths, as the products of a row with itself are computed.
template <class A>
INSTEMBED_INLINE void square(const A* planar, int64_t width, int64_t channels, A* halves) {
  for (int64_t i = 0; i < width; i += kLanes<A>) {
    Vec<A> sum{};
    for (int64_t d = 0; d < channels; ++d) {
      const Vec<A> x = load<Vec<A>>(planar + d * width + i);
      sum += x * x;
    }
    store(halves + i, sum * static_cast<A>(0.5));
  }
}
INSTEMBED_SIMD void find_halves(const float* planar, int64_t width, int64_t channels,
                                float* halves) {
  square(planar, width, channels, halves);
}
INSTEMBED_SIMD void find_halves(const double* planar, int64_t width, int64_t channels,
                                double* halves) {
  square(planar, width, channels, halves);
}

}  // namespace

template <class A>
void fill_planar(const Cloud<A>& cloud, Field<A>* field, int threads) {
  parallel_for(cloud.tiles.size(), threads, [&](int64_t t) {
    const int64_t begin = cloud.tiles.begin[t], width = cloud.width(t);
    const A* rows = field->rows.data() + begin * cloud.padded;
    A* planar = field->planar.data() + begin * cloud.channels;
    for (int64_t d = 0; d < cloud.channels; ++d) {
      for (int64_t i = 0; i < width; ++i) planar[d * width + i] = rows[i * cloud.padded + d];
    }
  });
}

template <class A>
void fill_halves(Cloud<A>* cloud, int threads) {
  constexpr A kFar = std::numeric_limits<A>::max() / 4;
  parallel_for(cloud->tiles.size(), threads, [&](int64_t t) {
    const int64_t begin = cloud->tiles.begin[t], end = cloud->tiles.begin[t + 1];
    A* halves = cloud->halves.data();
    find_halves(cloud->points.planar.data() + begin * cloud->channels, end - begin, cloud->channels,
                halves + begin);
    for (int64_t s = begin; s < end; ++s) {
      if (cloud->tiles.point[s] < 0) halves[s] = kFar;
    }
  });
}

template <class A>
void add_pairs(const Cloud<A>& cloud, const Rule& rule, const Weights<A>* weights, Sums* sums,
               int threads) {
  // Ranges of tiles: enough for threads to share, few enough for a range to be worth a task.
  constexpr int64_t kRanges = 16, kLongest = 32;
  const int64_t tiles = cloud.tiles.size();
  const Caps<A> caps = find_caps(cloud, rule, threads);
  const Work<A> work{cloud, weights, caps, Numbers<A>(rule), sums};
  const int64_t length = std::clamp<int64_t>((tiles + kRanges - 1) / kRanges, 1, kLongest);
  for_pairs({(tiles + length - 1) / length}, threads, [&](int64_t, int64_t a, int64_t b) {
    const auto range = [&](int64_t k) {
      return Range{k * length, std::min(tiles, (k + 1) * length)};
    };
    A flags[kLongest + kLanes<A>];
    Block<A> block;
    if (weights) {
      add_gradients(work, range(a), range(b), flags, &block);
    } else {
      add_values(work, range(a), range(b), flags, &block);
    }
  });
}

#define INSTEMBED_INSTANTIATE(A)                              \
  template void fill_planar(const Cloud<A>&, Field<A>*, int); \
  template void fill_halves(Cloud<A>*, int);                  \
  template void add_pairs(const Cloud<A>&, const Rule&, const Weights<A>*, Sums*, int);
INSTEMBED_INSTANTIATE(float)
INSTEMBED_INSTANTIATE(double)
#undef INSTEMBED_INSTANTIATE

}  // namespace instembed::recurrent_mean_shift
