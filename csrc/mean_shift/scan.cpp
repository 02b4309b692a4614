#include "mean_shift/scan.h"

#include <algorithm>
#include <cmath>

#include "common/simd.h"

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
  const double relative = distance_error<S>(dims());
  const double error = std::sqrt(error2) * (1 + 1e-12);
  const double below = (bandwidth - error) * (1 - relative);
  const double above = (bandwidth + error) * (1 + relative);
  inner = static_cast<S>(below);
  outer = static_cast<S>(above);
  grow = static_cast<S>(1 + 2 * relative);
  if (std::is_same_v<S, double>) {
    inner2 = outer2 = static_cast<S>(bandwidth2);
  } else {
    inner2 = below > 0 ? static_cast<S>(below * below) : static_cast<S>(-1);
    outer2 = static_cast<S>(above * above);
  }
}

template struct Ball<float>;
template struct Ball<double>;

template <class S>
Ownership::Ownership(const BlockSet<S>& set)
    : owner(set.blocks.size(), 0), slot(set.blocks.size(), -1), alive(set.blocks.size()) {
  for (size_t b = 0; b < set.blocks.size(); ++b) alive[b] = set.blocks[b].size;
}

template Ownership::Ownership(const BlockSet<float>&);
template Ownership::Ownership(const BlockSet<double>&);

namespace {

template <class S>
INSTEMBED_INLINE void distances(const S* x, int64_t row, int64_t n, int dims, const S* c, S* out) {
  using V = Vec<S>;
  constexpr int64_t L = kLanes<S>;
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
  for (; i + L <= n; i += L) {
    V a{};
    for (int d = 0; d < dims; ++d) {
      const V v = load<V>(x + d * row + i) - c[d];
      a += v * v;
    }
    store(out + i, a);
  }
  for (; i < n; ++i) {
    S a = 0;
    for (int d = 0; d < dims; ++d) {
      const S v = x[d * row + i] - c[d];
      a += v * v;
    }
    out[i] = a;
  }
}

template <class S>
INSTEMBED_INLINE void exact_distances_of(const Block<S>& block, int dims, const double* c,
                                         double* out) {
  using V = Vec<double>;
  using Narrow = vector_t<S, kLanes<double>>;
  int i = 0;
  for (; i + kLanes<double> <= block.size; i += kLanes<double>) {
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

template <class S>
INSTEMBED_INLINE int members(const Block<S>& block, const int32_t* owners, const Ball<S>& ball,
                             mask_t<S>* mask) {
  S squared[kMaxBlock];
  const int n = block.size;
  const int dims = ball.dims();
  distances(block.x, block.stride, n, dims, ball.rounded.data(), squared);
  mask_t<S> possible = 0;
  for (int i = 0; i < n; ++i) possible -= squared[i] <= ball.outer2 ? -1 : 0;
  if (possible == 0) return 0;
  int inside = 0;
  for (int i = 0; i < n; ++i) {
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
  if (owners != nullptr && inside != 0) {
    inside = 0;
    for (int i = 0; i < n; ++i) {
      mask[i] = owners[i] == 0 ? mask[i] : 0;
      inside -= static_cast<int>(mask[i]);
    }
  }
  return inside;
}

// The sum of the masked points, lanes combined in a fixed order.
template <class S>
INSTEMBED_INLINE void add_masked(const Block<S>& block, int dims, const mask_t<S>* mask,
                                 double* sum) {
  constexpr int L = kLanes<double>;
  using Narrow = vector_t<S, L>;
  using Mask = vector_t<mask_t<S>, L>;
  const int whole = block.size / L * L;
  for (int d = 0; d < dims; ++d) {
    const S* x = block.x + d * block.stride;
    Vec<double> a{};
    for (int i = 0; i < whole; i += L) {
      const Narrow v = keep(load<Narrow>(x + i), load<Mask>(mask + i));
      a += __builtin_convertvector(v, Vec<double>);
    }
    double rest = sum_lanes(a);
    for (int i = whole; i < block.size; ++i) rest += mask[i] ? static_cast<double>(x[i]) : 0.0;
    sum[d] += rest;
  }
}

template <class S>
INSTEMBED_INLINE void add_block(const BlockSet<S>& set, int64_t b, const Ball<S>& ball,
                                const Scan& scan, Moments* to) {
  const Block<S>& block = set.blocks[b];
  mask_t<S> mask[kMaxBlock];
  const int32_t* owners = scan.ownership ? scan.ownership->of_points(b) : nullptr;
  const int inside = members(block, owners, ball, mask);
  if (inside == 0) return;
  to->count += inside;
  if (8 * inside < block.size) {
    for (int i = 0; i < block.size; ++i) {
      if (!mask[i]) continue;
      for (int d = 0; d < set.dims; ++d) {
        to->sum[d] += static_cast<double>(block.x[d * block.stride + i]);
      }
    }
  } else {
    add_masked(block, set.dims, mask, to->sum.data());
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
    for (int i = 0; i < block.size; i += kLanes<S>) __builtin_prefetch(x + i);
  }
}

constexpr int64_t kStrip = 256;

template <class S>
INSTEMBED_INLINE void add_range(const BlockSet<S>& set, const Balls<S>& balls, const int32_t* ids,
                                int64_t begin, int64_t end, const Ball<S>& ball, const Scan& scan,
                                Moments* to) {
  S squared[kStrip];
  int32_t straddling[kStrip];
  const int dims = set.dims;
  for (int64_t from = begin; from < end; from += kStrip) {
    const int64_t n = std::min(kStrip, end - from);
    int count = 0;
    distances(balls.centers.get() + from, balls.row, n, dims, ball.rounded.data(), squared);
    for (int64_t i = 0; i < n; ++i) {
      const S radius = balls.radius[from + i];
      const S far = (ball.outer + radius) * ball.grow;
      if (squared[i] > far * far) continue;
      const int64_t b = ids ? ids[from + i] : from + i;
      const int64_t alive = scan.ownership ? scan.ownership->alive[b] : set.blocks[b].size;
      if (alive == 0) continue;
      const S near = ball.inner - radius;
      if (near >= 0 && squared[i] <= near * near) {
        const double* sum = set.sums.get() + b * dims;
        for (int d = 0; d < dims; ++d) to->sum[d] += sum[d];
        to->count += alive;
        if (scan.keys) to->key += scan.block_keys[b];
      } else {
        straddling[count++] = static_cast<int32_t>(b);
      }
    }
    // Points in an image lie in as many places as they have channels: fetch them while the last
    // block is tested.
    for (int k = 0; k < count; ++k) {
      if (k == 0) prefetch(set.blocks[straddling[0]], dims);
      if (k + 1 < count) prefetch(set.blocks[straddling[k + 1]], dims);
      add_block(set, straddling[k], ball, scan, to);
    }
  }
}

template <class S>
INSTEMBED_INLINE void near_range(const Balls<S>& balls, int64_t begin, int64_t end,
                                 const Ball<S>& ball, double slack, std::vector<int32_t>* found) {
  S squared[kStrip];
  const S reach = static_cast<S>((static_cast<double>(ball.outer) + slack) * ball.grow);
  for (int64_t from = begin; from < end; from += kStrip) {
    const int64_t n = std::min(kStrip, end - from);
    distances(balls.centers.get() + from, balls.row, n, ball.dims(), ball.rounded.data(), squared);
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

}  // namespace

INSTEMBED_SIMD void squared_distances(const float* x, int64_t row, int64_t n, int dims,
                                      const float* c, float* out) {
  distances(x, row, n, dims, c, out);
}
INSTEMBED_SIMD void squared_distances(const double* x, int64_t row, int64_t n, int dims,
                                      const double* c, double* out) {
  distances(x, row, n, dims, c, out);
}
INSTEMBED_SIMD void exact_distances(const Block<float>& block, int dims, const double* c,
                                    double* out) {
  exact_distances_of(block, dims, c, out);
}
INSTEMBED_SIMD void exact_distances(const Block<double>& block, int dims, const double* c,
                                    double* out) {
  exact_distances_of(block, dims, c, out);
}
INSTEMBED_SIMD int block_members(const Block<float>& block, const int32_t* owners,
                                 const Ball<float>& ball, int32_t* mask) {
  return members(block, owners, ball, mask);
}
INSTEMBED_SIMD int block_members(const Block<double>& block, const int32_t* owners,
                                 const Ball<double>& ball, int64_t* mask) {
  return members(block, owners, ball, mask);
}
INSTEMBED_SIMD void add_points(const Block<float>& block, int dims, const int32_t* mask,
                               double* sum) {
  add_masked(block, dims, mask, sum);
}
INSTEMBED_SIMD void add_points(const Block<double>& block, int dims, const int64_t* mask,
                               double* sum) {
  add_masked(block, dims, mask, sum);
}
INSTEMBED_SIMD void add_members(const BlockSet<float>& set, const Balls<float>& balls,
                                const int32_t* ids, int64_t begin, int64_t end,
                                const Ball<float>& ball, const Scan& scan, Moments* to) {
  add_range(set, balls, ids, begin, end, ball, scan, to);
}
INSTEMBED_SIMD void add_members(const BlockSet<double>& set, const Balls<double>& balls,
                                const int32_t* ids, int64_t begin, int64_t end,
                                const Ball<double>& ball, const Scan& scan, Moments* to) {
  add_range(set, balls, ids, begin, end, ball, scan, to);
}
INSTEMBED_SIMD void find_near(const Balls<float>& balls, int64_t begin, int64_t end,
                              const Ball<float>& ball, double slack, std::vector<int32_t>* found) {
  near_range(balls, begin, end, ball, slack, found);
}
INSTEMBED_SIMD void find_near(const Balls<double>& balls, int64_t begin, int64_t end,
                              const Ball<double>& ball, double slack, std::vector<int32_t>* found) {
  near_range(balls, begin, end, ball, slack, found);
}

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

template void make_front(const Balls<float>&, const int32_t*, int, const std::vector<int32_t>&,
                         Front<float>*);
template void make_front(const Balls<double>&, const int32_t*, int, const std::vector<int32_t>&,
                         Front<double>*);

}  // namespace instembed::mean_shift
