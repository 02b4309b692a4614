// Kernels of the discriminative loss for tiles of runs: vectors run over the pixels of an instance,
// and are as wide as the target's registers. For cpu.cpp alone.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/label_runs.h"
#include "common/simd_widths.h"
#include "common/tiles.h"
#include "discriminative/formula.h"
#include "discriminative/tables.h"

namespace instembed::discriminative {
namespace {

// Runs body with the number of channels as a constant where it is a usual one.
template <class Body>
INSTEMBED_INLINE void with_channels(int64_t channels, Body&& body) {
  switch (channels) {
    case 2:
      return body(std::integral_constant<int, 2>());
    case 4:
      return body(std::integral_constant<int, 4>());
    case 8:
      return body(std::integral_constant<int, 8>());
    case 16:
      return body(std::integral_constant<int, 16>());
    default:
      return body(std::integral_constant<int, 0>());
  }
}

// Vectors a channel: in registers where the number of channels is a constant, else in `spare`.
template <class V, int fixed>
struct ChannelVectors {
  V own[fixed];
  INSTEMBED_INLINE explicit ChannelVectors(VecSlot<Lane<V>>*) {}
  INSTEMBED_INLINE V& operator[](int64_t d) { return own[d]; }
};
template <class V>
struct ChannelVectors<V, 0> {
  VecSlot<Lane<V>>* spare;
  INSTEMBED_INLINE explicit ChannelVectors(VecSlot<Lane<V>>* spare) : spare(spare) {}
  INSTEMBED_INLINE V& operator[](int64_t d) { return reinterpret_cast<V&>(spare[d]); }
};

// row[d] += the sum of the lanes of vectors[d].
template <int fixed, class V>
INSTEMBED_INLINE void add_sums(ChannelVectors<V, fixed>& vectors, int64_t channels, double* row) {
  if constexpr (fixed > 0) {
    add_lane_sums<Lane<V>, fixed, kLanesOf<V>>(&vectors[0], row);
  } else {
    for (int64_t d = 0; d < channels; ++d) row[d] += sum_lanes(vectors[d]);
  }
}

template <class V, int fixed, class A>
INSTEMBED_INLINE void sum_runs_body(const PlanarTile<A>& tile, const TileCode& code,
                                    int64_t channels, int64_t padded, double* sums,
                                    VecSlot<A>* spare) {
  constexpr int W = kLanesOf<V>;
  const int64_t count = fixed ? fixed : channels;
  code.for_each_run([&](int start, int length, int32_t slot) __attribute__((always_inline)) {
    if (slot < 0) return tile.prefetch(start, length, count);
    ChannelVectors<V, fixed> total(spare);
    for (int64_t d = 0; d < count; ++d) total[d] = V{};
    int i = start;
    for (; i + W <= start + length; i += W) {
      tile.prefetch(i, count);
      for (int64_t d = 0; d < count; ++d) total[d] += load<V>(tile.row(d) + i);
    }
    if (i < start + length) {
      tile.prefetch(i, count);
      const auto rest = first_of<V>(start + length - i);
      for (int64_t d = 0; d < count; ++d) total[d] += keep(load<V>(tile.row(d) + i), rest);
    }
    add_sums<fixed>(total, count, sums + slot * padded);
  });
}

template <class V, int norm, int fixed, class A>
INSTEMBED_INLINE void spread_runs_body(const PlanarTile<A>& tile, const TileCode& code, A delta,
                                       const Tables<A>& tables, const Spread<A>& spread,
                                       VecSlot<A>* spare) {
  constexpr int W = kLanesOf<V>;
  const int64_t count = fixed ? fixed : tables.channels;
  code.for_each_run([&](int start, int length, int32_t slot) __attribute__((always_inline)) {
    if (slot < 0) return tile.prefetch(start, length, count);
    const A* mean = tables.means + slot * tables.padded;
    ChannelVectors<V, fixed> difference(spare), pull(spare + count);
    for (int64_t d = 0; d < count; ++d) pull[d] = V{};
    V squares{};
    bool any = false;
    const auto block = [&](int i, const auto& mask, auto whole) __attribute__((always_inline)) {
      tile.prefetch(i, count);
      V sum{};
      for (int64_t d = 0; d < count; ++d) {
        difference[d] = load<V>(tile.row(d) + i) - mean[d];
        if constexpr (!whole) difference[d] = keep(difference[d], mask);
        sum = add_to_norm<norm>(sum, difference[d]);
      }
      const V distance = finish_norm<norm>(sum);
      V hinge = positive_part<V>(distance - delta);
      if constexpr (!whole) hinge = keep(hinge, mask);
      if (!any_lane(hinge != V{})) return;
      squares += hinge * hinge;
      if (!spread.pulls) return;
      any = true;
      const V factor = slope<norm>(hinge, distance);
      for (int64_t d = 0; d < count; ++d) pull[d] += factor * direction<norm>(difference[d]);
    };
    int i = start;
    for (; i + W <= start + length; i += W) block(i, 0, std::true_type());
    if (i < start + length) block(i, first_of<V>(start + length - i), std::false_type());
    spread.squares[slot] += sum_lanes(squares);
    if (!any) return;
    add_sums<fixed>(pull, count, spread.pulls + slot * tables.padded);
  });
}

// Rows of `out` have room for a vector past the tile: what a run's last vector writes beyond its
// end is overwritten by the next run.
template <class V, int norm, int fixed, class A>
INSTEMBED_INLINE void gradient_runs_body(const PlanarTile<A>& tile, const TileCode& code, A delta,
                                         const Tables<A>& tables, const GradientTables<A>& gradient,
                                         A* out, int64_t out_stride, VecSlot<A>* spare) {
  constexpr int W = kLanesOf<V>;
  const int64_t count = fixed ? fixed : tables.channels;
  code.for_each_run([&](int start, int length, int32_t slot) __attribute__((always_inline)) {
    const int end = start + length;
    if (slot < 0) {
      tile.prefetch(start, length, count);
      for (int64_t d = 0; d < count; ++d) {
        for (int i = start; i < end; i += W) store(out + d * out_stride + i, V{});
      }
      return;
    }
    const A* mean = tables.means + slot * tables.padded;
    const A* through_mean = gradient.through_mean + slot * tables.padded;
    const A scale = gradient.scale[slot];
    ChannelVectors<V, fixed> result(spare);
    for (int i = start; i < end; i += W) {
      tile.prefetch(i, count);
      V sum{};
#pragma GCC unroll 16
      for (int64_t d = 0; d < count; ++d) {
        result[d] = load<V>(tile.row(d) + i) - mean[d];
        sum = add_to_norm<norm>(sum, result[d]);
      }
      const V distance = finish_norm<norm>(sum);
      const V factor = scale * slope<norm>(positive_part<V>(distance - delta), distance);
#pragma GCC unroll 16
      for (int64_t d = 0; d < count; ++d) {
        store(out + d * out_stride + i, factor * direction<norm>(result[d]) + through_mean[d]);
      }
    }
  });
}

// Pairs of means: rows [from, to) against all means, which are given planar too, `stride` apart. An
// ordered pair adds hinge^2 to *total, and half its derivative by the row's mean to the row of
// `grads`.
template <class V, int norm, int fixed, class A>
INSTEMBED_INLINE void repel_body(const A* rows, int64_t from, int64_t to, const A* planar,
                                 int64_t stride, const Tables<A>& tables, A margin, double* total,
                                 double* grads, VecSlot<A>* spare) {
  constexpr int W = kLanesOf<V>;
  constexpr int64_t kStretch = 64 * W;  // means whose shares are added up in type A
  const int64_t count = tables.instances, channels = fixed ? fixed : tables.channels;
  ChannelVectors<V, fixed> difference(spare), push(spare + channels);
  for (int64_t a = from; a < to; ++a) {
    const A* row = rows + a * tables.padded;
    for (int64_t begin = 0; begin < count; begin += kStretch) {
      const int64_t end = begin + kStretch < count ? begin + kStretch : count;
      for (int64_t d = 0; d < channels; ++d) push[d] = V{};
      V squares{};
      for (int64_t b = begin; b < end; b += W) {
        V sum{};
        for (int64_t d = 0; d < channels; ++d) {
          difference[d] = load<V>(planar + d * stride + b) - row[d];
          sum = add_to_norm<norm>(sum, difference[d]);
        }
        const V distance = finish_norm<norm>(sum);
        V hinge = keep(positive_part<V>(margin - distance), first_of<V>(end - b));
        if (a >= b && a < b + W) hinge[a - b] = 0;
        if (!any_lane(hinge != V{})) continue;
        squares += hinge * hinge;
        if (!grads) continue;
        const V factor = slope<norm>(hinge, distance);
        for (int64_t d = 0; d < channels; ++d) push[d] += factor * direction<norm>(difference[d]);
      }
      *total += sum_lanes(squares);
      if (grads) add_sums<fixed>(push, channels, grads + (a - from) * tables.padded);
    }
  }
}

template <class V, int norm, class A>
INSTEMBED_INLINE void push_body(const PlanarTile<A>& tile, int start, int length,
                                const Tables<A>& tables, const Push<A>& push, VecSlot<A>* spare) {
  constexpr int W = kLanesOf<V>;
  ChannelVectors<V, 0> difference(spare), own(spare + tables.channels);
  for (int i = start; i < start + length; i += W) {
    const int lanes = std::min<int>(W, start + length - i);
    const auto mask = first_of<V>(lanes);
    for (int64_t d = 0; d < tables.channels; ++d) own[d] = V{};
    for (int32_t c = 0; c < tables.instances; ++c) {
      const A* mean = tables.means + c * tables.padded;
      V sum{};
      for (int64_t d = 0; d < tables.channels; ++d) {
        difference[d] = keep(V(load<V>(tile.row(d) + i) - mean[d]), mask);
        sum = add_to_norm<norm>(sum, difference[d]);
      }
      const V distance = finish_norm<norm>(sum);
      const V hinge = keep(positive_part<V>(push.margin - distance), mask);
      if (!any_lane(hinge != V{})) continue;
      if (push.squares) *push.squares += sum_lanes(V(hinge * hinge));
      const V factor = slope<norm>(hinge, distance);
      for (int64_t d = 0; d < tables.channels; ++d) {
        const V v = factor * direction<norm>(difference[d]);
        if (push.mean_grads) push.mean_grads[c * tables.padded + d] += sum_lanes(v);
        own[d] -= v;
      }
    }
    if (!push.out) continue;
    for (int64_t d = 0; d < tables.channels; ++d) {
      const V v = push.scale * own[d];
      A* to = push.out + d * push.out_channel_stride + i * push.out_pixel_stride;
      for (int k = 0; k < lanes; ++k) to[k * push.out_pixel_stride] = v[k];
    }
  }
}

// The kernels as functions of their own, one a target.
#define INSTEMBED_RUN_KERNELS(A)                                                                  \
  INSTEMBED_SIMD_WIDTHS(                                                                          \
      void sum_runs(const PlanarTile<A>& tile, const TileCode& code, const Tables<A>& tables,     \
                    double* sums, VecSlot<A>* spare),                                             \
      with_channels(tables.channels, [&](auto fixed) __attribute__((always_inline)) {             \
        sum_runs_body<Register<A, kBytes>, fixed>(tile, code, tables.channels, tables.padded,     \
                                                  sums, spare);                                   \
      }))                                                                                         \
  INSTEMBED_SIMD_WIDTHS(                                                                          \
      void spread_runs(int norm, const PlanarTile<A>& tile, const TileCode& code, A delta,        \
                       const Tables<A>& tables, const Spread<A>& spread, VecSlot<A>* spare),      \
      using V = Register<A, kBytes>;                                                              \
      if (norm == 1) return spread_runs_body<V, 1, 0>(tile, code, delta, tables, spread, spare);  \
      with_channels(tables.channels, [&](auto fixed) __attribute__((always_inline)) {             \
        spread_runs_body<V, 2, fixed>(tile, code, delta, tables, spread, spare);                  \
      }))                                                                                         \
  INSTEMBED_SIMD_WIDTHS(                                                                          \
      void gradient_runs(int norm, const PlanarTile<A>& tile, const TileCode& code, A delta,      \
                         const Tables<A>& tables, const GradientTables<A>& gradient, A* out,      \
                         int64_t out_stride, VecSlot<A>* spare),                                  \
      using V = Register<A, kBytes>;                                                              \
      if (norm == 1) {                                                                            \
        return gradient_runs_body<V, 1, 0>(tile, code, delta, tables, gradient, out, out_stride,  \
                                           spare);                                                \
      } with_channels(tables.channels, [&](auto fixed) __attribute__((always_inline)) {           \
        gradient_runs_body<V, 2, fixed>(tile, code, delta, tables, gradient, out, out_stride,     \
                                        spare);                                                   \
      }))                                                                                         \
  INSTEMBED_SIMD_WIDTHS(                                                                          \
      void repel(int norm, const A* rows, int64_t from, int64_t to, const A* planar,              \
                 int64_t stride, const Tables<A>& tables, A margin, double* total, double* grads, \
                 VecSlot<A>* spare),                                                              \
      using V = Register<A, kBytes>;                                                              \
      if (norm == 1) {                                                                            \
        return repel_body<V, 1, 0>(rows, from, to, planar, stride, tables, margin, total, grads,  \
                                   spare);                                                        \
      } with_channels(tables.channels, [&](auto fixed) __attribute__((always_inline)) {           \
        repel_body<V, 2, fixed>(rows, from, to, planar, stride, tables, margin, total, grads,     \
                                spare);                                                           \
      }))                                                                                         \
  INSTEMBED_SIMD_WIDTHS(                                                                          \
      void push_background(int norm, const PlanarTile<A>& tile, int start, int length,            \
                           const Tables<A>& tables, const Push<A>& push, VecSlot<A>* spare),      \
      using V = Register<A, kBytes>;                                                              \
      if (norm == 1) { push_body<V, 1>(tile, start, length, tables, push, spare); } else {        \
        push_body<V, 2>(tile, start, length, tables, push, spare);                                \
      })

INSTEMBED_RUN_KERNELS(float)
INSTEMBED_RUN_KERNELS(double)
#undef INSTEMBED_RUN_KERNELS

}  // namespace
}  // namespace instembed::discriminative
