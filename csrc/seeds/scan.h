// Which pixels lie near which seeds: the scan by which masks of seeds are counted and grown.
//
// All pairs of pixels and seeds would be a matrix product, and nearly all of it for nothing: a
// pixel is near a few seeds. Pixels are taken a vector at a time. Most lie within `reach` of a
// leader, a pixel seen before whose list of seeds that are near enough for that is known; a leader
// costs as much as eight seeds and serves many vectors. What no leader covers is compared with all
// seeds, and there a few channels are nearly always enough to rule four seeds out for a whole
// vector.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "common/simd.h"
#include "common/tiles.h"
#include "mean_shift/formula.h"

namespace instembed::seeds {

// The squared radius of a ball as a test in A sees it: at most `inner` is certainly inside, more
// than `outer` certainly outside, and what lies between is decided by exact_distance.
template <class A>
struct Radius {
  double exact;
  A inner, outer;

  Radius(double squared, int dims) : exact(squared) {
    // Differences below the smallest normal number square to less than this.
    const double tiny = sizeof(A) == 4 ? 1e-36 : 1e-300;
    const double error = 2 * mean_shift::distance_error<A>(dims);
    inner = static_cast<A>(squared * (1 - error) - tiny);
    outer = static_cast<A>(squared * (1 + error) + tiny);
  }
};

// The seeds of one image. Channels are reordered, those in which seeds differ most first, so that
// the first few tell most pixels and seeds apart.
template <class A>
class SeedSet {
 public:
  // `values` (count x dims) are exact; `squared_radii` are the largest that matter, one a seed.
  SeedSet(std::vector<double> values, int dims, const std::vector<double>& squared_radii)
      : exact_(std::move(values)), dims_(dims), count_(static_cast<int>(squared_radii.size())) {
    row_ = (count_ + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
    std::vector<double> spread(dims);
    for (int s = 0; s < count_; ++s) {
      for (int d = 0; d < dims; ++d) {
        const double difference = exact(s)[d] - exact(0)[d];
        if (std::isfinite(difference)) spread[d] += std::abs(difference);
      }
    }
    order_.resize(dims);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int a, int b) { return spread[a] > spread[b]; });
    rows_.resize(static_cast<size_t>(count_) * dims);
    planar_.resize(static_cast<size_t>(row_) * dims);
    for (int s = 0; s < count_; ++s) {
      for (int d = 0; d < dims; ++d) {
        const auto value = static_cast<A>(exact(s)[order_[d]]);
        rows_[static_cast<size_t>(s) * dims + d] = value;
        planar_[static_cast<size_t>(d) * row_ + s] = value;
      }
    }
    outer_.resize(row_, A(-1));
    double largest = 0;
    for (int s = 0; s < count_; ++s) {
      outer_[s] = Radius<A>(squared_radii[s], dims).outer;
      largest = std::max(largest, squared_radii[s]);
    }
    const double grow = 1 + 4 * mean_shift::distance_error<A>(dims);
    const double reach = kReach * std::sqrt(largest);
    reach2_ = static_cast<A>(reach * reach);
    near2_.resize(row_, A(-1));
    for (int s = 0; s < count_; ++s) {
      const double near = (std::sqrt(static_cast<double>(outer_[s])) + reach) * grow;
      near2_[s] = static_cast<A>(near * near * grow);
    }
  }

  int size() const { return count_; }
  int dims() const { return dims_; }
  int channel(int d) const { return order_[d]; }
  const double* exact(int s) const { return exact_.data() + static_cast<size_t>(s) * dims_; }
  const A* row(int s) const { return rows_.data() + static_cast<size_t>(s) * dims_; }
  A outer(int s) const { return outer_[s]; }
  A reach2() const { return reach2_; }

  // Appends the seeds in whose ball a pixel within reach of `center` may lie.
  INSTEMBED_INLINE void find_near(const A* center, std::vector<int32_t>* near) const {
    using V = Vec<A>;
    constexpr int L = kLanes<A>;
    for (int from = 0; from < row_; from += L) {
      V a{};
      for (int d = 0; d < dims_; ++d) {
        const V v = load<V>(planar_.data() + static_cast<size_t>(d) * row_ + from) - center[d];
        a += v * v;
      }
      const auto found = a <= load<V>(near2_.data() + from);
      if (!any_lane(found)) continue;
      for (int k = 0; k < L; ++k) {
        if (found[k]) near->push_back(from + k);
      }
    }
  }

 private:
  // In the largest radius. Far leaders list many seeds, near ones cover few pixels.
  static constexpr double kReach = 0.75;

  std::vector<double> exact_;
  int dims_, count_;
  int64_t row_;
  std::vector<int> order_;
  std::vector<A> rows_, planar_, outer_, near2_;
  A reach2_;
};

template <class A>
struct Leader {
  std::vector<A> center;
  std::vector<int32_t> near;
};

// One thread's way through the pixels of an image, a tile after the other.
template <class A>
class Scanner {
 public:
  using V = Vec<A>;
  using Mask = Vec<MaskLane<A>>;
  static constexpr int L = kLanes<A>;

  explicit Scanner(const SeedSet<A>& seeds)
      : seeds_(seeds), rows_(seeds.dims()), stamp_(seeds.size(), 0) {
    leaders_.reserve(kLeaders);
    all_.resize(seeds.size());
    std::iota(all_.begin(), all_.end(), 0);
  }

  // visit(seed, i, squared, lanes) for every seed and vector of pixels i, i + 1, ... of the tile
  // of which some may lie in the seed's ball. Only the pixels of `counted` take part: lanes.
  template <class Visit>
  INSTEMBED_INLINE void scan(const PlanarTile<A>& tile, int64_t n, const MaskLane<A>* counted,
                             Visit&& visit) {
    for (int d = 0; d < seeds_.dims(); ++d) rows_[d] = tile.row(seeds_.channel(d));
    for (int64_t i = 0; i < n; i += L) {
      const Mask lanes = load<Mask>(counted + i) & first_lanes<A>(n - i);
      if (!any_lane(lanes)) continue;
      const std::vector<int32_t>& near = near_of(i, lanes);
      const auto count = static_cast<int64_t>(near.size());
      for (int64_t k = 0; k < count; k += kGroup) {
        compare(near.data() + k, std::min<int64_t>(kGroup, count - k), i, lanes, visit);
      }
    }
  }

 private:
  static constexpr int kGroup = 4;     // seeds that share the load of a pixel
  static constexpr int kChannels = 8;  // between two looks whether all is ruled out
  static constexpr int kLeaders = 6;

  // Squared distances to a point in the seeds' order of channels, or none if no lane is within
  // `limit`.
  INSTEMBED_INLINE Mask within(const A* center, int64_t i, const Mask& lanes, A limit) const {
    const int dims = seeds_.dims();
    V a{};
    for (int d = 0; d < dims;) {
      for (const int end = std::min(d + kChannels, dims); d < end; ++d) {
        const V v = load<V>(rows_[d] + i) - center[d];
        a += v * v;
      }
      if (!any_lane((a <= limit) & lanes)) return Mask{};
    }
    return (a <= limit) & lanes;
  }

  // The seeds in whose ball one of the pixels may lie.
  INSTEMBED_INLINE const std::vector<int32_t>& near_of(int64_t i, const Mask& lanes) {
    Mask rest = lanes;
    int used = 0;
    const std::vector<int32_t>* only = &union_;
    for (size_t k = 0; k < leaders_.size(); ++k) {
      const Mask hit = within(leaders_[k].center.data(), i, rest, seeds_.reach2());
      if (!any_lane(hit)) continue;
      rest &= ~hit;
      if (k > 0) std::swap(leaders_[k], leaders_[k - 1]);
      only = join(k > 0 ? k - 1 : 0, used++, only);
      if (!any_lane(rest)) return *only;
    }
    for (int k = 0; k < 2; ++k) {
      if (!lead(i, rest)) return all_;
      only = join(0, used++, only);
      if (!any_lane(rest)) return *only;
    }
    return all_;
  }

  // Makes the first of the remaining pixels a leader, if it covers enough of them.
  INSTEMBED_INLINE bool lead(int64_t i, Mask& rest) {
    int first = 0;
    while (!rest[first]) ++first;
    center_.resize(seeds_.dims());
    for (int d = 0; d < seeds_.dims(); ++d) center_[d] = rows_[d][i + first];
    const Mask hit = within(center_.data(), i, rest, seeds_.reach2());
    int covered = 0;
    for (int k = 0; k < L; ++k) covered -= static_cast<int>(hit[k]);
    if (covered * 4 < L) return false;
    if (leaders_.size() < kLeaders) {
      leaders_.insert(leaders_.begin(), Leader<A>{});
    } else {
      std::rotate(leaders_.begin(), leaders_.end() - 1, leaders_.end());
    }
    leaders_[0].center = center_;
    leaders_[0].near.clear();
    seeds_.find_near(center_.data(), &leaders_[0].near);
    rest &= ~hit;
    return true;
  }

  // The seeds of the leaders that a vector has used so far, and those of one more.
  INSTEMBED_INLINE const std::vector<int32_t>* join(size_t leader, int used,
                                                    const std::vector<int32_t>* before) {
    const std::vector<int32_t>* added = &leaders_[leader].near;
    if (used == 0) {
      first_ = *added;
      return &first_;
    }
    ++round_;
    if (before != &union_) union_ = *before;
    for (const int32_t s : union_) stamp_[s] = round_;
    for (const int32_t s : *added) {
      if (stamp_[s] != round_) union_.push_back(s);
    }
    return &union_;
  }

  template <class Visit>
  INSTEMBED_INLINE void compare(const int32_t* ids, int64_t count, int64_t i, const Mask& lanes,
                                Visit& visit) const {
    const int dims = seeds_.dims();
    const A* seed[kGroup];
    A outer[kGroup];
    for (int k = 0; k < kGroup; ++k) {
      const int32_t s = ids[k < count ? k : 0];
      seed[k] = seeds_.row(s);
      outer[k] = seeds_.outer(s);
    }
    V a0{}, a1{}, a2{}, a3{};
    for (int d = 0; d < dims;) {
      for (const int end = std::min(d + kChannels, dims); d < end; ++d) {
        const V x = load<V>(rows_[d] + i);
        const V v0 = x - seed[0][d], v1 = x - seed[1][d];
        const V v2 = x - seed[2][d], v3 = x - seed[3][d];
        a0 += v0 * v0;
        a1 += v1 * v1;
        a2 += v2 * v2;
        a3 += v3 * v3;
      }
      const Mask possible =
          (a0 <= outer[0]) | (a1 <= outer[1]) | (a2 <= outer[2]) | (a3 <= outer[3]);
      if (!any_lane(possible & lanes)) return;
    }
    const V squared[kGroup] = {a0, a1, a2, a3};
    for (int k = 0; k < count; ++k) {
      if (any_lane((squared[k] <= outer[k]) & lanes)) visit(ids[k], i, squared[k], lanes);
    }
  }

  const SeedSet<A>& seeds_;
  std::vector<const A*> rows_;
  std::vector<Leader<A>> leaders_;  // those used last come first, about
  std::vector<int32_t> all_, first_, union_;
  std::vector<uint32_t> stamp_;
  uint32_t round_ = 0;
  std::vector<A> center_;
};

// Pixels a tile: rows long enough to be read well from memory, all of it in the second-level cache.
inline int scan_tile(int64_t channels) {
  int tile = 1024;
  while (tile > 64 && tile * channels > 32768) tile /= 2;
  return tile;
}

constexpr int64_t kRowsAhead = 4;

// A copy of pixels [from, from + n), even where they lie planar already: whole images have rows a
// power of two apart, and then a pixel's channels push each other out of the cache.
template <class A, class T>
INSTEMBED_INLINE PlanarTile<A> copy_planar(const Image<const T>& image, int64_t from, int64_t n,
                                           A* scratch, int64_t stride) {
  if (image.pixel_stride != 1) return load_planar<A>(image, from, n, scratch, stride);
  for (int64_t d = 0; d < image.channels; ++d) {
    const T* row = image.data + from + d * image.channel_stride;
    // Rows are too short for the hardware to see them coming.
    const int64_t ahead = d + kRowsAhead < image.channels ? kRowsAhead * image.channel_stride : 0;
    for (int64_t i = 0; ahead && i < n; i += 64 / sizeof(T)) __builtin_prefetch(row + ahead + i);
    for (int64_t i = 0; i < n; ++i) scratch[d * stride + i] = convert<A>(row[i]);
  }
  return {scratch, stride, 0};
}

}  // namespace instembed::seeds
