// Terms of pairs of pixels at squared distances d, and their slopes by d, in vectors.
//
// With sigma = 2 / (1 + exp(d)), a pair of one instance costs -log sigma, a pair of two instances
// -log(1 - sigma) = -log tanh(d / 2). Both are twice the area tangent of a number in [0, 1/3]:
//   -log sigma         = d - 2 artanh(t / (4 - t))                        with t = 1 - exp(-d)
//   -log tanh(d / 2)   = 2 artanh(e)                                      with e = exp(-d) <= 1/3
//                      = k log 2 + 2 artanh((1 + e - m) / (1 + e + m))    with m = 2^k t in [4/3,
//                      8/3)
// so that nothing cancels, for near pairs or far ones.
#pragma once

#include <cstdint>

#include "common/exp.h"
#include "common/simd.h"
#include "pairwise_similarity/scalar.h"

namespace instembed::pairwise_similarity {

// The integers as wide as V's lanes, and all bits set in the lanes where x is negative, -0 among
// them.
template <class V>
using Mask = vector_t<MaskLane<Lane<V>>, sizeof(V) / sizeof(Lane<V>)>;

template <class V>
INSTEMBED_INLINE Mask<V> negative_lanes(const V& x) {
  return reinterpret_cast<Mask<V>>(x) >> (8 * sizeof(Lane<V>) - 1);
}

template <class V>
INSTEMBED_INLINE V blend(const Mask<V>& mask, const V& yes, const V& no) {
  return reinterpret_cast<V>((reinterpret_cast<Mask<V>>(yes) & mask) |
                             (reinterpret_cast<Mask<V>>(no) & ~mask));
}

// 2 artanh(s) / s as a series of s^2, to rounding for |s| <= 1/3.
template <class A>
constexpr int kArtanhTerms = sizeof(A) == 4 ? 8 : 16;

template <class V>
INSTEMBED_INLINE V twice_artanh(const V& s) {
  using A = Lane<V>;
  constexpr int n = kArtanhTerms<A>;
  const V square = s * s;
  V sum = splat_as<V>(static_cast<A>(2.0 / (2 * n - 1)));
#pragma GCC unroll 16
  for (int k = n - 2; k >= 0; --k) sum = sum * square + static_cast<A>(2.0 / (2 * k + 1));
  return sum * s;
}

template <class V>
struct Decay {
  V e, t;  // exp(-d) and 1 - exp(-d), each to a few units in its last place
};

template <class V>
INSTEMBED_INLINE Decay<V> decay(const V& d) {
  using A = Lane<V>;
  Decay<V> result;
  result.t = V{};
  result.e = exp2_lanes<A>(d * static_cast<A>(-1.44269504088896340736), &result.t);
  return result;
}

template <class V>
INSTEMBED_INLINE Term<V> same_instance(const V& d) {
  const Decay<V> x = decay(d);
  return {d - twice_artanh<V>(x.t / (4 - x.t)), 1 / (1 + x.e)};
}

template <class V>
INSTEMBED_INLINE Term<V> two_instances(const V& distance) {
  using A = Lane<V>;
  using Words = Bits<V>;
  constexpr int kFraction = sizeof(A) == 4 ? 23 : 52, kBias = sizeof(A) == 4 ? 127 : 1023;
  constexpr auto kWhole = static_cast<A>(uint64_t{1} << kFraction);
  const V nearest = splat_as<V>(static_cast<A>(kNearest));
  const Mask<V> clamped = negative_lanes<V>(distance - nearest);
  const V d = blend<V>(clamped, nearest, distance);
  const Decay<V> x = decay(d);
  const V sum = 1 + x.e;
  // m = 2^k t: the exponent of 3 t / 4 is -k. As a number, by the bits of 2^kFraction + its field.
  const Words field = reinterpret_cast<Words>(x.t * static_cast<A>(0.75)) >> kFraction;
  const Words whole = reinterpret_cast<Words>(splat_as<V>(kWhole));
  const V k = (kBias + kWhole) - reinterpret_cast<V>(field | whole);
  const V m = reinterpret_cast<V>(reinterpret_cast<Words>(x.t) + ((kBias - field) << kFraction));
  const Mask<V> far = negative_lanes<V>(x.e - static_cast<A>(1.0 / 3));
  const V above = blend<V>(far, 2 * x.e, sum - m);
  const V below = blend<V>(far, splat_as<V>(A(2)), sum + m);
  const V product = x.t * sum, inverse = 1 / (product * below);  // one division for two
  Term<V> term;
  term.value = keep(k * static_cast<A>(0.693147180559945309417), ~far) +
               twice_artanh<V>(above * product * inverse);
  term.slope = keep(-2 * x.e * below * inverse, ~clamped);
  return term;
}

}  // namespace instembed::pairwise_similarity
