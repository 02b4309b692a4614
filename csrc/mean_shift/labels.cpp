#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "mean_shift/groups.h"

namespace instembed::mean_shift {

NearestCenters::NearestCenters(const std::vector<double>& centers, int dims)
    : dims_(dims),
      count_(static_cast<int64_t>(centers.size()) / dims),
      rows_(centers),
      planar_(centers.size()) {
  for (int64_t k = 0; k < count_; ++k) {
    for (int d = 0; d < dims; ++d) planar_[d * count_ + k] = centers[k * dims + d];
  }
}

template <class S>
bool NearestCenters::block(const BlockSet<S>& set, int64_t b, double limit, int32_t* owners,
                           std::vector<double>* scratch) const {
  constexpr double kMargin = 1e-12;  // far above the error of a distance in double
  const Block<S>& block = set.blocks[b];
  owners[0] = 0;
  if (count_ == 0) return true;
  scratch->resize(count_ + dims_ + 2 * kMaxBlock);
  double* distance = scratch->data();
  double* center = distance + count_;
  double* best = center + dims_;
  double* squared = best + kMaxBlock;
  for (int d = 0; d < dims_; ++d) {
    center[d] = static_cast<double>(set.balls.centers[d * set.balls.row + b]);
  }
  squared_distances(planar_.data(), count_, count_, dims_, center, distance);
  const double radius = static_cast<double>(set.balls.radius[b]);
  const double least = std::sqrt(*std::min_element(distance, distance + count_));
  // A centre can be nearest to one of the points only if it is this near to the block's centre.
  const double reach = (std::min(least + radius, limit) + radius) * (1 + kMargin);
  int64_t candidates = 0, first = -1, last = -1;
  for (int64_t k = 0; k < count_; ++k) {
    if (distance[k] > reach * reach) continue;
    if (candidates++ == 0) first = k;
    last = k;
  }
  if (candidates == 0) return true;
  if (candidates == 1 && (std::sqrt(distance[last]) + radius) * (1 + kMargin) <= limit) {
    owners[0] = static_cast<int32_t>(last + 1);
    return true;
  }
  const double limit2 = limit * limit;
  std::fill(best, best + block.size, std::numeric_limits<double>::infinity());
  // Without a limit a point whose squared distances all overflow goes to the first.
  std::fill(owners, owners + block.size, std::isinf(limit) ? static_cast<int32_t>(first + 1) : 0);
  for (int64_t k = 0; k < count_; ++k) {
    if (distance[k] > reach * reach) continue;
    exact_distances(block, dims_, rows_.data() + k * dims_, squared);
    const auto owner = static_cast<int32_t>(k + 1);
    for (int32_t i = 0; i < block.size; ++i) {
      const bool nearer = squared[i] < best[i];
      best[i] = nearer ? squared[i] : best[i];
      owners[i] = nearer ? owner : owners[i];
    }
  }
  bool same = true;
  for (int32_t i = 0; i < block.size; ++i) {
    owners[i] = best[i] <= limit2 ? owners[i] : 0;
    same = same && owners[i] == owners[0];
  }
  return same;
}

template bool NearestCenters::block(const BlockSet<float>&, int64_t, double, int32_t*,
                                    std::vector<double>*) const;
template bool NearestCenters::block(const BlockSet<double>&, int64_t, double, int32_t*,
                                    std::vector<double>*) const;

template <class S>
void write_labels(const BlockSet<S>& set, const Ownership& ownership,
                  const std::vector<int64_t>& label_of_owner, const NearestCenters* nearest,
                  int64_t base, int64_t* labels, std::vector<int64_t>* counts, int threads) {
  const int64_t parts = std::clamp<int64_t>(set.size() / 64, 1, 64);
  std::vector<std::vector<int64_t>> part_counts(parts);
  parallel_for(parts, threads, [&](int64_t part) {
    std::vector<int64_t> found(counts->size(), 0);
    std::vector<double> scratch;
    int32_t near[kMaxBlock];
    int64_t point_labels[kMaxBlock];
    const int64_t end = set.size() * (part + 1) / parts;
    for (int64_t b = set.size() * part / parts; b < end; ++b) {
      const Block<S>& block = set.blocks[b];
      const int32_t* owners = ownership.of_points(b);
      bool same = owners == nullptr, leftovers = false;
      if (same) {
        point_labels[0] = label_of_owner[ownership.owner[b]];
        leftovers = point_labels[0] == 0;
      } else {
        for (int32_t i = 0; i < block.size; ++i) {
          point_labels[i] = label_of_owner[owners[i]];
          leftovers = leftovers || point_labels[i] == 0;
        }
      }
      if (leftovers && nearest != nullptr && nearest->size() > 0) {
        const bool one =
            nearest->block(set, b, std::numeric_limits<double>::infinity(), near, &scratch);
        if (same && !one) std::fill(point_labels, point_labels + block.size, int64_t{0});
        same = same && one;
        for (int32_t i = 0; i < (same ? 1 : block.size); ++i) {
          if (point_labels[i] == 0) point_labels[i] = base + near[one ? 0 : i];
        }
      }
      if (same) {
        if (point_labels[0] > 0) found[point_labels[0] - 1] += block.size;
        if (block.pixels == nullptr) {
          std::fill_n(labels + block.first, block.size, point_labels[0]);
        } else {
          for (int32_t i = 0; i < block.size; ++i) labels[block.pixels[i]] = point_labels[0];
        }
      } else {
        for (int32_t i = 0; i < block.size; ++i) {
          labels[block.pixel(i)] = point_labels[i];
          if (point_labels[i] > 0) ++found[point_labels[i] - 1];
        }
      }
    }
    part_counts[part] = std::move(found);
  });
  for (const auto& found : part_counts) {
    for (size_t k = 0; k < found.size(); ++k) (*counts)[k] += found[k];
  }
}

template void write_labels(const BlockSet<float>&, const Ownership&, const std::vector<int64_t>&,
                           const NearestCenters*, int64_t, int64_t*, std::vector<int64_t>*, int);
template void write_labels(const BlockSet<double>&, const Ownership&, const std::vector<int64_t>&,
                           const NearestCenters*, int64_t, int64_t*, std::vector<int64_t>*, int);

}  // namespace instembed::mean_shift
