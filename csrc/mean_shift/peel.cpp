// Peeling: a mean shift from the first point that nobody owns, which then owns all within the
// bandwidth; repeat.
//
// A trajectory moves little after its first step, so it looks only at the blocks near its start and
// collects anew when it has moved too far for them. Collecting passes over most blocks by groups.
// What is owned leaves the scans.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <queue>
#include <utility>

#include "common/parallel.h"
#include "common/simd.h"
#include "mean_shift/groups.h"

namespace instembed::mean_shift {

namespace {

// Sums are combined by chunks of so many blocks: part of the definition of the result's last bits.
constexpr int64_t kScanChunk = 16;

// Below so many numbers to read, threads cost more than they save: a barrier is dear where cores
// are busy.
constexpr int64_t kParallelWork = 1 << 17;

// How far, in bandwidths, a trajectory may move from where its blocks were collected.
constexpr double kSlack = 0.5;

// Groups of blocks: those within so many bandwidths of the group's first one, or, once there are so
// many groups, the ones that have it nearest.
constexpr double kGroupReach = 1.0;
constexpr int64_t kMaxGroups = 128;

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
    in_order_.resize(set_.size());
    for (int64_t b = 0; b < set_.size(); ++b) {
      first_alive_[b] = set_.blocks[b].first;
      in_order_[b] = {first_alive_[b], static_cast<int32_t>(b)};
    }
    std::sort(in_order_.begin(), in_order_.end());
    make_groups();
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
    }
    return std::move(clusters_);
  }

 private:
  using Entry = std::pair<int64_t, int32_t>;  // first unowned pixel, block
  struct Group {
    int32_t begin = 0, end = 0;  // in all_
    int32_t alive = 0;           // blocks with a point that nobody owns
  };

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
      travelled_ += std::sqrt(moved);
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
      near_groups_.clear();
      find_near(group_balls_, 0, group_balls_.count, ball_, slack, &near_groups_);
      for (const int32_t g : near_groups_) {
        if (2 * groups_[g].alive <= groups_[g].end - groups_[g].begin) compact(&groups_[g]);
        find_near(all_.balls, groups_[g].begin, groups_[g].end, ball_, slack, &found_);
      }
    }
    make_front<S>(all_.balls, all_.ids.data(), set_.dims, found_, &near_);
    clear_.assign(near_.ids.size(), 0.0);
    travelled_ = 0;
    straddling_.resize(near_.ids.size());
  }

  void scan() {
    total_.clear();
    if (!ball_.finite) return;
    Scan scan;
    scan.ownership = &own_;
    scan.clear = clear_.data();
    scan.travelled = travelled_;
    const int64_t n = add_whole(set_, near_, ball_, scan, &total_, straddling_.data());
    int64_t points = 0;
    for (int64_t k = 0; k < n; ++k) points += set_.blocks[near_.ids[straddling_[k]]].size;
    const int64_t chunks = (n + kScanChunk - 1) / kScanChunk;
    while (static_cast<int64_t>(parts_.size()) < chunks) parts_.emplace_back(set_.dims);
    parallel_for(chunks, points * set_.dims >= kParallelWork ? threads_ : 1, [&](int64_t chunk) {
      parts_[chunk].clear();
      const int64_t begin = chunk * kScanChunk;
      add_straddling(set_, near_, straddling_.data() + begin, std::min(n - begin, kScanChunk),
                     ball_, scan, &parts_[chunk]);
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
        --groups_[group_of_[b]].alive;
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
    if (alive == 0) {
      --groups_[group_of_[b]].alive;
      return;
    }
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

  // Sorts the blocks into groups with a ball around each.
  void make_groups() {
    const int dims = set_.dims;
    const int64_t n = set_.size();
    const S reach = static_cast<S>(kGroupReach * options_.bandwidth);
    const auto grow = static_cast<S>(1 + 2 * distance_error<S>(dims));
    constexpr S kEverywhere = std::numeric_limits<S>::infinity();
    Balls<S>& balls = group_balls_;
    balls.allocate(std::min(n, kMaxGroups), dims);
    balls.count = 0;
    std::vector<S> center(dims), squared(balls.row);
    group_of_.resize(n);
    for (int64_t b = 0; b < n; ++b) {
      for (int d = 0; d < dims; ++d) center[d] = set_.balls.centers[d * set_.balls.row + b];
      auto g = static_cast<int32_t>(nearest_ball(balls, dims, center.data(), squared.data()));
      if (balls.count < balls.row && (g < 0 || !(squared[g] <= reach * reach))) {
        g = static_cast<int32_t>(balls.count++);
        for (int d = 0; d < dims; ++d) balls.centers[d * balls.row + g] = center[d];
        balls.radius[g] = squared[g] = 0;
        groups_.push_back({});
      }
      const S radius = (std::sqrt(squared[g]) + set_.balls.radius[b]) * grow;
      // Between centres that overflowed there is no distance.
      balls.radius[g] = std::isnan(radius) ? kEverywhere : std::max(balls.radius[g], radius);
      group_of_[b] = g;
      ++groups_[g].alive;
    }
    int32_t entries = 0;
    for (Group& group : groups_) {
      group.begin = group.end = entries;
      entries += group.alive;
    }
    std::vector<int32_t> by_group(n);
    for (int64_t b = 0; b < n; ++b) {
      by_group[groups_[group_of_[b]].end++] = static_cast<int32_t>(b);
    }
    make_front<S>(set_.balls, nullptr, dims, by_group, &all_);
  }

  // Closes the gaps that owned blocks leave in a group.
  void compact(Group* group) {
    int32_t to = group->begin;
    for (int32_t from = to; from < group->end; ++from) {
      if (own_.alive[all_.ids[from]] == 0) continue;
      for (int d = 0; d < set_.dims; ++d) {
        S* row = all_.balls.centers.get() + d * all_.balls.row;
        row[to] = row[from];
      }
      all_.balls.radius[to] = all_.balls.radius[from];
      all_.ids[to++] = all_.ids[from];
    }
    group->end = to;
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
  Front<S> all_, near_;               // all_ by groups
  Balls<S> group_balls_;
  std::vector<Group> groups_;
  std::vector<int32_t> group_of_;  // by block
  std::vector<int32_t> near_groups_;
  std::vector<int32_t> found_;
  std::vector<double> origin_;
  std::vector<S> squared_;
  std::vector<double> clear_;        // of near_, see Scan
  double travelled_ = 0;             // by the ball since near_ was collected
  std::vector<int32_t> straddling_;  // entries of near_
  std::vector<Entry> in_order_;
  size_t cursor_ = 0;
  std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> shared_;
};

}  // namespace

template <class S>
Clusters peel(BlockSet<S>* set, const Options& options, Ownership* ownership, int threads) {
  return Peeler<S>(set, options, ownership, threads).run();
}

template Clusters peel(BlockSet<float>*, const Options&, Ownership*, int);
template Clusters peel(BlockSet<double>*, const Options&, Ownership*, int);

}  // namespace instembed::mean_shift
