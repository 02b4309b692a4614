// Union-find over tiles of neighbours. A pair of tiles needs no look if they are apart, or if all
// their points hang together already; where caps prove that all their points are connected they
// join at once, and two tiles that each hang together need one connected pair. Tasks share the
// forest: its components, and the lowest slot of each, are the same in whatever order it grows.
#include "group_on_sphere/components.h"

#include <atomic>
#include <memory>

#include "sphere/caps.h"
#include "sphere/pairs.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace instembed::group_on_sphere {
namespace {

using sphere::Cloud;
using sphere::kBlock;
using sphere::kTile;
using sphere::Range;

// Every slot points to a lower one of its component, the lowest to itself.
class Forest {
 public:
  explicit Forest(int64_t slots) : parents_(new std::atomic<int32_t>[slots]) {
    for (int64_t s = 0; s < slots; ++s) parents_[s] = static_cast<int32_t>(s);
  }

  int32_t find(int32_t slot) {
    while (true) {
      int32_t parent = parents_[slot];
      if (parent == slot) return slot;
      const int32_t next = parents_[parent];
      if (next != parent) parents_[slot].compare_exchange_weak(parent, next);
      slot = next;
    }
  }

  void unite(int32_t a, int32_t b) {
    while ((a = find(a)) != (b = find(b))) {
      if (a < b) std::swap(a, b);
      int32_t expected = a;  // no longer so if another task has just hung it elsewhere
      if (parents_[a].compare_exchange_strong(expected, b)) return;
    }
  }

 private:
  std::unique_ptr<std::atomic<int32_t>[]> parents_;
};

template <class A>
struct Work {
  const Cloud<A>& cloud;
  const sphere::Caps<A>& caps;
  double threshold;
  double slack;  // what rounding may do to a similarity
  Forest* forest;
  std::atomic<char>* whole;  // whether all points of a tile are known to hang together

  int32_t first(int64_t tile) const { return static_cast<int32_t>(cloud.tiles.begin[tile]); }

  // Slots without a point are the last of a tile.
  int32_t last(int64_t tile) const {
    auto end = static_cast<int32_t>(cloud.tiles.begin[tile + 1]);
    while (cloud.tiles.point[end - 1] < 0) --end;
    return end;
  }

  bool connected(int64_t a, int64_t b) const {
    const A* x = cloud.points.rows.data() + a * cloud.padded;
    const A* y = cloud.points.rows.data() + b * cloud.padded;
    double sum = 0;
    for (int64_t d = 0; d < cloud.channels; ++d) sum += static_cast<double>(x[d]) * y[d];
    return sum >= threshold;
  }
};

// Whether all points of a tile hang together; once so, it stays so.
template <class A>
bool is_whole(const Work<A>& work, int64_t tile) {
  if (work.whole[tile]) return true;
  const int32_t root = work.forest->find(work.first(tile));
  for (int32_t s = work.first(tile) + 1; s < work.last(tile); ++s) {
    if (work.forest->find(s) != root) return false;
  }
  work.whole[tile] = 1;
  return true;
}

template <class A>
void join_tile(const Work<A>& work, int64_t tile) {
  for (int32_t s = work.first(tile) + 1; s < work.last(tile); ++s) {
    work.forest->unite(work.first(tile), s);
  }
  work.whole[tile] = 1;
}

// Unites connected points of tiles i and j: the first such pair only, if `one` is enough.
template <class A>
INSTEMBED_INLINE void join_points(const Work<A>& work, int64_t i, int64_t j, bool one) {
  const Cloud<A>& cloud = work.cloud;
  const int64_t padded = cloud.padded, width = cloud.width(j);
  const A* rows = cloud.points.rows.data() + cloud.tiles.begin[i] * padded;
  const A* planar = cloud.points.planar.data() + cloud.tiles.begin[j] * cloud.channels;
  const int32_t a = work.first(i), b = work.first(j);
  const int64_t height = work.last(i) - a, most = work.last(j) - b;
  const auto least = static_cast<A>(work.threshold - work.slack);
  const auto sure = static_cast<A>(work.threshold + work.slack);
  using V = Piece<A, 2>;
  for (int64_t r0 = 0; r0 < height; r0 += kBlock) {
    for (int64_t c0 = 0; c0 < most; c0 += kLanes<A>) {
      V dots[kBlock][2];
      sphere::find_dots<A, 2, 1>(rows + r0 * padded, padded, planar + c0, width, cloud.channels,
                                 dots);
      V most_similar = dots[0][0];
      for (int r = 0; r < kBlock; ++r) {
        for (const V& similarity : dots[r]) {
          most_similar = similarity > most_similar ? similarity : most_similar;
        }
      }
      if (!any_lane(most_similar >= splat_as<V>(least))) continue;
      for (int64_t r = r0; r < std::min(r0 + kBlock, height); ++r) {
        A values[kLanes<A>];
        for (int p = 0; p < 2; ++p) store(values + p * kLanes<A> / 2, dots[r - r0][p]);
        for (int64_t c = c0; c < std::min(c0 + kLanes<A>, most); ++c) {
          const A value = values[c - c0];
          if (value < least || (value < sure && !work.connected(a + r, b + c))) continue;
          work.forest->unite(a + static_cast<int32_t>(r), b + static_cast<int32_t>(c));
          if (one) return;
        }
      }
    }
  }
}

// Not a template: a function for each target that joins the points of two tiles.
INSTEMBED_SIMD void join_tiles(const Work<float>& work, int64_t i, int64_t j, bool one) {
  join_points(work, i, j, one);
}
INSTEMBED_SIMD void join_tiles(const Work<double>& work, int64_t i, int64_t j, bool one) {
  join_points(work, i, j, one);
}

INSTEMBED_SIMD void find_flags(const Work<float>& work, int64_t tile, const Range& others,
                               float* near, float* joined) {
  sphere::find_near(work.caps, work.cloud.channels, tile, others.first, others.last, near, joined);
}
INSTEMBED_SIMD void find_flags(const Work<double>& work, int64_t tile, const Range& others,
                               double* near, double* joined) {
  sphere::find_near(work.caps, work.cloud.channels, tile, others.first, others.last, near, joined);
}

template <class A>
void join_pair(const Work<A>& work, int64_t i, int64_t j, bool joined) {
  if (joined) {
    join_tile(work, i);
    if (i == j) return;
    join_tile(work, j);
    work.forest->unite(work.first(i), work.first(j));
    return;
  }
  const bool whole = i != j && is_whole(work, i) && is_whole(work, j);
  if (whole && work.forest->find(work.first(i)) == work.forest->find(work.first(j))) return;
  join_tiles(work, i, j, whole);
}

template <class A>
void join_ranges(const Work<A>& work, const Range& first, const Range& second) {
  A near[sphere::kLongest + kLanes<A>], joined[sphere::kLongest + kLanes<A>];
  const bool same = first.first == second.first;
  for (int64_t i = first.first; i < first.last; ++i) {
    const Range others{same ? i + 1 : second.first, second.last};
    find_flags(work, i, others, near, joined);
    for (int64_t j = others.first; j < others.last; ++j) {
      if (near[j - others.first] >= 0) join_pair(work, i, j, joined[j - others.first] > 0);
    }
  }
}

}  // namespace

template <class A>
std::vector<int32_t> connect(const Cloud<A>& cloud, double threshold, int threads) {
  const int64_t tiles = cloud.tiles.size(), slots = cloud.tiles.slots();
  const double slack = sphere::rounding<A>(cloud.channels);
  const sphere::Caps<A> caps = sphere::find_caps(
      cloud, {std::nextafter(threshold, -2), std::nextafter(threshold, 2)}, threads);
  Forest forest(slots);
  const std::unique_ptr<std::atomic<char>[]> whole(new std::atomic<char>[tiles]());
  const Work<A> work{cloud, caps, threshold, slack, &forest, whole.get()};
  parallel_for(tiles, threads, [&](int64_t t) {
    A near[kLanes<A>], joined[kLanes<A>];
    find_flags(work, t, {t, t + 1}, near, joined);
    join_pair(work, t, t, joined[0] > 0);
  });
  sphere::for_ranges(tiles, threads,
                     [&](int64_t, int64_t, const Range& first, const Range& second) {
                       join_ranges(work, first, second);
                     });
  std::vector<int32_t> roots(slots, -1);
  sphere::for_each(slots, threads, [&](int64_t s) {
    if (cloud.tiles.point[s] >= 0) roots[s] = forest.find(static_cast<int32_t>(s));
  });
  return roots;
}

template std::vector<int32_t> connect(const Cloud<float>&, double, int);
template std::vector<int32_t> connect(const Cloud<double>&, double, int);

}  // namespace instembed::group_on_sphere
