// Caps around the points of each tile, and what they prove of the similarities between two tiles:
// with an angle a between the centres and radii r and s, every x . y is at most cos(a - r - s) and
// at least cos(a + r + s).
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "sphere/cloud.h"

namespace instembed::sphere {

// Cosines: two tiles are apart if no pair is above `apart`, joined if all pairs are above `joined`.
struct Reach {
  double apart;
  double joined = 2;  // more than any cosine: not asked for
};

// A cap's radius widened, or narrowed, by half the angle in question: then two tiles are apart, or
// joined, by the sum of two such angles alone.
template <class A>
struct Caps {
  int64_t stride;
  Lines<A> centers;  // channel d: centers + d * stride
  Lines<A> cosine, sine, open;
  Lines<A> inner_cosine, inner_sine, closed;

  Caps(int64_t channels, int64_t tiles)
      : stride((tiles + 2 * kLanes<A>) / kLanes<A> * kLanes<A>),
        centers(channels * stride),
        cosine(stride),
        sine(stride),
        open(stride),
        inner_cosine(stride),
        inner_sine(stride),
        closed(stride) {}
};

// What rounding adds to a dot product of unit vectors, generously.
template <class A>
double rounding(int64_t channels) {
  return 4 * (static_cast<double>(channels) + 8) * std::numeric_limits<A>::epsilon();
}

template <class A>
Caps<A> find_caps(const Cloud<A>& cloud, const Reach& reach, int threads) {
  constexpr double kNever = 4;  // more than any cosine can undo
  const int64_t tiles = cloud.tiles.size(), padded = cloud.padded;
  Caps<A> caps(cloud.channels, tiles);
  const double slack = rounding<A>(cloud.channels);
  const double half_apart = reach.apart > -1 ? 0.5 * std::acos(std::min(reach.apart, 1.0)) : kNever;
  const double half_joined =
      reach.joined < 1 ? 0.5 * std::acos(std::max(reach.joined, -1.0)) : -kNever;
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
        double similarity = 0, length = 0;
        for (int64_t d = 0; d < cloud.channels; ++d) {
          similarity += center[d] * row[d];
          length += static_cast<double>(row[d]) * row[d];
        }
        smallest = length > 0 ? std::min(smallest, similarity / std::sqrt(length)) : -1;
      }
      const double radius = std::acos(std::max(-1.0, smallest - slack));
      const double outer = radius + half_apart, inner = half_joined - radius;
      for (int64_t d = 0; d < cloud.channels; ++d) {
        caps.centers.data()[d * caps.stride + t] = static_cast<A>(center[d]);
      }
      // The cosine of a sum of angles falls up to pi only, which two angles below pi / 2 do not
      // reach.
      caps.cosine.data()[t] = static_cast<A>(std::cos(outer));
      caps.sine.data()[t] = static_cast<A>(std::sin(outer));
      caps.open.data()[t] = static_cast<A>(slack + (outer < 1.57 ? 0 : kNever));
      caps.inner_cosine.data()[t] = static_cast<A>(std::cos(inner));
      caps.inner_sine.data()[t] = static_cast<A>(std::sin(inner));
      caps.closed.data()[t] = static_cast<A>(slack + (inner > 0 && inner < 1.57 ? 0 : kNever));
    }
  });
  return caps;
}

// -cos(a + b) for angles a of one tile and b of others.
template <class V, class A>
INSTEMBED_INLINE V minus_cosine(const Lines<A>& cosine, const Lines<A>& sine, int64_t tile,
                                int64_t others) {
  return splat_as<V>(sine.data()[tile]) * load<V>(sine.data() + others) -
         splat_as<V>(cosine.data()[tile]) * load<V>(cosine.data() + others);
}

// near[k] is negative where tiles `tile` and first + k are apart; joined[k], if asked for, is
// positive where they are joined. In whole vectors.
template <class A>
INSTEMBED_INLINE void find_near(const Caps<A>& caps, int64_t channels, int64_t tile, int64_t first,
                                int64_t last, A* near, A* joined = nullptr) {
  using V = Piece<A, 2>;
  const A* centers = caps.centers.data();
  for (int64_t t = first; t < last; t += kLanes<A> / 2) {
    V dots{};
    for (int64_t d = 0; d < channels; ++d) {
      dots += splat_as<V>(centers[d * caps.stride + tile]) * load<V>(centers + d * caps.stride + t);
    }
    const V open = splat_as<V>(caps.open.data()[tile]) + load<V>(caps.open.data() + t);
    store(near + t - first, dots + open + minus_cosine<V>(caps.cosine, caps.sine, tile, t));
    if (!joined) continue;
    const V closed = splat_as<V>(caps.closed.data()[tile]) + load<V>(caps.closed.data() + t);
    store(joined + t - first,
          dots - closed + minus_cosine<V>(caps.inner_cosine, caps.inner_sine, tile, t));
  }
}

}  // namespace instembed::sphere
