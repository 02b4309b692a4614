// Exponentials of vectors.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace instembed {

// 2^x = 2^n sum_k (r ln 2)^k / k! with x = n + r and |r| <= 1/2. The first term left out is 5e-9 of
// the result for float, 2e-17 for double.
template <class A>
constexpr int kExpTerms = sizeof(A) == 4 ? 8 : 14;

template <class A>
struct ExpSeries {
  A terms[kExpTerms<A>];
  constexpr ExpSeries() : terms() {
    double term = 1;
    for (int k = 0; k < kExpTerms<A>; ++k) {
      terms[k] = static_cast<A>(term);
      term *= 0.693147180559945309417 / (k + 1);
    }
  }
};
template <class A>
inline constexpr ExpSeries<A> exp_series{};

// 2^x for x <= 0 and -inf, to 3 units in the last place; 0 where the result would be subnormal.
// Anything goes elsewhere. By bits: a comparison of vectors wider than the target's registers is
// taken apart lane by lane. `rest` gets 1 - 2^x, to as many units of its own.
template <class A, class V>
INSTEMBED_INLINE V exp2_lanes(const V& x, V* rest = nullptr) {
  using Word = std::make_unsigned_t<MaskLane<A>>;
  using Words = vector_t<Word, sizeof(V) / sizeof(A)>;
  using Mask = vector_t<MaskLane<A>, sizeof(V) / sizeof(A)>;
  constexpr int kFraction = sizeof(A) == 4 ? 23 : 52, kBits = 8 * sizeof(A);
  constexpr A kRound = static_cast<A>(Word{3} << (kFraction - 1));  // what it is added to is whole
  constexpr A kSmallest = sizeof(A) == 4 ? -126 : -1022;
  const V shifted = x + kRound;
  const V r = x - (shifted - kRound);
  V sum = splat_as<V>(exp_series<A>.terms[kExpTerms<A> - 1]);
#pragma GCC unroll 16
  for (int k = kExpTerms<A> - 2; k > 0; --k) sum = sum * r + exp_series<A>.terms[k];
  const V beyond_one = sum * r;
  sum = beyond_one + exp_series<A>.terms[0];
  const Words power = reinterpret_cast<Words>(shifted) << kFraction;
  const auto below = reinterpret_cast<Mask>(x - kSmallest) >> (kBits - 1);
  const auto keep_bits = reinterpret_cast<Words>(~below);
  const auto result = reinterpret_cast<V>((reinterpret_cast<Words>(sum) + power) & keep_bits);
  if (rest) {  // where n = 0, the 1 of the series is left out instead of subtracted
    const auto split =
        reinterpret_cast<Words>(reinterpret_cast<Mask>(x + static_cast<A>(0.5)) >> (kBits - 1));
    *rest = reinterpret_cast<V>((reinterpret_cast<Words>(1 - result) & split) |
                                (reinterpret_cast<Words>(-beyond_one) & ~split));
  }
  return result;
}

}  // namespace instembed
