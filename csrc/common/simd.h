// Vectors of a fixed number of lanes, by the compilers' vector extensions.
//
// A function marked INSTEMBED_SIMD is compiled for baseline x86-64, AVX2 and AVX-512, and the
// loader picks one: the same lanes are two, four or one register wide, and sums keep their order.
// Templates and helpers that it calls are INSTEMBED_INLINE, so that they are compiled for the same
// target.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__)
// A sanitised build takes the baseline: an ifunc resolver runs before the sanitizer is ready.
#define INSTEMBED_SIMD \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4"), flatten))
#else
#define INSTEMBED_SIMD
#endif
#define INSTEMBED_INLINE inline __attribute__((always_inline))

namespace instembed {

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <class T, int N>
using vector_t = typename VectorOf<T, N>::type;

// One cache line of T.
template <class T>
constexpr int kLanes = 64 / static_cast<int>(sizeof(T));
template <class T>
using Vec = vector_t<T, kLanes<T>>;

// A Vec in memory. The baseline target believes that 16 bytes align it; a wider clone does not.
template <class T>
struct alignas(64) VecSlot {
  Vec<T> value;
};

template <class V, class T>
INSTEMBED_INLINE V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V, class T>
INSTEMBED_INLINE void store(T* to, const V& v) {
  std::memcpy(to, &v, sizeof(V));
}

// The integer that is as wide as a lane.
template <class T>
using MaskLane =
    std::conditional_t<sizeof(T) == 8, int64_t,
                       std::conditional_t<sizeof(T) == 4, int32_t,
                                          std::conditional_t<sizeof(T) == 2, int16_t, int8_t>>>;

// By bits: GCC fills the lanes of a wide vector of floats one after the other.
template <class T>
INSTEMBED_INLINE Vec<T> splat(T value) {
  MaskLane<T> bits;
  std::memcpy(&bits, &value, sizeof(T));
  return reinterpret_cast<Vec<T>>(bits - Vec<MaskLane<T>>{});
}

// Ones, then zeros: a load from the right place gives the mask of any number of first lanes.
template <class T>
struct MaskTable {
  MaskLane<T> values[2 * kLanes<T>];
  constexpr MaskTable() : values() {
    for (int k = 0; k < kLanes<T>; ++k) values[k] = -1;
  }
};
template <class T>
inline constexpr MaskTable<T> mask_table{};

// All bits set in the lanes below `count`, for any count.
template <class T, class M = Vec<MaskLane<T>>>
INSTEMBED_INLINE M first_lanes(int64_t count) {
  const int64_t lanes = count < 0 ? 0 : (count > kLanes<T> ? kLanes<T> : count);
  return load<M>(mask_table<T>.values + kLanes<T> - lanes);
}

// A Vec in P pieces. GCC keeps vectors wider than the target's registers in memory: a hot loop
// takes pieces that fit.
template <class A, int P>
using Piece = vector_t<A, kLanes<A> / P>;

template <class V, class T>
INSTEMBED_INLINE V splat_as(T value) {
  using Mask = vector_t<MaskLane<T>, sizeof(V) / sizeof(T)>;
  MaskLane<T> bits;
  std::memcpy(&bits, &value, sizeof(T));
  return reinterpret_cast<V>(bits - Mask{});
}

template <class V, class Mask>
INSTEMBED_INLINE V keep(const V& v, const Mask& mask) {
  return reinterpret_cast<V>(reinterpret_cast<Mask>(v) & mask);
}

template <class V>
INSTEMBED_INLINE V sqrt_lanes(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  for (int k = 0; k < lanes; ++k) v[k] = std::sqrt(v[k]);
  return v;
}

template <class V, size_t... I>
INSTEMBED_INLINE auto halves_sum(const V& v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, I...) + __builtin_shufflevector(v, v, (I + sizeof...(I))...);
}

// The first half of the lanes, or the second.
template <class V, size_t... I>
INSTEMBED_INLINE auto half_of(const V& v, int half, std::index_sequence<I...>) {
  return half == 0 ? __builtin_shufflevector(v, v, I...)
                   : __builtin_shufflevector(v, v, (I + sizeof...(I))...);
}

// In a fixed order: halves are added until one lane is left.
template <class V>
INSTEMBED_INLINE auto sum_lanes(const V& v) {
  constexpr size_t lanes = sizeof(V) / sizeof(v[0]);
  if constexpr (lanes == 2) {
    return v[0] + v[1];
  } else {
    return sum_lanes(halves_sum(v, std::make_index_sequence<lanes / 2>()));
  }
}

// One step of adding up the lanes of several vectors side by side: groups of `parts` lanes, a group
// for each sum, become groups of half as many. Lane `lane` of the result takes what it adds from
// there.
template <int lanes, int parts>
constexpr int group_lane(int lane, int half) {
  const int group = lane / (parts / 2), groups = lanes / parts;
  const int from = group < groups ? group * parts : lanes + (group - groups) * parts;
  return from + half * (parts / 2) + lane % (parts / 2);
}

template <int lanes, int parts, class V, size_t... I>
INSTEMBED_INLINE auto add_group_halves(const V& a, const V& b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, group_lane<lanes, parts>(I, 0)...) +
         __builtin_shufflevector(a, b, group_lane<lanes, parts>(I, 1)...);
}

// row[k] += the sum of the lanes of vectors[k], for n vectors: much less work than one at a time.
template <class A, int n, int parts = kLanes<A>, class V>
INSTEMBED_INLINE void add_lane_sums(const V* vectors, double* row) {
  constexpr int lanes = sizeof(V) / sizeof(A);
  if constexpr (parts == 1) {
    using Wide = vector_t<double, lanes>;
    constexpr int count = n / lanes;
    for (int k = 0; k < count; ++k) {
      store(row + k * lanes,
            load<Wide>(row + k * lanes) + __builtin_convertvector(vectors[k], Wide));
    }
  } else if constexpr (n * parts > lanes) {
    constexpr int count = n * parts / lanes / 2;
    V sums[count];
    for (int k = 0; k < count; ++k) {
      sums[k] = add_group_halves<lanes, parts>(vectors[2 * k], vectors[2 * k + 1],
                                               std::make_index_sequence<lanes>());
    }
    add_lane_sums<A, n, parts / 2>(sums, row);
  } else {
    const vector_t<A, lanes / 2> sum = add_group_halves<lanes, parts>(
        vectors[0], vectors[0], std::make_index_sequence<lanes / 2>());
    add_lane_sums<A, n, parts / 2>(&sum, row);
  }
}

template <class V>
using Lane = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V&>()[0])>>;

// A vector's lanes as unsigned integers. What is decided lane by lane is best decided by bits: GCC
// takes a comparison of vectors that are wider than the target's registers apart, a shift not.
template <class V>
using Bits = vector_t<std::make_unsigned_t<MaskLane<Lane<V>>>, sizeof(V) / sizeof(Lane<V>)>;

// All bits of each lane that has its highest bit set.
template <class U>
INSTEMBED_INLINE U spread_highest(const U& bits) {
  return U{} - (bits >> (8 * sizeof(bits[0]) - 1));
}

// True if any bit of any lane is set: of a comparison's result, say.
template <class Mask>
INSTEMBED_INLINE bool any_lane(const Mask& mask) {
  const auto words = reinterpret_cast<vector_t<int64_t, sizeof(Mask) / 8>>(mask);
  int64_t any = 0;
  for (size_t k = 0; k < sizeof(Mask) / 8; ++k) any |= words[k];
  return any != 0;
}

}  // namespace instembed
