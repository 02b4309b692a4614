// Each pair of points is looked at once and serves both, a tile of points against another at a
// time: first the squared distances of some rows and a vector of columns, from differences, which
// cancel nothing where points are near each other and far from zero; then the pair's term and
// slope; and where a slope is not zero, its part in the gradient of both points. Slopes of a pair
// of tiles are all that is stored of pairs.
//
// A loss is linear in its own gradient's factor, so the gradient is found along with the loss, and
// the backward pass only puts it in place.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/batch.h"
#include "common/dtype.h"
#include "common/lines.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/simd_widths.h"
#include "common/tiles.h"
#include "common/tournament.h"
#include "pairwise_similarity/formula.h"
#include "pairwise_similarity/pairwise_similarity.h"

namespace instembed::pairwise_similarity {
namespace {

constexpr int64_t kTile = 64;  // points
constexpr int64_t kRange = 4;  // tiles that a task has to itself
constexpr int kRows = 8;       // of squared distances that registers hold, a vector each

// The points of an image: those of an instance follow each other.
template <class A>
struct Cloud {
  int64_t channels = 0, padded = 0;
  std::vector<int64_t> places;         // of each point in the table of indices
  std::vector<MaskLane<A>> instances;  // of each point, ascending, padded to whole vectors
  Lines<A> shares;                     // 1 / number of points of the instance, 0 for padding
  Lines<A> planar;                     // channel d of tile t: t * kTile * channels + d * width(t)
  Lines<A> rows, sums;                 // point i: i * padded, and its gradient
  double pairs = 0;                    // the sum of the weights
  bool finite = true;

  int64_t size() const { return static_cast<int64_t>(places.size()); }
  int64_t slots() const { return static_cast<int64_t>(instances.size()); }
  int64_t tiles() const { return (slots() + kTile - 1) / kTile; }
  int64_t width(int64_t tile) const { return std::min(kTile, slots() - tile * kTile); }
};

// What is known of the points of an image, all but their embeddings. Throws for an index out of
// range.
template <class A>
Cloud<A> make_cloud(const int64_t* indices, int64_t instances, int64_t samples, int64_t pixels,
                    int64_t channels) {
  Cloud<A> cloud;
  cloud.channels = channels;
  cloud.padded = padded_channels(channels);
  std::vector<A> shares;
  double found = 0, same = 0;
  for (int64_t c = 0; c < instances; ++c) {
    int64_t count = 0;
    for (int64_t k = c * samples; k < (c + 1) * samples; ++k) {
      expect(indices[k] < pixels, "indices: expected pixels below " + std::to_string(pixels) +
                                      ", got " + std::to_string(indices[k]));
      if (indices[k] < 0) continue;
      cloud.places.push_back(k);
      cloud.instances.push_back(static_cast<MaskLane<A>>(c));
      ++count;
    }
    if (count == 0) continue;
    const auto n = static_cast<double>(count);
    shares.insert(shares.end(), count, static_cast<A>(1 / n));
    same += 0.5 * (n - 1) / n;
    cloud.pairs += found;
    found += 1;
  }
  cloud.pairs += same;
  const int64_t slots = (cloud.size() + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  cloud.instances.resize(slots, static_cast<MaskLane<A>>(instances));
  cloud.shares = Lines<A>(slots);
  std::copy(shares.begin(), shares.end(), cloud.shares.data());
  return cloud;
}

template <class A>
A limited(A x, bool* finite) {
  constexpr auto kLimit = static_cast<A>(kLargest);
  if (!(std::abs(x) <= std::numeric_limits<A>::max())) *finite = false;
  return x < -kLimit ? -kLimit : (x > kLimit ? kLimit : x);
}

template <class T, class A>
void read_points(const Image<const T>& image, const int64_t* indices, bool gradient,
                 Cloud<A>* cloud) {
  const int64_t channels = cloud->channels, padded = cloud->padded;
  cloud->planar = Lines<A>(cloud->slots() * channels);
  if (gradient) {
    cloud->rows = Lines<A>(cloud->slots() * padded);
    cloud->sums = Lines<A>(cloud->slots() * padded);
  }
  for (int64_t t = 0; t < cloud->tiles(); ++t) {
    const int64_t begin = t * kTile, width = cloud->width(t);
    const int64_t end = std::min(cloud->size(), begin + width);
    A* planar = cloud->planar.data() + begin * channels;
    for (int64_t d = 0; d < channels; ++d) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t pixel = indices[cloud->places[i]];
        const A x = limited<A>(
            convert<A>(image.data[pixel * image.pixel_stride + d * image.channel_stride]),
            &cloud->finite);
        planar[d * width + i - begin] = x;
        if (gradient) cloud->rows.data()[i * padded + d] = x;
      }
    }
  }
}

template <class A>
struct Side {  // a tile's part in a pair
  int64_t width;
  const A* planar;
  const A* rows;
  const A* shares;
  const MaskLane<A>* instances;
  A* sums;
};

template <class A>
Side<A> side(Cloud<A>* cloud, int64_t tile) {
  const int64_t begin = tile * kTile;
  return {cloud->width(tile),
          cloud->planar.data() + begin * cloud->channels,
          cloud->rows.data() + begin * cloud->padded,
          cloud->shares.data() + begin,
          cloud->instances.data() + begin,
          cloud->sums.data() + begin * cloud->padded};
}

// Slopes times weights of a pair of tiles, row by row, and for each kRows rows the vectors of
// columns that have any.
template <class A>
struct alignas(64) Slopes {
  A values[kTile * kTile];
  uint32_t vectors[kTile / kRows];
};

// The squared distances of kRows rows from a vector of columns.
template <class V, class A>
INSTEMBED_INLINE void add_squares(const Side<A>& I, const Side<A>& J, int64_t channels, int64_t r,
                                  int64_t c, V* squares) {
  V sums[kRows] = {};
  for (int64_t d = 0; d < channels; ++d) {
    const V column = load<V>(J.planar + d * J.width + c);
    const A* row = I.planar + d * I.width + r;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V difference = splat_as<V>(row[i]) - column;
      sums[i] += difference * difference;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) squares[i] = sums[i];
}

// The sum of weight times term over the pairs of two tiles, or of one tile with itself, each pair
// once.
template <int kBytes, bool gradient, class A>
INSTEMBED_INLINE double add_terms(const Side<A>& I, const Side<A>& J, bool itself, int64_t channels,
                                  Slopes<A>* slopes) {
  constexpr int L = kBytes / static_cast<int>(sizeof(A));
  using V = vector_t<A, L>;
  using Wide = vector_t<double, L>;
  const V far = splat_as<V>(static_cast<A>(sizeof(A) == 4 ? 88 : 709));  // where exp(-d) is 0
  Wide total{};
  for (int64_t r = 0; r < I.width; r += kRows) {
    V sum{};
    uint32_t vectors = 0;
    for (int64_t c = itself ? r / L * L : 0; c < J.width; c += L) {
      V squares[kRows];
      add_squares<V>(I, J, channels, r, c, squares);
      const bool mixed = J.instances[c] <= I.instances[r + kRows - 1];
      if (!mixed) {  // what is far adds nothing
        Mask<V> near{};
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) near |= negative_lanes<V>(squares[i] - far);
        if (!any_lane(near)) continue;
      }
      Bits<V> any{};
      const V shares = load<V>(J.shares + c);
      const auto columns = load<Mask<V>>(J.instances + c);
#pragma GCC unroll 1
      for (int i = 0; i < kRows; ++i) {
        V weights = shares * splat_as<V>(I.shares[r + i]);
        if (itself) weights = keep(weights, ~first_lanes<A, Mask<V>>(r + i + 1 - c));
        Term<V> term = two_instances<V>(squares[i]);
        if (mixed) {
          const Term<V> same = same_instance<V>(squares[i]);
          const auto different = reinterpret_cast<Bits<V>>(columns ^ I.instances[r + i]);
          const auto other = reinterpret_cast<Mask<V>>(
              spread_highest<Bits<V>>(different | (Bits<V>{} - different)));
          term.value = blend<V>(other, term.value, same.value);
          term.slope = blend<V>(other, term.slope, same.slope);
        }
        sum += weights * term.value;
        if constexpr (gradient) {
          term.slope *= weights;
          store(slopes->values + (r + i) * kTile + c, term.slope);
          any |= reinterpret_cast<Bits<V>>(term.slope) << 1;  // of zero, the sign
        }
      }
      if (gradient && any_lane(any)) vectors |= 1u << (c / L);
    }
    total += __builtin_convertvector(sum, Wide);
    if constexpr (gradient) slopes->vectors[r / kRows] = vectors;
  }
  return sum_lanes(total);
}

// Half of the gradient of the points of both tiles.
template <int kBytes, class A>
INSTEMBED_INLINE void add_gradient(const Side<A>& I, const Side<A>& J, int64_t padded,
                                   const Slopes<A>& slopes) {
  constexpr int L = kBytes / static_cast<int>(sizeof(A));
  constexpr int kStep = std::min(L, kShortLanes);
  constexpr int kHeld = 4;  // rows whose sums registers hold
  using V = vector_t<A, kStep>;
  for (int64_t r = 0; r < I.width; r += kHeld) {
    const uint32_t vectors = slopes.vectors[r / kRows];
    if (!vectors) continue;
    const A* values = slopes.values + r * kTile;
    for (int64_t d = 0; d < padded; d += kStep) {
      V row[kHeld], sums[kHeld] = {};
#pragma GCC unroll 4
      for (int i = 0; i < kHeld; ++i) row[i] = load<V>(I.rows + (r + i) * padded + d);
      for (uint32_t rest = vectors; rest; rest &= rest - 1) {
        const int64_t first = int64_t{__builtin_ctz(rest)} * L;
        for (int64_t c = first; c < first + L; ++c) {
          const V column = load<V>(J.rows + c * padded + d);
          V to = load<V>(J.sums + c * padded + d);
#pragma GCC unroll 4
          for (int i = 0; i < kHeld; ++i) {
            const V difference = row[i] - column;
            const A slope = values[i * kTile + c];
            sums[i] += slope * difference;
            to -= slope * difference;
          }
          store(J.sums + c * padded + d, to);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kHeld; ++i) {
        A* to = I.sums + (r + i) * padded + d;
        store(to, load<V>(to) + sums[i]);
      }
    }
  }
}

template <int kBytes, class A>
INSTEMBED_INLINE double add_tiles(const Side<A>& I, const Side<A>& J, bool itself, int64_t channels,
                                  Slopes<A>* slopes) {
  if (!slopes) return add_terms<kBytes, false>(I, J, itself, channels, slopes);
  const double sum = add_terms<kBytes, true>(I, J, itself, channels, slopes);
  add_gradient<kBytes>(I, J, padded_channels(channels), *slopes);
  return sum;
}

INSTEMBED_SIMD_WIDTHS(double add_pair(const Side<float>& I, const Side<float>& J, bool itself,
                                      int64_t channels, Slopes<float>* slopes),
                      return add_tiles<kBytes>(I, J, itself, channels, slopes))
INSTEMBED_SIMD_WIDTHS(double add_pair(const Side<double>& I, const Side<double>& J, bool itself,
                                      int64_t channels, Slopes<double>* slopes),
                      return add_tiles<kBytes>(I, J, itself, channels, slopes))

// The gradient of the image's loss at its points.
template <class A>
void write_slopes(const Cloud<A>& cloud, A* slopes) {
  const auto nan = std::numeric_limits<A>::quiet_NaN();
  const double scale = cloud.pairs > 0 ? 2 / cloud.pairs : 0;  // 2: of the derivative of a square
  for (int64_t i = 0; i < cloud.size(); ++i) {
    const A* sums = cloud.sums.data() + i * cloud.padded;
    const A* row = cloud.rows.data() + i * cloud.padded;
    A* to = slopes + cloud.places[i] * cloud.channels;
    for (int64_t d = 0; d < cloud.channels; ++d) {
      to[d] = std::abs(row[d]) < static_cast<A>(kLargest)
                  ? static_cast<A>(static_cast<double>(sums[d]) * scale)
                  : 0;
      if (!cloud.finite && cloud.pairs > 0) to[d] = nan;
    }
  }
}

template <class T>
void run_forward(const Array& embeddings, const Array& indices, const Array& losses,
                 const Array* slopes, int threads) {
  using A = accumulator_t<T>;
  const int64_t images = indices.shape[0], instances = indices.shape[1];
  const int64_t samples = indices.shape[2];
  const Batch batch = Batch::of_embeddings(embeddings, nullptr);
  std::vector<Cloud<A>> clouds(images);
  std::vector<int64_t> ranges(images);
  std::vector<std::vector<double>> terms(images);
  parallel_for(images, threads, [&](int64_t b) {
    const int64_t* own = indices.as<const int64_t>() + b * instances * samples;
    clouds[b] = make_cloud<A>(own, instances, samples, batch.pixels, batch.channels);
    read_points(Image<const T>(embeddings, batch, embeddings.shape[0] == images ? b : 0), own,
                slopes != nullptr, &clouds[b]);
    ranges[b] = (clouds[b].tiles() + kRange - 1) / kRange;
    terms[b].resize(ranges[b] * ranges[b]);
  });
  for_pairs(ranges, threads, [&](int64_t image, int64_t a, int64_t b) {
    Cloud<A>& cloud = clouds[image];
    Slopes<A> room;
    double sum = 0;
    for (int64_t i = a * kRange; i < std::min(cloud.tiles(), (a + 1) * kRange); ++i) {
      for (int64_t j = a == b ? i : b * kRange; j < std::min(cloud.tiles(), (b + 1) * kRange);
           ++j) {
        sum += add_pair(side(&cloud, i), side(&cloud, j), i == j, cloud.channels,
                        slopes ? &room : nullptr);
      }
    }
    terms[image][a * ranges[image] + b] = sum;
  });
  if (slopes) std::fill_n(slopes->as<A>(), slopes->size(), A{0});
  parallel_for(images, threads, [&](int64_t b) {
    double sum = 0;
    for (const double term : terms[b]) sum += term;
    const Cloud<A>& cloud = clouds[b];
    double loss = cloud.pairs > 0 ? sum / cloud.pairs : 0;
    if (!cloud.finite && cloud.pairs > 0) loss = std::numeric_limits<double>::quiet_NaN();
    losses.as<A>()[b] = static_cast<A>(loss);
    if (slopes) {
      write_slopes(cloud, slopes->as<A>() + b * instances * samples * cloud.channels);
    }
  });
}

void check(const Array& embeddings, const Array& indices, const Array* slopes, DType accumulation) {
  expect(embeddings.ndim == 3, "embeddings: expected 3 dimensions (images, channels, pixels)");
  expect(indices.ndim == 3 && (embeddings.shape[0] == indices.shape[0] || embeddings.shape[0] == 1),
         "indices: expected (images, instances, samples)");
  expect_contiguous(indices, DType::i64, indices.size(), "indices");
  if (slopes) {
    expect_contiguous(*slopes, accumulation, indices.size() * embeddings.shape[1], "slopes");
  }
}

DType accumulation(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

}  // namespace

void forward(const Array& embeddings, const Array& indices, const Array& losses,
             const Array* slopes, int threads) {
  check(embeddings, indices, slopes, accumulation(embeddings.dtype));
  expect_contiguous(losses, accumulation(embeddings.dtype), indices.shape[0], "losses");
  dispatch_floating(embeddings.dtype, "embeddings", [&](auto type) {
    run_forward<decltype(type)>(embeddings, indices, losses, slopes, threads);
  });
}

void backward(const Array& grad_losses, const Array& slopes, const Array& indices,
              const Array& grad, int threads) {
  check(grad, indices, &slopes, accumulation(grad.dtype));
  expect_contiguous(grad_losses, accumulation(grad.dtype), indices.shape[0], "grad_losses");
  fill_zero(grad, threads);
  const Batch batch = Batch::of_embeddings(grad, nullptr);
  const int64_t images = indices.shape[0], points = indices.shape[1] * indices.shape[2];
  dispatch_floating(grad.dtype, "grad", [&](auto type) {
    using T = decltype(type);
    using A = accumulator_t<T>;
    parallel_for(images, threads, [&](int64_t b) {
      const Image<T> image(grad, batch, grad.shape[0] == images ? b : 0);
      const int64_t* own = indices.as<const int64_t>() + b * points;
      const A* from = slopes.as<const A>() + b * points * batch.channels;
      const double scale = static_cast<double>(grad_losses.as<const A>()[b]);
      for (int64_t k = 0; k < points; ++k) {
        expect(own[k] < batch.pixels, "indices: expected pixels below " +
                                          std::to_string(batch.pixels) + ", got " +
                                          std::to_string(own[k]));
        if (own[k] < 0) continue;
        for (int64_t d = 0; d < batch.channels; ++d) {
          image.data[own[k] * image.pixel_stride + d * image.channel_stride] =
              rounded<T>(scale * static_cast<double>(from[k * batch.channels + d]));
        }
      }
    });
  });
}

}  // namespace instembed::pairwise_similarity
