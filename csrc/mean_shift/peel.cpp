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
constexpr int64_t kParallelWork = 1 << 15;

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
        part_of_(set->size(), -1) {
    rest_.dims = set->dims;
    rest_.blocks = set->blocks;
    rest_.sums = std::move(set->sums);
    in_order_.resize(set_.size());
    for (int64_t b = 0; b < set_.size(); ++b) {
      in_order_[b] = {set_.blocks[b].first, static_cast<int32_t>(b)};
    }
    // The blocks of an image come in order, but for those of its stray points.
    const auto stray = std::is_sorted_until(in_order_.begin(), in_order_.end());
    std::sort(stray, in_order_.end());
    std::inplace_merge(in_order_.begin(), stray, in_order_.end());
    make_groups();
  }

  Clusters run() {
    std::vector<double> seed(set_.dims);
    for (int64_t b = next_block(); b >= 0; b = next_block()) {
      const Block<S>& block = rest_.blocks[b];
      for (int d = 0; d < set_.dims; ++d) {
        seed[d] = static_cast<double>(block.x[d * block.stride]);
      }
      climb(seed.data());
      const auto owner = static_cast<int32_t>(clusters_.size() + 1);
      int64_t claimed = claim(owner);
      clusters_.kept.push_back(claimed > 0 && claimed >= options_.min_size);
      if (claimed == 0) {  // rounding or overflow put the centre out of reach of every point
        mask_t<S> first[kMaxBlock] = {-1};
        own(b, first, 1, owner);
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
    const Block<S>& block = rest_.blocks[entry.second];
    return block.size != 0 && block.first == entry.first;
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
    scan.clear = clear_.data();
    scan.travelled = travelled_;
    const int64_t n = add_whole(rest_, near_, ball_, scan, &total_, straddling_.data());
    int64_t points = 0;
    for (int64_t k = 0; k < n; ++k) points += rest_.blocks[near_.ids[straddling_[k]]].size;
    const int64_t chunks = (n + kScanChunk - 1) / kScanChunk;
    while (static_cast<int64_t>(parts_.size()) < chunks) parts_.emplace_back(set_.dims);
    parallel_for(chunks, points * set_.dims >= kParallelWork ? threads_ : 1, [&](int64_t chunk) {
      parts_[chunk].clear();
      const int64_t begin = chunk * kScanChunk;
      add_straddling(rest_, near_, straddling_.data() + begin, std::min(n - begin, kScanChunk),
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
      const Block<S>& block = rest_.blocks[b];
      const S radius = near_.balls.radius[i];
      const S far = (ball_.outer + radius) * ball_.grow;
      const S near = ball_.inner - radius;
      if (squared_[i] > far * far || block.size == 0) continue;
      int inside = block.size;
      if (near >= 0 && squared_[i] <= near * near) {
        std::fill_n(mask, inside, mask_t<S>{-1});
      } else {
        inside = block_members(block, ball_, mask);
      }
      claimed += inside;
      if (inside != 0) own(b, mask, inside, owner);
    }
    return claimed;
  }

  // Gives the `inside` masked points of what is left of a block to `owner`. The others are copied
  // together, with a ball and a sum of their own: what is left of most blocks is a few points at
  // the border of an instance.
  void own(int64_t b, const mask_t<S>* mask, int inside, int32_t owner) {
    const Block<S>& whole = set_.blocks[b];
    const Block<S> block = rest_.blocks[b];
    const int32_t kept = block.size - inside;
    rest_.blocks[b].size = kept;
    if (kept == 0) --groups_[group_of_[b]].alive;
    if (inside == whole.size) {
      own_.owner[b] = owner;
      return;
    }
    if (own_.slot[b] < 0) {
      own_.slot[b] = static_cast<int64_t>(own_.points.size());
      own_.points.resize(own_.points.size() + whole.size, 0);
    }
    int32_t* owners = own_.points.data() + own_.slot[b];
    Part part{Buffer<S>(kept * set_.dims), Buffer<int64_t>(kept)};
    int32_t to = 0;
    for (int32_t i = 0, place = 0; i < block.size; ++i, ++place) {
      while (whole.pixel(place) != block.pixel(i)) ++place;
      if (mask[i]) {
        owners[place] = owner;
        continue;
      }
      part.pixels[to] = block.pixel(i);
      for (int d = 0; d < set_.dims; ++d) {
        part.points[d * kept + to] = block.x[d * block.stride + i];
      }
      ++to;
    }
    if (kept == 0) return;
    const Block<S> rest{part.points.get(), kept, part.pixels[0], part.pixels.get(), kept};
    if (rest.first != block.first) shared_.push({rest.first, static_cast<int32_t>(b)});
    std::vector<S> center(set_.dims);
    const int32_t entry = entry_of_[b];
    summarize(rest, set_.dims, center.data(), &all_.balls.radius[entry],
              rest_.sums.get() + b * set_.dims);
    for (int d = 0; d < set_.dims; ++d) {
      all_.balls.centers[d * all_.balls.row + entry] = center[d];
    }
    rest_.blocks[b] = rest;
    if (part_of_[b] < 0) {
      part_of_[b] = static_cast<int32_t>(left_.size());
      left_.push_back(std::move(part));
    } else {
      left_[part_of_[b]] = std::move(part);
    }
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
    entry_of_.resize(n);
    for (int32_t i = 0; i < entries; ++i) entry_of_[by_group[i]] = i;
  }

  // Closes the gaps that owned blocks leave in a group.
  void compact(Group* group) {
    int32_t to = group->begin;
    for (int32_t from = to; from < group->end; ++from) {
      const int32_t b = all_.ids[from];
      if (rest_.blocks[b].size == 0) continue;
      for (int d = 0; d < set_.dims; ++d) {
        S* row = all_.balls.centers.get() + d * all_.balls.row;
        row[to] = row[from];
      }
      all_.balls.radius[to] = all_.balls.radius[from];
      entry_of_[b] = to;
      all_.ids[to++] = b;
    }
    group->end = to;
  }

  struct Part {
    Buffer<S> points;
    Buffer<int64_t> pixels;
  };

  const BlockSet<S>& set_;
  BlockSet<S> rest_;  // blocks without the points that have an owner; only set_ has the balls
  const Options& options_;
  Ownership& own_;
  int threads_;
  Ball<S> ball_;
  Moments total_;
  std::vector<Moments> parts_;
  Clusters clusters_;
  std::vector<int32_t> part_of_;   // by block: into left_, -1 where none or all of it has owners
  std::vector<Part> left_;         // what is left of blocks
  Front<S> all_, near_;            // all_ by groups
  std::vector<int32_t> entry_of_;  // by block: into all_
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
