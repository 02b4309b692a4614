// All pairs of something, in parallel and in an order that does not depend on the number of
// threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/parallel.h"

namespace instembed {

// Runs f(g, a, b) for every two of the ranges 0 .. counts[g] - 1 of every group g, a < b, and f(g,
// a, a). What runs at the same time has no range in common, and a range meets the others in an
// order of its own: a round-robin tournament.
template <class F>
void for_pairs(const std::vector<int64_t>& counts, int threads, F&& f) {
  struct Match {
    int64_t group, a, b;
  };
  std::vector<Match> matches;
  const auto play = [&] {
    parallel_for(static_cast<int64_t>(matches.size()), threads,
                 [&](int64_t k) { f(matches[k].group, matches[k].a, matches[k].b); });
    matches.clear();
  };
  const auto groups = static_cast<int64_t>(counts.size());
  int64_t most = 0;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t k = 0; k < counts[g]; ++k) matches.push_back({g, k, k});
    most = std::max(most, counts[g] + counts[g] % 2);
  }
  play();
  for (int64_t round = 0; round + 1 < most; ++round) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t teams = counts[g] + counts[g] % 2;
      if (round + 1 >= teams) continue;
      for (int64_t k = 0; k < teams / 2; ++k) {
        const int64_t a = k == 0 ? teams - 1 : (round + k) % (teams - 1);
        const int64_t b = (round + teams - 1 - k) % (teams - 1);
        if (a < counts[g] && b < counts[g]) matches.push_back({g, std::min(a, b), std::max(a, b)});
      }
    }
    play();
  }
}

}  // namespace instembed
