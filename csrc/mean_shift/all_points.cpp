// Mean shift from every point, as scikit-learn defines it, without doing most of it.
//
// The next position of a trajectory is the mean of its members, so trajectories whose members
// coincide are one from there on: each distinct set of members is a state that is computed once.
// For the points of one block, most other blocks are inside the ball of every point or outside of
// every one. In a well-trained embedding that holds for all blocks: the points of the block share
// one set of members, which proves that they all move to the same mode, and nothing is computed
// point by point.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <unordered_map>

#include "common/parallel.h"
#include "common/simd.h"
#include "mean_shift/groups.h"

namespace instembed::mean_shift {

namespace {

constexpr int32_t kNowhere = -1;     // no members: the trajectory leaves no result
constexpr int64_t kSeedGroup = 8;    // blocks of seeds a task
constexpr int64_t kStateGroup = 16;  // states a task

// Distinct sets of members that one task met, in order, and which one each of its trajectories got.
struct Visits {
  std::vector<uint64_t> keys;
  std::vector<int64_t> counts;
  std::vector<double> means;
  std::vector<int32_t> which;  // by trajectory; kNowhere if it has no members
  std::vector<bool> still;     // by trajectory: it moved by no more than the tolerance
  std::unordered_map<uint64_t, int32_t> known;

  int32_t add(const Moments& moments, int dims) {
    if (moments.count == 0) return kNowhere;
    const auto [entry, added] = known.try_emplace(moments.key, static_cast<int32_t>(keys.size()));
    if (added) {
      keys.push_back(moments.key);
      counts.push_back(moments.count);
      for (int d = 0; d < dims; ++d) {
        means.push_back(moments.sum[d] / static_cast<double>(moments.count));
      }
    }
    return entry->second;
  }
};

template <class S>
class AllPoints {
 public:
  AllPoints(const BlockSet<S>& set, const Options& options, Ownership* ownership, int threads)
      : set_(set), options_(options), own_(*ownership), threads_(threads), dims_(set.dims) {}

  Clusters run() {
    make_keys();
    start();
    while (!pending_.empty() && round_ < options_.max_iter) advance();
    follow();
    keep_modes();
    assign();
    return std::move(clusters_);
  }

 private:
  void make_keys() {
    keys_ = Buffer<uint64_t>(set_.size());
    first_seed_.resize(set_.size() + 1, 0);
    constexpr int64_t kGroup = 256;
    parallel_for((set_.size() + kGroup - 1) / kGroup, threads_, [&](int64_t group) {
      for (int64_t b = group * kGroup; b < std::min(set_.size(), (group + 1) * kGroup); ++b) {
        uint64_t key = 0;
        for (int32_t i = 0; i < set_.blocks[b].size; ++i) {
          key += point_key(set_.blocks[b].pixel(i));
        }
        keys_[b] = key;
      }
    });
    for (int64_t b = 0; b < set_.size(); ++b) {
      first_seed_[b + 1] = first_seed_[b] + set_.blocks[b].size;
    }
  }

  bool still(const double* from, const double* to) const {
    double moved = 0;
    for (int d = 0; d < dims_; ++d) moved += (to[d] - from[d]) * (to[d] - from[d]);
    return std::sqrt(moved) <= options_.tol * options_.bandwidth;
  }

  // The first step of every point.
  void start() {
    const int64_t tasks = (set_.size() + kSeedGroup - 1) / kSeedGroup;
    std::vector<Visits> visits(tasks);
    parallel_for(tasks, threads_, [&](int64_t task) {
      Seeds seeds(*this);
      const int64_t end = std::min(set_.size(), (task + 1) * kSeedGroup);
      for (int64_t b = task * kSeedGroup; b < end; ++b) seeds.run(b, &visits[task]);
    });
    state_of_seed_.reserve(set_.points);
    still_seed_.reserve(set_.points);
    for (const Visits& visit : visits) {
      const std::vector<int32_t> states = merge(visit);
      for (size_t i = 0; i < visit.which.size(); ++i) {
        const int32_t state = visit.which[i] == kNowhere ? kNowhere : states[visit.which[i]];
        state_of_seed_.push_back(state);
        still_seed_.push_back(visit.still[i]);
        if (state != kNowhere && !visit.still[i]) enqueue(state);
      }
    }
  }

  // Blocks against blocks first, then points against the blocks for which that decides nothing.
  class Seeds {
   public:
    explicit Seeds(const AllPoints& parent)
        : p_(parent),
          ball_(parent.dims_, parent.options_.bandwidth),
          common_(parent.dims_),
          moments_(parent.dims_),
          squared_(kStrip),
          center_(parent.dims_),
          mean_(parent.dims_) {}

    void run(int64_t b, Visits* visits) {
      const BlockSet<S>& set = p_.set_;
      const Block<S>& block = set.blocks[b];
      for (int d = 0; d < p_.dims_; ++d) {
        center_[d] = static_cast<double>(set.balls.centers[d * set.balls.row + b]);
      }
      ball_.move_to(center_.data());
      classify(set.balls.radius[b]);
      Scan scan;
      scan.keys = true;
      scan.block_keys = p_.keys_.get();
      make_front<S>(set.balls, nullptr, p_.dims_, straddling_, &front_);
      for (int32_t i = 0; i < block.size; ++i) {
        for (int d = 0; d < p_.dims_; ++d) {
          center_[d] = static_cast<double>(block.x[d * block.stride + i]);
        }
        if (i == 0 || !straddling_.empty()) {
          ball_.move_to(center_.data());
          moments_ = common_;
          add_members(set, front_, ball_, scan, &looked_into_, &moments_);
          for (int d = 0; d < p_.dims_; ++d) {
            mean_[d] = moments_.sum[d] / static_cast<double>(moments_.count);
          }
        }
        visits->which.push_back(visits->add(moments_, p_.dims_));
        visits->still.push_back(moments_.count > 0 && p_.still(center_.data(), mean_.data()));
      }
    }

   private:
    static constexpr int64_t kStrip = 1024;

    // common_: all blocks inside the ball of every point of a block with this radius.
    void classify(S seed_radius) {
      const BlockSet<S>& set = p_.set_;
      common_.clear();
      straddling_.clear();
      for (int64_t from = 0; from < set.size(); from += kStrip) {
        const int64_t n = std::min(kStrip, set.size() - from);
        squared_distances(set.balls.centers.get() + from, set.balls.row, n, p_.dims_,
                          ball_.rounded.data(), squared_.data());
        for (int64_t i = 0; i < n; ++i) {
          const S radius = (set.balls.radius[from + i] + seed_radius) * ball_.grow;
          const S far = (ball_.outer + radius) * ball_.grow;
          if (squared_[i] > far * far) continue;
          const S near = ball_.inner - radius;
          if (near >= 0 && squared_[i] <= near * near) {
            const double* sum = set.sums.get() + (from + i) * p_.dims_;
            for (int d = 0; d < p_.dims_; ++d) common_.sum[d] += sum[d];
            common_.count += set.blocks[from + i].size;
            common_.key += p_.keys_[from + i];
          } else {
            straddling_.push_back(static_cast<int32_t>(from + i));
          }
        }
      }
    }

    const AllPoints& p_;
    Ball<S> ball_;
    Moments common_, moments_;
    std::vector<S> squared_;
    std::vector<double> center_, mean_;
    std::vector<int32_t> straddling_, looked_into_;
    Front<S> front_;
  };

  // The states of a task's distinct sets of members, new ones added in the task's order.
  std::vector<int32_t> merge(const Visits& visit) {
    std::vector<int32_t> states(visit.keys.size());
    for (size_t k = 0; k < states.size(); ++k) {
      const auto [entry, added] =
          states_.try_emplace(visit.keys[k], static_cast<int32_t>(counts_.size()));
      states[k] = entry->second;
      if (!added) continue;
      counts_.push_back(visit.counts[k]);
      means_.insert(means_.end(), visit.means.begin() + k * dims_,
                    visit.means.begin() + (k + 1) * dims_);
      next_.push_back(kNowhere);
      still_.push_back(false);
      queued_.push_back(false);
    }
    return states;
  }

  void enqueue(int32_t state) {
    if (queued_[state]) return;
    queued_[state] = true;
    pending_.push_back(state);
  }

  // One step from every state that a trajectory has reached and not left.
  void advance() {
    const std::vector<int32_t> current = std::move(pending_);
    pending_.clear();
    const auto n = static_cast<int64_t>(current.size());
    const int64_t tasks = (n + kStateGroup - 1) / kStateGroup;
    std::vector<Visits> visits(tasks);
    parallel_for(tasks, threads_, [&](int64_t task) {
      step_states(current.data() + task * kStateGroup,
                  std::min(kStateGroup, n - task * kStateGroup), &visits[task]);
    });
    for (int64_t task = 0; task < tasks; ++task) {
      const std::vector<int32_t> states = merge(visits[task]);
      for (size_t i = 0; i < visits[task].which.size(); ++i) {
        const int32_t from = current[task * kStateGroup + i];
        if (visits[task].which[i] == kNowhere) continue;
        const int32_t to = states[visits[task].which[i]];
        next_[from] = to;
        still_[from] = visits[task].still[i];
        if (!still_[from]) enqueue(to);
      }
    }
    ++round_;
  }

  // States of a group were found near each other: they share one front.
  void step_states(const int32_t* states, int64_t n, Visits* visits) const {
    Ball<S> ball(dims_, options_.bandwidth);
    const double* origin = mean(states[0]);
    double spread2 = 0;
    for (int64_t k = 1; k < n; ++k) {
      spread2 = std::max(spread2, squared_distance(mean(states[k]), 1, origin, dims_));
    }
    std::vector<int32_t> found, straddling;
    Front<S> front;
    ball.move_to(origin);
    if (ball.finite && std::isfinite(spread2)) {
      find_near(set_.balls, 0, set_.size(), ball, std::sqrt(spread2) * (1 + 1e-6), &found);
    } else {
      found.resize(set_.size());
      std::iota(found.begin(), found.end(), 0);
    }
    make_front<S>(set_.balls, nullptr, dims_, found, &front);
    Scan scan;
    scan.keys = true;
    scan.block_keys = keys_.get();
    Moments moments(dims_);
    std::vector<double> moved(dims_);
    for (int64_t k = 0; k < n; ++k) {
      moments.clear();
      ball.move_to(mean(states[k]));
      if (ball.finite) {
        add_members(set_, front, ball, scan, &straddling, &moments);
      }
      for (int d = 0; d < dims_ && moments.count > 0; ++d) {
        moved[d] = moments.sum[d] / static_cast<double>(moments.count);
      }
      visits->which.push_back(visits->add(moments, dims_));
      visits->still.push_back(moments.count > 0 && still(mean(states[k]), moved.data()));
    }
  }

  const double* mean(int32_t state) const {
    return means_.data() + static_cast<int64_t>(state) * dims_;
  }

  // Follows each trajectory from state to state to where it stops. result_[state]: the last seed
  // that stopped there.
  void follow() {
    result_.assign(counts_.size(), -1);
    int64_t longest = 0;
    for (int64_t b = 0; b < set_.size(); ++b) {
      for (int32_t i = 0; i < set_.blocks[b].size; ++i) {
        const int64_t seed = first_seed_[b] + i;
        int32_t state = state_of_seed_[seed];
        if (state == kNowhere) continue;
        bool done = still_seed_[seed];
        int64_t iterations = 0;
        while (!done && iterations < options_.max_iter) {
          ++iterations;
          done = still_[state];
          state = next_[state];
          if (state == kNowhere) break;
        }
        longest = std::max(longest, iterations);
        if (state == kNowhere) continue;
        result_[state] = std::max(result_[state], set_.blocks[b].pixel(i));
      }
    }
    clusters_.iterations = longest;
  }

  // scikit-learn's post-processing: modes by (count, coordinates), descending, suppress others in
  // their ball.
  void keep_modes() {
    std::vector<int32_t> modes;
    for (size_t s = 0; s < result_.size(); ++s) {
      if (result_[s] >= 0) modes.push_back(static_cast<int32_t>(s));
    }
    auto compare_means = [&](int32_t a, int32_t b) {
      for (int d = 0; d < dims_; ++d) {
        if (mean(a)[d] != mean(b)[d]) return mean(a)[d] > mean(b)[d] ? 1 : -1;
      }
      return 0;
    };
    // Different members may have the same mean. One entry a mean, and the last seed's count stands.
    std::sort(modes.begin(), modes.end(), [&](int32_t a, int32_t b) {
      const int order = compare_means(a, b);
      return order != 0 ? order > 0 : result_[a] > result_[b];
    });
    modes.erase(std::unique(modes.begin(), modes.end(),
                            [&](int32_t a, int32_t b) { return compare_means(a, b) == 0; }),
                modes.end());
    std::stable_sort(modes.begin(), modes.end(),
                     [&](int32_t a, int32_t b) { return counts_[a] > counts_[b]; });
    const auto n = static_cast<int64_t>(modes.size());
    std::vector<double> planar(n * dims_), squared(n);
    for (int64_t k = 0; k < n; ++k) {
      for (int d = 0; d < dims_; ++d) planar[d * n + k] = mean(modes[k])[d];
    }
    std::vector<bool> suppressed(n, false);
    const double limit2 = options_.bandwidth * options_.bandwidth;
    for (int64_t k = 0; k < n; ++k) {
      if (suppressed[k]) continue;
      clusters_.centers.insert(clusters_.centers.end(), mean(modes[k]), mean(modes[k]) + dims_);
      squared_distances(planar.data() + k, n, n - k, dims_, mean(modes[k]), squared.data() + k);
      for (int64_t other = k + 1; other < n; ++other) {
        if (squared[other] <= limit2) suppressed[other] = true;
      }
    }
  }

  // Each point to the nearest mode, if that is within the bandwidth.
  void assign() {
    const NearestCenters nearest(clusters_.centers, dims_);
    const int64_t parts = std::clamp<int64_t>(set_.size() / 64, 1, 64);
    std::vector<std::vector<int64_t>> counts(parts);
    own_.points.resize(set_.points);
    parallel_for(parts, threads_, [&](int64_t part) {
      counts[part].assign(nearest.size(), 0);
      std::vector<double> scratch;
      const int64_t end = set_.size() * (part + 1) / parts;
      for (int64_t b = set_.size() * part / parts; b < end; ++b) {
        int32_t* owners = own_.points.data() + first_seed_[b];
        const int32_t size = set_.blocks[b].size;
        if (nearest.block(set_, b, options_.bandwidth, owners, &scratch)) {
          own_.owner[b] = owners[0];
          if (owners[0] > 0) counts[part][owners[0] - 1] += size;
          continue;
        }
        own_.slot[b] = first_seed_[b];
        for (int32_t i = 0; i < size; ++i) {
          if (owners[i] > 0) ++counts[part][owners[i] - 1];
        }
      }
    });
    clusters_.counts.assign(nearest.size(), 0);
    for (const auto& part : counts) {
      for (int64_t k = 0; k < nearest.size(); ++k) clusters_.counts[k] += part[k];
    }
    // A mode may end without points: scikit-learn keeps it, and so does min_size = 1.
    for (const int64_t count : clusters_.counts) {
      clusters_.kept.push_back(options_.min_size == 1 || count >= options_.min_size);
    }
  }

  const BlockSet<S>& set_;
  const Options& options_;
  Ownership& own_;
  int threads_;
  int dims_;
  Clusters clusters_;
  Buffer<uint64_t> keys_;            // by block
  std::vector<int64_t> first_seed_;  // by block
  std::vector<int32_t> state_of_seed_;
  std::vector<bool> still_seed_;
  std::unordered_map<uint64_t, int32_t> states_;  // by the key of the members
  std::vector<double> means_;
  std::vector<int64_t> counts_;
  std::vector<int32_t> next_;
  std::vector<bool> still_, queued_;
  std::vector<int32_t> pending_;
  std::vector<int64_t> result_;
  int64_t round_ = 0;
};

}  // namespace

template <class S>
Clusters all_points(const BlockSet<S>& set, const Options& options, Ownership* ownership,
                    int threads) {
  return AllPoints<S>(set, options, ownership, threads).run();
}

template Clusters all_points(const BlockSet<float>&, const Options&, Ownership*, int);
template Clusters all_points(const BlockSet<double>&, const Options&, Ownership*, int);

}  // namespace instembed::mean_shift
