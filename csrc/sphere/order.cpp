// A tree of two-means splits. A cut between two large parts is taken where it falls, so that no
// tile holds points of both; a cut through fewer points is moved to whole tiles, so that tiles are
// full.
#include "sphere/order.h"

#include <algorithm>

#include "common/parallel.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace instembed::sphere {
namespace {

constexpr int64_t kSample = 128;       // points that two means are found on
constexpr int kRounds = 4;             // of two means
constexpr int64_t kLarge = 4 * kTile;  // a part that is worth a tile that is not full
constexpr int64_t kShare = 16;  // a part is at least 1 / kShare of the whole: the tree is shallow

template <class A>
struct Key {
  A value;
  int32_t point;
  bool operator<(const Key& other) const {
    return value != other.value ? value < other.value : point < other.point;
  }
};

template <class A>
struct Cut {
  const A* direction;
  A threshold;
};

template <class A>
INSTEMBED_INLINE A dot(const A* a, const A* b, int64_t padded) {
  using V = Piece<A, 2>;
  constexpr int64_t L = kLanes<A> / 2;
  V sums[2] = {};
  for (int64_t d = 0; d < padded; d += 2 * L) {
    sums[0] += load<V>(a + d) * load<V>(b + d);
    sums[1] += load<V>(a + d + L) * load<V>(b + d + L);
  }
  return sum_lanes(sums[0] + sums[1]);
}

template <class A>
INSTEMBED_INLINE void add(A* to, const A* from, int64_t padded) {
  for (int64_t d = 0; d < padded; ++d) to[d] += from[d];
}

// The row that is least similar to a vector.
template <class A>
INSTEMBED_INLINE const A* farthest(const A* const* rows, int64_t count, const A* from,
                                   int64_t padded) {
  const A* found = rows[0];
  A least = dot(found, from, padded);
  for (int64_t i = 1; i < count; ++i) {
    const A similarity = dot(rows[i], from, padded);
    if (similarity < least) {
      least = similarity;
      found = rows[i];
    }
  }
  return found;
}

// The plane between two means of a sample, from two points far apart. `means` holds 2 x padded.
template <class A>
INSTEMBED_INLINE A find_cut(const A* const* rows, int64_t count, int64_t padded, A* means,
                            A* direction) {
  std::fill_n(means, padded, A(0));
  for (int64_t i = 0; i < count; ++i) add(means, rows[i], padded);
  const A* first = farthest(rows, count, means, padded);
  const A* second = farthest(rows, count, first, padded);
  std::copy_n(first, padded, means);
  std::copy_n(second, padded, means + padded);
  A threshold = 0;
  for (int round = 0;; ++round) {
    for (int64_t d = 0; d < padded; ++d) direction[d] = means[d] - means[padded + d];
    threshold = (dot(means, means, padded) - dot(means + padded, means + padded, padded)) / 2;
    if (round == kRounds) return threshold;
    std::fill_n(means, 2 * padded, A(0));
    int64_t members[2] = {};
    for (int64_t i = 0; i < count; ++i) {
      const int side = dot(rows[i], direction, padded) > threshold ? 0 : 1;
      add(means + side * padded, rows[i], padded);
      ++members[side];
    }
    if (members[0] == 0 || members[1] == 0) return threshold;
    for (int side = 0; side < 2; ++side) {
      for (int64_t d = 0; d < padded; ++d)
        means[side * padded + d] /= static_cast<A>(members[side]);
    }
  }
}

template <class A>
INSTEMBED_INLINE A project_keys(const A* rows, int64_t padded, Key<A>* keys, int64_t count,
                                A* scratch) {
  const A* sample[kSample] = {};
  const int64_t samples = std::min(count, kSample);
  for (int64_t i = 0; i < samples; ++i) {
    sample[i] = rows + keys[count * i / samples].point * padded;
  }
  A* direction = scratch + 2 * padded;
  const A threshold = find_cut(sample, samples, padded, scratch, direction);
  for (int64_t i = 0; i < count; ++i) {
    keys[i].value = dot(rows + keys[i].point * padded, direction, padded);
  }
  return threshold;
}

// Sets the keys to projections on the direction of a cut, and returns its place.
INSTEMBED_SIMD float project(const float* rows, int64_t padded, Key<float>* keys, int64_t count,
                             float* scratch) {
  return project_keys(rows, padded, keys, count, scratch);
}
INSTEMBED_SIMD double project(const double* rows, int64_t padded, Key<double>* keys, int64_t count,
                              double* scratch) {
  return project_keys(rows, padded, keys, count, scratch);
}

// Splits keys in two, and returns how many come first.
template <class A>
int64_t split(const A* rows, int64_t padded, Key<A>* keys, int64_t count) {
  Lines<A> scratch(3 * padded);
  const A threshold = project(rows, padded, keys, count, scratch.data());
  const int64_t low =
      std::count_if(keys, keys + count, [&](const Key<A>& key) { return key.value <= threshold; });
  if (std::min(low, count - low) >= std::max(kLarge, count / kShare)) {
    std::partition(keys, keys + count, [&](const Key<A>& key) { return key.value <= threshold; });
    return low;
  }
  const int64_t least = (count / kShare + kTile - 1) / kTile * kTile;
  const int64_t most = std::max(least, (count - least) / kTile * kTile);
  const int64_t first = std::clamp((low + kTile / 2) / kTile * kTile, least, most);
  std::nth_element(keys, keys + first, keys + count);
  return first;
}

}  // namespace

template <class A>
Tiles order_points(const A* rows, int64_t points, int64_t padded, int threads) {
  struct Part {
    int64_t begin, end;
  };
  std::vector<Key<A>> keys(points);
  for (int64_t i = 0; i < points; ++i) keys[i].point = static_cast<int32_t>(i);
  std::vector<Part> parts, leaves;
  if (points > 0) parts.push_back({0, points});
  while (!parts.empty()) {
    std::vector<int64_t> cuts(parts.size());
    parallel_for(static_cast<int64_t>(parts.size()), threads, [&](int64_t k) {
      const Part& part = parts[k];
      const int64_t count = part.end - part.begin;
      if (count > kTile) cuts[k] = split(rows, padded, keys.data() + part.begin, count);
    });
    std::vector<Part> next;
    for (size_t k = 0; k < parts.size(); ++k) {
      const Part part = parts[k];
      if (cuts[k] == 0) {
        leaves.push_back(part);
        continue;
      }
      next.push_back({part.begin, part.begin + cuts[k]});
      next.push_back({part.begin + cuts[k], part.end});
    }
    parts.swap(next);
  }
  std::sort(leaves.begin(), leaves.end(),
            [](const Part& a, const Part& b) { return a.begin < b.begin; });
  Tiles tiles;
  for (const Part& leaf : leaves) {
    const int64_t count = leaf.end - leaf.begin;
    tiles.begin.push_back(tiles.slots() + (count + kGroup - 1) / kGroup * kGroup);
    for (int64_t i = leaf.begin; i < leaf.end; ++i) tiles.point.push_back(keys[i].point);
    tiles.point.resize(tiles.slots(), -1);
  }
  return tiles;
}

template Tiles order_points(const float*, int64_t, int64_t, int);
template Tiles order_points(const double*, int64_t, int64_t, int);

}  // namespace instembed::sphere
