// Kernels of the discriminative loss for tiles whose labels change from pixel to pixel: vectors run
// over the channels of a pixel, then over the distances of all pixels of the tile. For cpu.cpp
// alone.
#pragma once

#include "common/simd_widths.h"
#include "common/tiles.h"
#include "discriminative/formula.h"
#include "discriminative/tables.h"

namespace instembed::discriminative {
namespace {

template <class A>
using Short = vector_t<A, kShortLanes>;

// row[d] += term(values[d]), over whole short vectors.
template <int kBytes, class A, class Term>
INSTEMBED_INLINE void add_row(double* row, const A* values, int64_t padded, Term&& term) {
  constexpr int W = kBytes / 8;  // doubles a register
  using Narrow = vector_t<A, W>;
  using Wide = vector_t<double, W>;
  for (int64_t d = 0; d < padded; d += W) {
    const Narrow value = term(load<Narrow>(values + d));
    store(row + d, Wide(load<Wide>(row + d) + __builtin_convertvector(value, Wide)));
  }
}

template <int kBytes, class A>
INSTEMBED_INLINE void sum_pixels_body(const A* tile, const int32_t* slots, int pixels,
                                      const Tables<A>& tables, double* sums) {
  for (int i = 0; i < pixels; ++i) {
    add_row<kBytes>(sums + slots[i] * tables.padded, tile + i * tables.padded, tables.padded,
                    [](const auto& v) __attribute__((always_inline)) { return v; });
  }
}

// The pixels become differences to their means; `hinges` and `slopes` have room for whole vectors.
template <int kBytes, int norm, class A>
INSTEMBED_INLINE void find_hinges(A* tile, const int32_t* slots, int pixels, A delta,
                                  const Tables<A>& tables, A* hinges, A* slopes) {
  for (int i = 0; i < pixels; ++i) {
    A* pixel = tile + i * tables.padded;
    const A* mean = tables.means + slots[i] * tables.padded;
    Short<A> sum{};
    for (int64_t d = 0; d < tables.padded; d += kShortLanes) {
      const Short<A> v = load<Short<A>>(pixel + d) - load<Short<A>>(mean + d);
      store(pixel + d, v);
      sum = add_to_norm<norm>(sum, v);
    }
    hinges[i] = sum_lanes(sum);
  }
  constexpr int W = kBytes / static_cast<int>(sizeof(A));
  using V = vector_t<A, W>;
  for (int i = 0; i < pixels; i += W) {
    const V distance = finish_norm<norm>(load<V>(hinges + i));
    const V hinge = positive_part<V>(distance - delta);
    store(hinges + i, hinge);
    store(slopes + i, slope<norm>(hinge, distance));
  }
}

template <int kBytes, int norm, class A>
INSTEMBED_INLINE void spread_pixels_body(A* tile, const int32_t* slots, int pixels, A delta,
                                         const Tables<A>& tables, const Spread<A>& spread,
                                         A* hinges, A* slopes) {
  find_hinges<kBytes, norm>(tile, slots, pixels, delta, tables, hinges, slopes);
  for (int i = 0; i < pixels; ++i) {
    const double hinge = hinges[i];
    spread.squares[slots[i]] += hinge * hinge;
  }
  if (!spread.pulls) return;
  for (int i = 0; i < pixels; ++i) {
    const A factor = slopes[i];
    add_row<kBytes>(
        spread.pulls + slots[i] * tables.padded, tile + i * tables.padded, tables.padded,
        [&](const auto& v) __attribute__((always_inline)) { return factor * direction<norm>(v); });
  }
}

template <int kBytes, int norm, class A>
INSTEMBED_INLINE void gradient_pixels_body(A* tile, const int32_t* slots, int pixels, A delta,
                                           const Tables<A>& tables,
                                           const GradientTables<A>& gradient, A* hinges,
                                           A* slopes) {
  find_hinges<kBytes, norm>(tile, slots, pixels, delta, tables, hinges, slopes);
  for (int i = 0; i < pixels; ++i) {
    const A factor = gradient.scale[slots[i]] * slopes[i];
    A* pixel = tile + i * tables.padded;
    const A* through_mean = gradient.through_mean + slots[i] * tables.padded;
    for (int64_t d = 0; d < tables.padded; d += kShortLanes) {
      store(pixel + d, Short<A>(factor * direction<norm>(load<Short<A>>(pixel + d)) +
                                load<Short<A>>(through_mean + d)));
    }
  }
}

#define INSTEMBED_PIXEL_KERNELS(A)                                                                 \
  INSTEMBED_SIMD_WIDTHS(void sum_pixels(const A* tile, const int32_t* slots, int pixels,           \
                                        const Tables<A>& tables, double* sums),                    \
                        sum_pixels_body<kBytes>(tile, slots, pixels, tables, sums))                \
  INSTEMBED_SIMD_WIDTHS(                                                                           \
      void spread_pixels(int norm, A* tile, const int32_t* slots, int pixels, A delta,             \
                         const Tables<A>& tables, const Spread<A>& spread, A* hinges, A* slopes),  \
      if (norm == 1) {                                                                             \
        spread_pixels_body<kBytes, 1>(tile, slots, pixels, delta, tables, spread, hinges, slopes); \
      } else {                                                                                     \
        spread_pixels_body<kBytes, 2>(tile, slots, pixels, delta, tables, spread, hinges, slopes); \
      })                                                                                           \
  INSTEMBED_SIMD_WIDTHS(                                                                           \
      void gradient_pixels(int norm, A* tile, const int32_t* slots, int pixels, A delta,           \
                           const Tables<A>& tables, const GradientTables<A>& gradient, A* hinges,  \
                           A* slopes),                                                             \
      if (norm == 1) {                                                                             \
        gradient_pixels_body<kBytes, 1>(tile, slots, pixels, delta, tables, gradient, hinges,      \
                                        slopes);                                                   \
      } else {                                                                                     \
        gradient_pixels_body<kBytes, 2>(tile, slots, pixels, delta, tables, gradient, hinges,      \
                                        slopes);                                                   \
      })

INSTEMBED_PIXEL_KERNELS(float)
INSTEMBED_PIXEL_KERNELS(double)
#undef INSTEMBED_PIXEL_KERNELS

}  // namespace
}  // namespace instembed::discriminative
