// All pairs of something, in parallel and in an order that does not depend on the number of
// threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "common/parallel.h"

namespace instembed {

// A round-robin tournament of the ranges 0 .. counts[g] - 1 of every group g: each meets itself,
// then the others in an order of its own. Matches come round by round; one may begin before the
// round before has ended, once both of its ranges have played theirs.
class Tournament {
 public:
  struct Match {
    int64_t group, a, b;
    int64_t of_a, of_b;  // how many matches each has before this one
  };

  explicit Tournament(const std::vector<int64_t>& counts) : counts_(counts), first_(counts.size()) {
    int64_t ranges = 0;
    for (size_t g = 0; g < counts.size(); ++g) {
      first_[g] = ranges;
      ranges += counts[g];
      rounds_ = std::max(rounds_, counts[g] + counts[g] % 2);
    }
    announced_.resize(ranges);
    played_.reset(new std::atomic<int64_t>[ranges]());
  }

  // The next match in order; none after the last. Any thread may ask.
  std::optional<Match> next() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (at_ == matches_.size()) {
      if (round_ == rounds_) return std::nullopt;
      draw(round_++);
    }
    Match match = matches_[at_++];
    match.of_a = announced_[first_[match.group] + match.a]++;
    match.of_b = match.a == match.b ? match.of_a : announced_[first_[match.group] + match.b]++;
    return match;
  }

  // Returns when the earlier matches of both ranges have been played: they were announced before,
  // so somebody plays them.
  void wait(const Match& match) const {
    while (played(match.group, match.a) != match.of_a) std::this_thread::yield();
    while (played(match.group, match.b) != match.of_b) std::this_thread::yield();
  }

  void end(const Match& match) {
    ++played_[first_[match.group] + match.a];
    if (match.a != match.b) ++played_[first_[match.group] + match.b];
  }

 private:
  int64_t played(int64_t group, int64_t range) const { return played_[first_[group] + range]; }

  void draw(int64_t round) {
    matches_.clear();
    at_ = 0;
    for (int64_t g = 0; g < static_cast<int64_t>(counts_.size()); ++g) {
      const int64_t count = counts_[g], teams = count + count % 2;
      if (round == 0) {
        for (int64_t k = 0; k < count; ++k) matches_.push_back({g, k, k, 0, 0});
        continue;
      }
      for (int64_t k = 0; round < teams && k < teams / 2; ++k) {
        const int64_t a = k == 0 ? teams - 1 : (round - 1 + k) % (teams - 1);
        const int64_t b = (round + teams - 2 - k) % (teams - 1);
        if (a < count && b < count) {
          matches_.push_back({g, std::min(a, b), std::max(a, b), 0, 0});
        }
      }
    }
  }

  std::vector<int64_t> counts_, first_, announced_;
  std::unique_ptr<std::atomic<int64_t>[]> played_;
  std::mutex mutex_;
  std::vector<Match> matches_;  // of the round before round_
  size_t at_ = 0;               // the next of them
  int64_t round_ = 0, rounds_ = 0;
};

// Runs f(g, a, b) for every two of the ranges 0 .. counts[g] - 1 of every group g, a < b, and f(g,
// a, a). What runs at the same time has no range in common, and a range meets the others in an
// order of its own.
template <class F>
void for_pairs(const std::vector<int64_t>& counts, int threads, F&& f) {
  Tournament tournament(counts);
  struct Ended {  // also if f throws: others wait
    Tournament& tournament;
    const Tournament::Match& match;
    ~Ended() { tournament.end(match); }
  };
  parallel_for(std::max(threads, 1), threads, [&](int64_t) {
    while (const auto match = tournament.next()) {
      tournament.wait(*match);
      const Ended ended{tournament, *match};
      f(match->group, match->a, match->b);
    }
  });
}

}  // namespace instembed
