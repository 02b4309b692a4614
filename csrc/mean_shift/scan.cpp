#include "mean_shift/scan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/simd_widths.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace instembed::mean_shift {

template <class S>
void Ball<S>::move_to(const double* c) {
  double error2 = 0;
  finite = true;
  for (int d = 0; d < dims(); ++d) {
    center[d] = c[d];
    rounded[d] = static_cast<S>(c[d]);
    const double e = c[d] - static_cast<double>(rounded[d]);
    error2 += e * e;
    finite = finite && std::isfinite(c[d]);
  }
  grow = static_cast<S>(1 + 2 * distance_error<S>(dims()));
  static_cast<Certain<S>&>(*this) = Certain<S>::of(dims(), bandwidth, error2);
}

template struct Ball<float>;
template struct Ball<double>;

namespace {

// out[i] = squared distance of point i from c, for `lanes` points from i on.
template <int lanes, class S>
INSTEMBED_INLINE void distances_at(const S* x, int64_t row, int64_t i, int dims, const S* c,
                                   S* out) {
  using V = vector_t<S, lanes>;
  V a{};
  for (int d = 0; d < dims; ++d) {
    const V v = load<V>(x + d * row + i) - c[d];
    a += v * v;
  }
  store(out + i, a);
}

template <int kBytes, class S>
INSTEMBED_INLINE void distances(const S* x, int64_t row, int64_t n, int dims, const S* c, S* out) {
  constexpr int L = kBytes / static_cast<int>(sizeof(S));
  using V = vector_t<S, L>;
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    V a0{}, a1{}, a2{}, a3{};
    for (int d = 0; d < dims; ++d) {
      const S* p = x + d * row + i;
      const V v0 = load<V>(p) - c[d], v1 = load<V>(p + L) - c[d];
      const V v2 = load<V>(p + 2 * L) - c[d], v3 = load<V>(p + 3 * L) - c[d];
      a0 += v0 * v0;
      a1 += v1 * v1;
      a2 += v2 * v2;
      a3 += v3 * v3;
    }
    store(out + i, a0);
    store(out + i + L, a1);
    store(out + i + 2 * L, a2);
    store(out + i + 3 * L, a3);
  }
  for (; i + L <= n; i += L) distances_at<L>(x, row, i, dims, c, out);
  // Blocks are small: what is left goes by vectors too, the last of which may take some points
  // again.
  if (i == n) return;
  if (n >= L) return distances_at<L>(x, row, n - L, dims, c, out);
  if constexpr (L >= 4) {
    if (n >= L / 2) {
      distances_at<L / 2>(x, row, 0, dims, c, out);
      return distances_at<L / 2>(x, row, n - L / 2, dims, c, out);
    }
  }
  if constexpr (L >= 8) {
    if (n >= L / 4) {
      distances_at<L / 4>(x, row, 0, dims, c, out);
      return distances_at<L / 4>(x, row, n - L / 4, dims, c, out);
    }
  }
  for (; i < n; ++i) distances_at<1>(x, row, i, dims, c, out);
}

template <int kBytes, class S>
INSTEMBED_INLINE void exact_distances_of(const Block<S>& block, int dims, const double* c,
                                         double* out) {
  constexpr int L = kBytes / 8;
  using V = vector_t<double, L>;
  using Narrow = vector_t<S, L>;
  int i = 0;
  for (; i + L <= block.size; i += L) {
    V a{};
    for (int d = 0; d < dims; ++d) {
      const auto x = load<Narrow>(block.x + d * block.stride + i);
      const V v = __builtin_convertvector(x, V) - c[d];
      a += v * v;
    }
    store(out + i, a);
  }
  for (; i < block.size; ++i) out[i] = squared_distance(block.x + i, block.stride, c, dims);
}

// The least of n numbers that are not negative, NaNs aside: in order of their bits.
template <class S>
INSTEMBED_INLINE S least_of(const S* values, int64_t n) {
  mask_t<S> least = std::numeric_limits<mask_t<S>>::max();
  for (int64_t i = 0; i < n; ++i) {
    mask_t<S> bits;
    std::memcpy(&bits, values + i, sizeof(S));
    least = bits < least ? bits : least;
  }
  S value;
  std::memcpy(&value, &least, sizeof(S));
  return value;
}

template <int kBytes, class S>
INSTEMBED_INLINE int64_t nearest_of(const Balls<S>& balls, int dims, const S* c, S* squared) {
  distances<kBytes>(balls.centers.get(), balls.row, balls.count, dims, c, squared);
  if (balls.count == 0) return -1;
  const S least = least_of(squared, balls.count);
  constexpr int L = kBytes / static_cast<int>(sizeof(S));
  int64_t nearest = 0;
  while (nearest + L <= balls.count &&
         !any_lane(load<vector_t<S, L>>(squared + nearest) == least)) {
    nearest += L;
  }
  while (nearest < balls.count && squared[nearest] != least) ++nearest;
  return nearest == balls.count ? 0 : nearest;
}

// `least` gets a lower bound on the distance of the points where none is a member.
template <int kBytes, class S>
INSTEMBED_INLINE int members(const Block<S>& block, const Ball<S>& ball, mask_t<S>* mask,
                             S* least = nullptr) {
  S squared[kMaxBlock];
  const int n = block.size;
  const int dims = ball.dims();
  distances<kBytes>(block.x, block.stride, n, dims, ball.rounded.data(), squared);
  const int padded = (n + kLanes<S> - 1) / kLanes<S> * kLanes<S>;  // loops over whole vectors
  std::fill(squared + n, squared + padded, std::numeric_limits<S>::quiet_NaN());
  mask_t<S> possible = 0;
  for (int i = 0; i < padded; ++i) possible -= squared[i] <= ball.outer2 ? -1 : 0;
  if (possible == 0) {
    if (least) *least = std::sqrt(least_of(squared, padded));
    return 0;
  }
  int inside = 0;
  for (int i = 0; i < padded; ++i) {
    mask[i] = squared[i] <= ball.inner2 ? -1 : 0;
    inside -= static_cast<int>(mask[i]);
  }
  if (possible != inside) {
    for (int i = 0; i < n; ++i) {
      if (mask[i] || !(squared[i] <= ball.outer2)) continue;
      if (squared_distance(block.x + i, block.stride, ball.center.data(), dims) <=
          ball.bandwidth2) {
        mask[i] = -1;
        ++inside;
      }
    }
  }
  return inside;
}

// The sum of the masked points, lanes combined in a fixed order.
template <int kBytes, class S>
INSTEMBED_INLINE void add_masked(const Block<S>& block, int dims, const mask_t<S>* mask,
                                 double* sum) {
  using Sum = RegisterSum<kBytes>;
  using Narrow = vector_t<S, Sum::lanes>;
  using Mask = vector_t<mask_t<S>, Sum::lanes>;
  const int whole = block.size / kLanes<double> * kLanes<double>;
  for (int d = 0; d < dims; ++d) {
    const S* x = block.x + d * block.stride;
    Sum a;
    for (int i = 0; i < whole; i += kLanes<double>) {
      a.add([&](int k) __attribute__((always_inline)) {
        return keep(load<Narrow>(x + i + k), load<Mask>(mask + i + k));
      });
    }
    double rest = a.total();
    for (int i = whole; i < block.size; ++i) rest += mask[i] ? static_cast<double>(x[i]) : 0.0;
    sum[d] += rest;
  }
}

template <int kBytes, class S>
INSTEMBED_INLINE void add_block(const BlockSet<S>& set, int64_t b, const Ball<S>& ball,
                                const Scan& scan, double* clear, Moments* to) {
  const Block<S>& block = set.blocks[b];
  mask_t<S> mask[kMaxBlock];
  S least = 0;
  const int inside = members<kBytes>(block, ball, mask, clear ? &least : nullptr);
  if (inside == 0) {
    if (clear) *clear = scan.travelled + ball.gap(least);
    return;
  }
  to->count += inside;
  if (8 * inside < block.size) {
    for (int i = 0; i < block.size; ++i) {
      if (!mask[i]) continue;
      for (int d = 0; d < set.dims; ++d) {
        to->sum[d] += static_cast<double>(block.x[d * block.stride + i]);
      }
    }
  } else {
    add_masked<kBytes>(block, set.dims, mask, to->sum.data());
  }
  if (!scan.keys) return;
  for (int i = 0; i < block.size; ++i) {
    to->key += mask[i] ? point_key(block.pixel(i)) : 0;
  }
}

template <class S>
INSTEMBED_INLINE void prefetch(const Block<S>& block, int dims) {
  for (int d = 0; d < dims; ++d) {
    const S* x = block.x + d * block.stride;
    for (int i = 0; i < block.size; i += kLanes<S>) __builtin_prefetch(x + i, 0, 2);
  }
}

constexpr int64_t kStrip = 256;

template <int kBytes, class S>
INSTEMBED_INLINE int64_t whole_blocks(const BlockSet<S>& set, const Front<S>& front,
                                      const Ball<S>& ball, const Scan& scan, Moments* to,
                                      int32_t* straddling) {
  const Balls<S>& balls = front.balls;
  S squared[kStrip];
  int64_t count = 0;
  for (int64_t from = 0; from < balls.count; from += kStrip) {
    const int64_t n = std::min(kStrip, balls.count - from);
    distances<kBytes>(balls.centers.get() + from, balls.row, n, set.dims, ball.rounded.data(),
                      squared);
    for (int64_t i = 0; i < n; ++i) {
      const S radius = balls.radius[from + i];
      const S far = (ball.outer + radius) * ball.grow;
      if (squared[i] > far * far) continue;
      const int64_t b = front.ids[from + i];
      const int32_t size = set.blocks[b].size;
      if (size == 0) continue;
      const S near = ball.inner - radius;
      if (near >= 0 && squared[i] <= near * near) {
        const double* sum = set.sums.get() + b * set.dims;
        for (int d = 0; d < set.dims; ++d) to->sum[d] += sum[d];
        to->count += size;
        if (scan.keys) to->key += scan.block_keys[b];
      } else if (scan.clear == nullptr || scan.clear[from + i] <= scan.travelled) {
        straddling[count++] = static_cast<int32_t>(from + i);
      }
    }
  }
  return count;
}

// Points in an image lie in as many places as they have channels: fetch them while the last two
// blocks are tested. Into the second-level cache, which has more room for what is on its way.
template <int kBytes, class S>
INSTEMBED_INLINE void straddling_blocks(const BlockSet<S>& set, const Front<S>& front,
                                        const int32_t* entries, int64_t n, const Ball<S>& ball,
                                        const Scan& scan, Moments* to) {
  constexpr int64_t kAhead = 2;
  for (int64_t k = -kAhead; k < n; ++k) {
    if (k + kAhead < n) prefetch(set.blocks[front.ids[entries[k + kAhead]]], set.dims);
    if (k < 0) continue;
    add_block<kBytes>(set, front.ids[entries[k]], ball, scan,
                      scan.clear ? scan.clear + entries[k] : nullptr, to);
  }
}

template <int kBytes, class S>
INSTEMBED_INLINE void near_range(const Balls<S>& balls, int64_t begin, int64_t end,
                                 const Ball<S>& ball, double slack, std::vector<int32_t>* found) {
  S squared[kStrip];
  const S reach = static_cast<S>((static_cast<double>(ball.outer) + slack) * ball.grow);
  for (int64_t from = begin; from < end; from += kStrip) {
    const int64_t n = std::min(kStrip, end - from);
    distances<kBytes>(balls.centers.get() + from, balls.row, n, ball.dims(), ball.rounded.data(),
                      squared);
    const S* radius = balls.radius.get() + from;
    // Most strips hold nothing near: find that out without branches, by groups.
    for (int64_t group = 0; group < n; group += 32) {
      const int64_t stop = std::min(group + 32, n);
      int hits = 0;
      for (int64_t i = group; i < stop; ++i) {
        const S far = (reach + radius[i]) * ball.grow;
        hits += squared[i] <= far * far ? 1 : 0;
      }
      for (int64_t i = group; hits > 0 && i < stop; ++i) {
        const S far = (reach + radius[i]) * ball.grow;
        if (squared[i] > far * far) continue;
        found->push_back(static_cast<int32_t>(from + i));
        --hits;
      }
    }
  }
}

// The kernels as functions of their own, one a target: only this file sees which there are.
namespace widths {

#define INSTEMBED_SCANS(S)                                                                       \
  INSTEMBED_SIMD_WIDTHS(                                                                         \
      void squared_distances(const S* x, int64_t row, int64_t n, int dims, const S* c, S* out),  \
      distances<kBytes>(x, row, n, dims, c, out))                                                \
  INSTEMBED_SIMD_WIDTHS(                                                                         \
      int64_t nearest_ball(const Balls<S>& balls, int dims, const S* c, S* squared),             \
      return nearest_of<kBytes>(balls, dims, c, squared))                                        \
  INSTEMBED_SIMD_WIDTHS(                                                                         \
      void exact_distances(const Block<S>& block, int dims, const double* c, double* out),       \
      exact_distances_of<kBytes>(block, dims, c, out))                                           \
  INSTEMBED_SIMD_WIDTHS(                                                                         \
      int block_members(const Block<S>& block, const Ball<S>& ball, mask_t<S>* mask),            \
      return members<kBytes>(block, ball, mask))                                                 \
  INSTEMBED_SIMD_WIDTHS(                                                                         \
      int64_t add_whole(const BlockSet<S>& set, const Front<S>& front, const Ball<S>& ball,      \
                        const Scan& scan, Moments* to, int32_t* straddling),                     \
      return whole_blocks<kBytes>(set, front, ball, scan, to, straddling))                       \
  INSTEMBED_SIMD_WIDTHS(                                                                         \
      void add_straddling(const BlockSet<S>& set, const Front<S>& front, const int32_t* entries, \
                          int64_t n, const Ball<S>& ball, const Scan& scan, Moments* to),        \
      straddling_blocks<kBytes>(set, front, entries, n, ball, scan, to))                         \
  INSTEMBED_SIMD_WIDTHS(                                                                         \
      void find_near(const Balls<S>& balls, int64_t begin, int64_t end, const Ball<S>& ball,     \
                     double slack, std::vector<int32_t>* found),                                 \
      near_range<kBytes>(balls, begin, end, ball, slack, found))

INSTEMBED_SCANS(float)
INSTEMBED_SCANS(double)
#undef INSTEMBED_SCANS

}  // namespace widths
}  // namespace

#define INSTEMBED_SCANS(S)                                                                   \
  void squared_distances(const S* x, int64_t row, int64_t n, int dims, const S* c, S* out) { \
    widths::squared_distances(x, row, n, dims, c, out);                                      \
  }                                                                                          \
  int64_t nearest_ball(const Balls<S>& balls, int dims, const S* c, S* squared) {            \
    return widths::nearest_ball(balls, dims, c, squared);                                    \
  }                                                                                          \
  void exact_distances(const Block<S>& block, int dims, const double* c, double* out) {      \
    widths::exact_distances(block, dims, c, out);                                            \
  }                                                                                          \
  int block_members(const Block<S>& block, const Ball<S>& ball, mask_t<S>* mask) {           \
    return widths::block_members(block, ball, mask);                                         \
  }                                                                                          \
  int64_t add_whole(const BlockSet<S>& set, const Front<S>& front, const Ball<S>& ball,      \
                    const Scan& scan, Moments* to, int32_t* straddling) {                    \
    return widths::add_whole(set, front, ball, scan, to, straddling);                        \
  }                                                                                          \
  void add_straddling(const BlockSet<S>& set, const Front<S>& front, const int32_t* entries, \
                      int64_t n, const Ball<S>& ball, const Scan& scan, Moments* to) {       \
    widths::add_straddling(set, front, entries, n, ball, scan, to);                          \
  }                                                                                          \
  void find_near(const Balls<S>& balls, int64_t begin, int64_t end, const Ball<S>& ball,     \
                 double slack, std::vector<int32_t>* found) {                                \
    widths::find_near(balls, begin, end, ball, slack, found);                                \
  }

INSTEMBED_SCANS(float)
INSTEMBED_SCANS(double)
#undef INSTEMBED_SCANS

template <class S>
void make_front(const Balls<S>& balls, const int32_t* ids, int dims,
                const std::vector<int32_t>& entries, Front<S>* front) {
  const auto n = static_cast<int64_t>(entries.size());
  if (front->balls.row < n) {
    front->balls.allocate(n + n / 2, dims);
  }
  front->balls.count = n;
  front->ids.resize(entries.size());
  for (int64_t i = 0; i < n; ++i) {
    front->ids[i] = ids ? ids[entries[i]] : entries[i];
    front->balls.radius[i] = balls.radius[entries[i]];
  }
  for (int d = 0; d < dims; ++d) {
    const S* from = balls.centers.get() + d * balls.row;
    S* to = front->balls.centers.get() + d * front->balls.row;
    for (int64_t i = 0; i < n; ++i) to[i] = from[entries[i]];
  }
}

template <class S>
void add_members(const BlockSet<S>& set, const Front<S>& front, const Ball<S>& ball,
                 const Scan& scan, std::vector<int32_t>* straddling, Moments* to) {
  straddling->resize(front.ids.size());
  const int64_t n = add_whole(set, front, ball, scan, to, straddling->data());
  add_straddling(set, front, straddling->data(), n, ball, scan, to);
}

template void add_members(const BlockSet<float>&, const Front<float>&, const Ball<float>&,
                          const Scan&, std::vector<int32_t>*, Moments*);
template void add_members(const BlockSet<double>&, const Front<double>&, const Ball<double>&,
                          const Scan&, std::vector<int32_t>*, Moments*);

template void make_front(const Balls<float>&, const int32_t*, int, const std::vector<int32_t>&,
                         Front<float>*);
template void make_front(const Balls<double>&, const int32_t*, int, const std::vector<int32_t>&,
                         Front<double>*);

}  // namespace instembed::mean_shift
