// Which pixels lie near which seeds: the scan by which masks of seeds are counted and grown.
//
// All pairs of pixels and seeds would be a matrix product, and nearly all of it for nothing: a
// pixel is near a few seeds. Pixels are taken a segment at a time. The box around a segment, in the
// few channels in which seeds differ most, rules out seeds for all of its pixels; where pixels
// resemble their neighbours, hardly any are left. The rest is the product |p|^2 - 2 ps + |s|^2 of a
// few pixels and seeds in registers, a few channels at a time: partial sums only grow, so that it
// ends where they are all too large. Channels are read from the image when they are first needed,
// which for most tiles of a structureless image is never.
//
// The product's rounding depends on the norms. What it leaves open is decided by a sum of squared
// differences, and what that leaves open by exact_distance.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "common/tiles.h"
#include "mean_shift/formula.h"
#include "seeds/exact.h"
#include "seeds/products.h"
#include "seeds/radius.h"

namespace instembed::seeds {

constexpr int kChannels = 8;  // that are read, or added, at a time

// The seeds of one image. Channels are reordered, those in which seeds differ most first, so that
// the first few tell most pixels and seeds apart. Products are taken about the seeds' mean.
template <class A>
class SeedSet {
 public:
  // Squares beyond it come too close to what A can hold: no product is taken then.
  static constexpr A kLargest = static_cast<A>(sizeof(A) == 4 ? 1e36 : 1e300);

  // `values` (count x dims) are exact; `squared_radii` are the largest that matter, one a seed.
  SeedSet(std::vector<double> values, int dims, const std::vector<double>& squared_radii)
      : exact_(std::move(values)), dims_(dims), count_(static_cast<int>(squared_radii.size())) {
    order_channels();
    row_ = (count_ + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
    planar_.resize(static_cast<size_t>(row_) * box_channels());
    rows_.resize(static_cast<size_t>(count_) * dims);
    products_.resize(rows_.size());
    norms_.resize(static_cast<size_t>(count_) * (blocks() + 1));
    A largest_norm = 0;
    for (int s = 0; s < count_; ++s) {
      A norm = 0;
      A* norms = norms_.data() + static_cast<size_t>(s) * (blocks() + 1);
      for (int d = 0; d < dims; ++d) {
        const auto value = static_cast<A>(exact(s)[order_[d]]);
        const A centered = value - origin_[d];
        rows_[static_cast<size_t>(s) * dims + d] = value;
        products_[static_cast<size_t>(s) * dims + d] = -2 * centered;
        if (d < box_channels()) planar_[static_cast<size_t>(d) * row_ + s] = value;
        norm += centered * centered;
        norms[d / kChannels + 1] = norm;
      }
      if (norm <= kLargest) {
        largest_norm = std::max(largest_norm, norm);
      } else {
        std::fill(norms, norms + blocks() + 1, std::numeric_limits<A>::quiet_NaN());
      }
    }
    outer_.resize(row_, A(-1));
    for (int s = 0; s < count_; ++s) {
      outer_[s] = Radius<A>(squared_radii[s], dims).outer;
      largest_outer_ = std::max(largest_outer_, outer_[s]);
    }
    // Rounding of norms and products, of centring and of the limits, generously.
    error_ = (2 * dims + 16) * std::numeric_limits<A>::epsilon();
    slack_ =
        error_ * (largest_norm + largest_outer_) + static_cast<A>(sizeof(A) == 4 ? 1e-35 : 1e-299);
  }

  int size() const { return count_; }
  int dims() const { return dims_; }
  int blocks() const { return (dims_ + kChannels - 1) / kChannels; }
  int block_end(int block) const { return std::min(dims_, (block + 1) * kChannels); }
  int box_channels() const { return std::min(dims_, kChannels); }
  int channel(int d) const { return order_[d]; }
  A origin(int d) const { return origin_[d]; }
  const double* exact(int s) const { return exact_.data() + static_cast<size_t>(s) * dims_; }
  const A* row(int s) const { return rows_.data() + static_cast<size_t>(s) * dims_; }
  // -2 s, and |s|^2 of the first so many blocks; NaN if no product may be taken.
  const A* product(int s) const { return products_.data() + static_cast<size_t>(s) * dims_; }
  const A* norms(int s) const { return norms_.data() + static_cast<size_t>(s) * (blocks() + 1); }
  A largest_outer() const { return largest_outer_; }
  // A product that gives a squared distance is off by at most error() |p|^2 + slack().
  A error() const { return error_; }
  A slack() const { return slack_; }

  // Appends the seeds in whose ball a point of the box may lie.
  template <int kBytes>
  INSTEMBED_INLINE void find_near(const A* low, const A* high, std::vector<int32_t>* near) const {
    constexpr int L = kBytes / static_cast<int>(sizeof(A));
    using V = vector_t<A, L>;
    for (int from = 0; from < row_; from += L) {
      V sum{};
      for (int d = 0; d < box_channels(); ++d) {
        const V s = load<V>(planar_.data() + static_cast<size_t>(d) * row_ + from);
        const V below = low[d] - s, above = s - high[d];
        V beyond = below > above ? below : above;
        beyond = beyond > 0 ? beyond : V{};
        sum += beyond * beyond;
      }
      const auto outside = sum > load<V>(outer_.data() + from);
      if (!any_lane(~outside)) continue;
      for (int k = 0; k < L; ++k) {
        if (!outside[k]) near->push_back(from + k);
      }
    }
  }

 private:
  void order_channels() {
    std::vector<double> sum(dims_), spread(dims_);
    int64_t finite = 0;
    for (int s = 0; s < count_; ++s) {
      const double* values = exact(s);
      if (!std::all_of(values, values + dims_, [](double v) { return std::abs(v) < 1e30; }))
        continue;
      ++finite;
      for (int d = 0; d < dims_; ++d) sum[d] += values[d];
    }
    for (double& value : sum) value /= static_cast<double>(std::max<int64_t>(1, finite));
    for (int s = 0; s < count_; ++s) {
      for (int d = 0; d < dims_; ++d) {
        const double difference = std::abs(exact(s)[d] - sum[d]);
        if (difference < 1e30) spread[d] += difference;
      }
    }
    order_.resize(dims_);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int a, int b) { return spread[a] > spread[b]; });
    for (const int channel : order_) origin_.push_back(static_cast<A>(sum[channel]));
  }

  std::vector<double> exact_;
  int dims_, count_;
  int64_t row_;
  std::vector<int> order_;
  std::vector<A> origin_, rows_, products_, norms_, planar_, outer_;
  A largest_outer_ = 0, error_, slack_;
};

// Pixels a tile: rows long enough to be read well from memory, all of it in the second-level cache.
inline int scan_tile(int64_t channels) {
  int tile = 1024;
  while (tile > kSegment && tile * channels > 32768) tile /= 2;
  return tile;
}

// A tile's channels in the seeds' order, copied a block at a time when they are first needed. A
// copy even where pixels lie planar already: whole images have rows a power of two apart, and then
// a pixel's channels push each other out of the cache.
template <class A, class T>
class LazyTile {
 public:
  LazyTile(const SeedSet<A>& seeds, const Image<const T>& image, int tile, A* scratch)
      : seeds_(seeds), image_(image), stride_(planar_stride(tile)), scratch_(scratch) {}

  INSTEMBED_INLINE void start(int64_t from, int n) {
    from_ = from;
    n_ = n;
    blocks_ = 0;
    if (image_.pixel_stride == 1) return;
    load_planar<A>(image_, from, n, scratch_, stride_);
    blocks_ = seeds_.blocks();
  }

  INSTEMBED_INLINE void need(int blocks) {
    for (; blocks_ < blocks; ++blocks_) {
      const int begin = blocks_ * kChannels, end = seeds_.block_end(blocks_);
      for (int d = begin; d < end; ++d) {
        const int channel = seeds_.channel(d);
        const T* source = image_.data + from_ + channel * image_.channel_stride;
        A* target = scratch_ + channel * stride_;
        if (d + kRowsAhead < seeds_.block_end(blocks - 1)) {
          // Rows are too short for the hardware to see them coming.
          const T* ahead =
              image_.data + from_ + seeds_.channel(d + kRowsAhead) * image_.channel_stride;
          for (int i = 0; i < n_; i += 64 / sizeof(T)) __builtin_prefetch(ahead + i);
        }
        for (int i = 0; i < n_; ++i) target[i] = convert<A>(source[i]);
      }
    }
  }

  const A* row(int d) const { return scratch_ + seeds_.channel(d) * stride_; }

  // To a seed, of a pixel whose channels have all been needed.
  double exact_distance(int s, int64_t i) const {
    return seeds::exact_distance(scratch_ + i, stride_, seeds_.exact(s), seeds_.dims());
  }

 private:
  static constexpr int kRowsAhead = 4;

  const SeedSet<A>& seeds_;
  const Image<const T>& image_;
  const int64_t stride_;
  A* scratch_;
  int64_t from_ = 0;
  int n_ = 0, blocks_ = 0;
};

// One thread's way through the tiles of an image, with vectors of kBytes.
template <class A, int kBytes>
class Scanner {
 public:
  static constexpr int L = kBytes / static_cast<int>(sizeof(A));
  using V = vector_t<A, L>;
  using Mask = vector_t<MaskLane<A>, L>;

  explicit Scanner(const SeedSet<A>& seeds)
      : seeds_(seeds),
        centered_(static_cast<size_t>(seeds.dims()) * kSegment / kLanes<A>),
        limits_(static_cast<size_t>(seeds.blocks() + 1) * kSegment / kLanes<A>) {}

  // visitor.start(from, end) at every segment, and for every seed and kWide vectors of pixels i, i
  // + 1, ... of the tile of which some may lie in the seed's ball:
  //   visitor.about(seed, i, low, high, lanes, open), bounds on the squared distances, sets the
  //     lanes for which they are not enough;
  //   visitor.fine(seed, i, squared, lanes) has sums of squared differences for one such vector.
  // Only pixels of `counted` take part.
  template <class Tile, class Visitor>
  INSTEMBED_INLINE void scan(Tile& tile, int n, const MaskLane<A>* counted, Visitor&& visitor) {
    for (int from = 0; from < n; from += kSegment) {
      const int end = std::min(n, from + kSegment);
      start_segment(tile, from, end);
      if (near_.empty()) continue;
      visitor.start(from, end);
      const auto count = static_cast<int>(near_.size());
      for (int k = 0; k < count; k += kGroup) {
        compare(tile, near_.data() + k, std::min(kGroup, count - k), from, end, counted, visitor);
      }
    }
  }

 private:
  template <class Tile>
  INSTEMBED_INLINE void start_segment(Tile& tile, int from, int end) {
    blocks_ = 0;
    near_.clear();
    if (end - from < L) {
      near_.resize(seeds_.size());
      std::iota(near_.begin(), near_.end(), 0);
      return;
    }
    tile.need(1);
    A low[kChannels], high[kChannels];
    for (int d = 0; d < seeds_.box_channels(); ++d) {
      const A* row = tile.row(d);
      V least = splat_native(std::numeric_limits<A>::infinity()), most = -least;
      for (int i = from; i < end; i += L) {
        const V x = load<V>(row + std::min(i, end - L));
        least = x < least ? x : least;  // passes over NaN
        most = x > most ? x : most;
      }
      low[d] = least[0];
      high[d] = most[0];
      for (int k = 1; k < L; ++k) {
        low[d] = std::min(low[d], least[k]);
        high[d] = std::max(high[d], most[k]);
      }
    }
    seeds_.template find_near<kBytes>(low, high, &near_);
  }

  static INSTEMBED_INLINE V splat_native(A value) { return value - V{}; }

  A* centered(int d) { return &reinterpret_cast<A*>(centered_.data())[d * kSegment]; }
  // What the product of the first so many blocks may be at most; NaN if none may be taken.
  A* limits(int blocks) { return &reinterpret_cast<A*>(limits_.data())[blocks * kSegment]; }

  template <class Tile>
  INSTEMBED_INLINE void need(Tile& tile, int from, int blocks) {
    if (blocks <= blocks_) return;
    tile.need(blocks);
    for (; blocks_ < blocks; ++blocks_) {
      for (int i = 0; i < kSegment; i += L) {
        V norm = blocks_ ? load<V>(norms_ + i) : V{};
        for (int d = blocks_ * kChannels; d < seeds_.block_end(blocks_); ++d) {
          const V x = load<V>(tile.row(d) + from + i) - seeds_.origin(d);
          store(centered(d) + i, x);
          norm += x * x;
        }
        store(norms_ + i, norm);
        V limit = seeds_.largest_outer() + seeds_.slack() - norm + seeds_.error() * norm;
        limit = norm <= SeedSet<A>::kLargest ? limit
                                             : splat_native(std::numeric_limits<A>::quiet_NaN());
        store(limits(blocks_ + 1) + i, limit);
      }
    }
  }

  template <class Tile, class Visitor>
  INSTEMBED_INLINE void compare(Tile& tile, const int32_t* ids, int count, int from, int end,
                                const MaskLane<A>* counted, Visitor& visitor) {
    const A *seed[kGroup], *norms[kGroup];
    for (int r = 0; r < kGroup; ++r) {
      seed[r] = seeds_.product(ids[r < count ? r : 0]);
      norms[r] = seeds_.norms(ids[r < count ? r : 0]);
    }
    A start[kGroup];
    alignas(64) A sums[kGroup * kWide * L];
    for (int i = 0; i < end - from; i += kWide * L) {
      int done = std::min(first_, seeds_.blocks());
      need(tile, from, done);
      for (int r = 0; r < kGroup; ++r) start[r] = norms[r][done];
      bool possible = add_products(seed, start, centered(0) + i, seeds_.block_end(done - 1),
                                   limits(done) + i, true, sums);
      note(possible);
      while (possible && done < seeds_.blocks()) {
        const int next = std::min(2 * done, seeds_.blocks()), begin = done * kChannels;
        need(tile, from, next);
        const A* rest[kGroup];
        for (int r = 0; r < kGroup; ++r) {
          start[r] = norms[r][next] - norms[r][done];
          rest[r] = seed[r] + begin;
        }
        possible = add_products(rest, start, centered(begin) + i,
                                seeds_.block_end(next - 1) - begin, limits(next) + i, false, sums);
        done = next;
      }
      if (!possible) continue;
      settle(tile, ids, count, from, i, end, counted, sums, visitor);
    }
  }

  // Pixels and seeds whose products are complete.
  template <class Tile, class Visitor>
  INSTEMBED_INLINE void settle(const Tile& tile, const int32_t* ids, int count, int from, int i,
                               int end, const MaskLane<A>* counted, const A* sums,
                               Visitor& visitor) {
    Mask lanes[kWide];
    V norm[kWide], slack[kWide], limit[kWide];
#pragma GCC unroll 2
    for (int w = 0; w < kWide; ++w) {
      const int at = i + w * L;
      lanes[w] = load<Mask>(counted + from + at) & lanes_before(end - from - at);
      norm[w] = load<V>(norms_ + at);
      slack[w] = seeds_.slack() + seeds_.error() * norm[w];
      slack[w] = norm[w] <= SeedSet<A>::kLargest
                     ? slack[w]
                     : splat_native(std::numeric_limits<A>::quiet_NaN());
      limit[w] = load<V>(limits(seeds_.blocks()) + at);
    }
    for (int r = 0; r < count; ++r) {
      V low[kWide], high[kWide];
      Mask possible{}, open[kWide];
#pragma GCC unroll 2
      for (int w = 0; w < kWide; ++w) {
        const V sum = load<V>(sums + (r * kWide + w) * L);
        possible |= ~(sum > limit[w]) & lanes[w];
        low[w] = sum + norm[w] - slack[w];
        high[w] = sum + norm[w] + slack[w];
      }
      if (!any_lane(possible)) continue;
      visitor.about(ids[r], from + i, low, high, lanes, open);
      if (!any_lane(open[0] | open[1])) continue;
      for (int w = 0; w < kWide; ++w) {
        const int at = from + i + w * L;
        if (any_lane(open[w])) visitor.fine(ids[r], at, squared(tile, ids[r], at), open[w]);
      }
    }
  }

  // How many blocks are worth adding before the first look: as few as ruled all out lately.
  INSTEMBED_INLINE void note(bool possible) {
    if (!possible) {
      misses_ = 0;
      first_ = std::max(1, first_ / 2);
    } else if (++misses_ == 4) {
      misses_ = 0;
      first_ = std::min(2 * first_, seeds_.blocks());
    }
  }

  // Ones in the lanes below `count`.
  static INSTEMBED_INLINE Mask lanes_before(int count) {
    const int lanes = std::clamp(count, 0, L);
    return load<Mask>(mask_table<A>.values + kLanes<A> - lanes);
  }

  template <class Tile>
  INSTEMBED_INLINE V squared(const Tile& tile, int s, int i) const {
    const A* seed = seeds_.row(s);
    V sum{};
    for (int d = 0; d < seeds_.dims(); ++d) {
      const V difference = load<V>(tile.row(d) + i) - seed[d];
      sum += difference * difference;
    }
    return sum;
  }

  const SeedSet<A>& seeds_;
  std::vector<VecSlot<A>> centered_, limits_;
  alignas(64) A norms_[kSegment];
  std::vector<int32_t> near_;
  int blocks_ = 0;  // of the segment that are centred
  int first_ = 1, misses_ = 0;
};

}  // namespace instembed::seeds
