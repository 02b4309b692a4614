// Peeling: a mean shift from the first point that nobody owns, which then owns all within the
// bandwidth; repeat.
//
// A trajectory moves little after its first step, so it looks only at the blocks near its start and
// collects anew when it has moved too far for them. What is owned leaves the scans.
#include <algorithm>
#include <cmath>
#include <functional>
#include <queue>
#include <utility>

#include "common/parallel.h"
#include "common/simd.h"
#include "mean_shift/groups.h"

namespace instembed::mean_shift {

namespace {

// Sums are combined by chunks of so many blocks: part of the definition of the result's last bits.
constexpr int64_t kScanChunk = 512;

// Below so many numbers to read, threads cost more than they save: a barrier is dear where cores
// are busy.
constexpr int64_t kParallelWork = 1 << 20;

// How far, in bandwidths, a trajectory may move from where its blocks were collected.
constexpr double kSlack = 0.5;

template <class S>
class Peeler {
 public:
  Peeler(BlockSet<S>* set, const Options& options, Ownership* ownership, int threads)
      : set_(*set),
        options_(options),
        own_(*ownership),
        threads_(threads),
        ball_(set->dims, options.bandwidth),
        total_(set->dims),
        parts_() {
    first_alive_.resize(set_.size());
    all_.ids.resize(set_.size());
    for (int64_t b = 0; b < set_.size(); ++b) {
      first_alive_[b] = set_.blocks[b].first;
      all_.ids[b] = static_cast<int32_t>(b);
    }
    // The blocks' own centres serve until enough are gone to make a smaller copy worth it; the
    // labels need the originals later, hence a copy from the start.
    std::vector<int32_t> entries(all_.ids);
    make_front<S>(set_.balls, nullptr, set_.dims, entries, &all_);
    entry_of_.resize(set_.size());
    for (int64_t b = 0; b < set_.size(); ++b) entry_of_[b] = static_cast<int32_t>(b);
    in_order_.resize(set_.size());
    for (int64_t b = 0; b < set_.size(); ++b) {
      in_order_[b] = {first_alive_[b], static_cast<int32_t>(b)};
    }
    std::sort(in_order_.begin(), in_order_.end());
    remaining_ = set_.size();
  }

  Clusters run() {
    std::vector<double> seed(set_.dims);
    for (int64_t b = next_block(); b >= 0; b = next_block()) {
      const int32_t point = first_alive_point(b);
      const Block<S>& block = set_.blocks[b];
      for (int d = 0; d < set_.dims; ++d) {
        seed[d] = static_cast<double>(block.x[d * block.stride + point]);
      }
      climb(seed.data());
      const auto owner = static_cast<int32_t>(clusters_.size() + 1);
      int64_t claimed = claim(owner);
      clusters_.kept.push_back(claimed > 0 && claimed >= options_.min_size);
      if (claimed == 0) {  // rounding or overflow put the centre out of reach of every point
        own_point(b, point, owner);
        claimed = 1;
      }
      clusters_.counts.push_back(claimed);
      clusters_.centers.insert(clusters_.centers.end(), ball_.center.begin(), ball_.center.end());
      if (2 * remaining_ < all_.balls.count) shrink();
    }
    return std::move(clusters_);
  }

 private:
  using Entry = std::pair<int64_t, int32_t>;  // first unowned pixel, block

  bool current(const Entry& entry) const {
    return own_.alive[entry.second] != 0 && first_alive_[entry.second] == entry.first;
  }

  // The block that holds the unowned point of the lowest index, or -1. Most blocks have one owner
  // and are passed once; those that lost their first points wait in the queue, maybe with entries
  // that are out of date.
  int64_t next_block() {
    while (!shared_.empty() && !current(shared_.top())) shared_.pop();
    while (cursor_ < in_order_.size() && !current(in_order_[cursor_])) ++cursor_;
    const bool whole = cursor_ < in_order_.size();
    if (shared_.empty()) return whole ? in_order_[cursor_].second : -1;
    return whole && in_order_[cursor_] < shared_.top() ? in_order_[cursor_].second
                                                       : shared_.top().second;
  }

  int32_t first_alive_point(int64_t b) const {
    const int32_t* owners = own_.of_points(b);
    int32_t i = 0;
    while (owners != nullptr && owners[i] != 0) ++i;
    return i;
  }

  // Moves the ball to the mode above `seed`. near_ ends up covering every block that the ball
  // touches.
  void climb(const double* seed) {
    std::vector<double> mean(set_.dims);
    ball_.move_to(seed);
    collect();
    for (int64_t step = 0; step < options_.max_iter; ++step) {
      scan();
      if (total_.count == 0) break;
      double moved = 0;
      for (int d = 0; d < set_.dims; ++d) {
        mean[d] = total_.sum[d] / static_cast<double>(total_.count);
        moved += (mean[d] - ball_.center[d]) * (mean[d] - ball_.center[d]);
      }
      clusters_.iterations = std::max(clusters_.iterations, step + 1);
      ball_.move_to(mean.data());
      if (distance_from_origin() > kSlack * options_.bandwidth) collect();
      if (std::sqrt(moved) <= options_.tol * options_.bandwidth) break;
    }
  }

  double distance_from_origin() const {
    double total = 0;
    for (int d = 0; d < set_.dims; ++d) {
      total += (ball_.center[d] - origin_[d]) * (ball_.center[d] - origin_[d]);
    }
    return std::sqrt(total);
  }

  // Restricts scans to the blocks that the ball can touch while it is within kSlack of where it is
  // now.
  void collect() {
    origin_ = ball_.center;
    found_.clear();
    if (ball_.finite) {
      const double slack = kSlack * options_.bandwidth * (1 + 1e-3);
      const int64_t chunks = (all_.balls.count + kScanChunk * 8 - 1) / (kScanChunk * 8);
      const bool parallel = all_.balls.count * set_.dims >= kParallelWork;
      found_parts_.resize(chunks);
      parallel_for(chunks, parallel ? threads_ : 1, [&](int64_t chunk) {
        found_parts_[chunk].clear();
        find_near(all_.balls, chunk * kScanChunk * 8,
                  std::min(all_.balls.count, (chunk + 1) * kScanChunk * 8), ball_, slack,
                  &found_parts_[chunk]);
      });
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        found_.insert(found_.end(), found_parts_[chunk].begin(), found_parts_[chunk].end());
      }
    }
    make_front<S>(all_.balls, all_.ids.data(), set_.dims, found_, &near_);
    near_points_ = 0;
    for (const int32_t b : near_.ids) near_points_ += own_.alive[b];
  }

  void scan() {
    total_.clear();
    if (!ball_.finite) return;
    Scan scan;
    scan.ownership = &own_;
    const int64_t n = near_.balls.count;
    const int64_t chunks = (n + kScanChunk - 1) / kScanChunk;
    const bool parallel = chunks > 1 && near_points_ * set_.dims >= kParallelWork;
    while (static_cast<int64_t>(parts_.size()) < chunks) parts_.emplace_back(set_.dims);
    parallel_for(chunks, parallel ? threads_ : 1, [&](int64_t chunk) {
      parts_[chunk].clear();
      add_members(set_, near_.balls, near_.ids.data(), chunk * kScanChunk,
                  std::min(n, (chunk + 1) * kScanChunk), ball_, scan, &parts_[chunk]);
    });
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int d = 0; d < set_.dims; ++d) total_.sum[d] += parts_[chunk].sum[d];
      total_.count += parts_[chunk].count;
    }
  }

  // Gives all unowned points in the ball to `owner`; returns how many.
  int64_t claim(int32_t owner) {
    if (!ball_.finite) return 0;
    const int64_t n = near_.balls.count;
    squared_.resize(n);
    squared_distances(near_.balls.centers.get(), near_.balls.row, n, set_.dims,
                      ball_.rounded.data(), squared_.data());
    int64_t claimed = 0;
    mask_t<S> mask[kMaxBlock];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t b = near_.ids[i];
      const S radius = near_.balls.radius[i];
      const S far = (ball_.outer + radius) * ball_.grow;
      const S near = ball_.inner - radius;
      if (squared_[i] > far * far || own_.alive[b] == 0) continue;
      int inside = own_.alive[b];
      if (!(near >= 0 && squared_[i] <= near * near)) {
        inside = block_members(set_.blocks[b], own_.of_points(b), ball_, mask);
      } else if (inside != set_.blocks[b].size) {
        std::fill_n(mask, set_.blocks[b].size, mask_t<S>{-1});
      }
      if (inside == 0) continue;
      claimed += inside;
      if (inside == set_.blocks[b].size) {
        own_.owner[b] = owner;
        own_.alive[b] = 0;
        retire(b);
      } else {
        own_part(b, mask, owner);
      }
    }
    return claimed;
  }

  void own_point(int64_t b, int32_t point, int32_t owner) {
    mask_t<S> mask[kMaxBlock] = {};
    mask[point] = -1;
    own_part(b, mask, owner);
  }

  // Gives the masked points that are unowned to `owner`, and sums up what is left of the block.
  void own_part(int64_t b, const mask_t<S>* mask, int32_t owner) {
    const Block<S>& block = set_.blocks[b];
    if (own_.slot[b] < 0) {
      own_.slot[b] = static_cast<int64_t>(own_.points.size());
      own_.points.resize(own_.points.size() + block.size, 0);
    }
    int32_t* owners = own_.points.data() + own_.slot[b];
    int32_t alive = 0;
    int32_t first = -1;
    for (int32_t i = 0; i < block.size; ++i) {
      if (owners[i] == 0 && mask[i]) owners[i] = owner;
      if (owners[i] != 0) continue;
      ++alive;
      if (first < 0) first = i;
    }
    own_.alive[b] = alive;
    if (alive == 0) return retire(b);
    if (first_alive_[b] != block.pixel(first)) {
      first_alive_[b] = block.pixel(first);
      shared_.push({first_alive_[b], static_cast<int32_t>(b)});
    }
    mask_t<S> rest[kMaxBlock];
    for (int32_t i = 0; i < block.size; ++i) rest[i] = owners[i] == 0 ? -1 : 0;
    double* sum = set_.sums.get() + b * set_.dims;
    std::fill_n(sum, set_.dims, 0.0);
    add_points(block, set_.dims, rest, sum);
  }

  // Moves a block out of every scan's reach.
  void retire(int64_t b) {
    all_.balls.centers[entry_of_[b]] = std::numeric_limits<S>::infinity();
    --remaining_;
  }

  void shrink() {
    std::vector<int32_t> entries;
    entries.reserve(remaining_);
    for (int64_t i = 0; i < all_.balls.count; ++i) {
      if (own_.alive[all_.ids[i]] != 0) entries.push_back(static_cast<int32_t>(i));
    }
    Front<S> rest;
    make_front<S>(all_.balls, all_.ids.data(), set_.dims, entries, &rest);
    all_ = std::move(rest);
    for (int64_t i = 0; i < all_.balls.count; ++i) entry_of_[all_.ids[i]] = static_cast<int32_t>(i);
  }

  BlockSet<S>& set_;
  const Options& options_;
  Ownership& own_;
  int threads_;
  Ball<S> ball_;
  Moments total_;
  std::vector<Moments> parts_;
  Clusters clusters_;
  std::vector<int64_t> first_alive_;  // pixel, by block
  Front<S> all_, near_;
  std::vector<int32_t> entry_of_;  // of a block in all_
  std::vector<int32_t> found_;
  std::vector<std::vector<int32_t>> found_parts_;
  std::vector<double> origin_;
  std::vector<S> squared_;
  int64_t near_points_ = 0;
  std::vector<Entry> in_order_;
  size_t cursor_ = 0;
  std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> shared_;
  int64_t remaining_ = 0;
};

}  // namespace

template <class S>
Clusters peel(BlockSet<S>* set, const Options& options, Ownership* ownership, int threads) {
  return Peeler<S>(set, options, ownership, threads).run();
}

template Clusters peel(BlockSet<float>*, const Options&, Ownership*, int);
template Clusters peel(BlockSet<double>*, const Options&, Ownership*, int);

}  // namespace instembed::mean_shift
