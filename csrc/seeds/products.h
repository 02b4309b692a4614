// Products of a few seeds and pixels, in registers. A function of its own, which the compiler does
// not inline: among everything else that a scan holds, the sums would not stay in registers.
#pragma once

#include "common/simd_widths.h"

namespace instembed::seeds {

constexpr int kGroup = 6;     // seeds, and
constexpr int kWide = 2;      // vectors of pixels, whose sums registers hold
constexpr int kSegment = 64;  // pixels in a row of channels

// Adds to each of kGroup x kWide sums, one seed after the other, what so many channels give:
// pixels at `x`, channel after channel, times a seed's values. Sums start from `start`, one a seed,
// plus what is in `sums` unless they are `fresh`. Returns whether any is not above the limit of its
// pixel; only then `sums` are written.
template <int kBytes, class A>
INSTEMBED_INLINE bool add_products_of(const A* const* seeds, const A* start, const A* x,
                                      int channels, const A* limits, bool fresh, A* sums) {
  constexpr int L = kBytes / static_cast<int>(sizeof(A));
  using V = vector_t<A, L>;
  using Mask = vector_t<MaskLane<A>, L>;
  V sum[kGroup][kWide];
#pragma GCC unroll 6
  for (int r = 0; r < kGroup; ++r) {
#pragma GCC unroll 2
    for (int w = 0; w < kWide; ++w) sum[r][w] = start[r] - V{};
  }
  if (!fresh) {
#pragma GCC unroll 6
    for (int r = 0; r < kGroup; ++r) {
#pragma GCC unroll 2
      for (int w = 0; w < kWide; ++w) sum[r][w] += load<V>(sums + (r * kWide + w) * L);
    }
  }
  const A *s0 = seeds[0], *s1 = seeds[1], *s2 = seeds[2];
  const A *s3 = seeds[3], *s4 = seeds[4], *s5 = seeds[5];
  for (int d = 0; d < channels; ++d, x += kSegment) {
    const V x0 = load<V>(x), x1 = load<V>(x + L);
    const A values[kGroup] = {s0[d], s1[d], s2[d], s3[d], s4[d], s5[d]};
#pragma GCC unroll 6
    for (int r = 0; r < kGroup; ++r) {
      sum[r][0] += values[r] * x0;
      sum[r][1] += values[r] * x1;
    }
  }
  Mask outside = Mask{} - 1;
#pragma GCC unroll 2
  for (int w = 0; w < kWide; ++w) {
    const V limit = load<V>(limits + w * L);
#pragma GCC unroll 6
    for (int r = 0; r < kGroup; ++r) outside &= sum[r][w] > limit;
  }
  if (!any_lane(~outside)) return false;
#pragma GCC unroll 6
  for (int r = 0; r < kGroup; ++r) {
#pragma GCC unroll 2
    for (int w = 0; w < kWide; ++w) store(sums + (r * kWide + w) * L, sum[r][w]);
  }
  return true;
}

#define INSTEMBED_ADD_PRODUCTS(A)                                                               \
  INSTEMBED_SIMD_WIDTHS(                                                                        \
      static __attribute__((noinline)) bool add_products(const A* const* seeds, const A* start, \
                                                         const A* x, int channels,              \
                                                         const A* limits, bool fresh, A* sums), \
      return add_products_of<kBytes>(seeds, start, x, channels, limits, fresh, sums))
INSTEMBED_ADD_PRODUCTS(float)
INSTEMBED_ADD_PRODUCTS(double)
#undef INSTEMBED_ADD_PRODUCTS

}  // namespace instembed::seeds
