// Mean shift from every point on the device, as scikit-learn defines it: one kernel, a warp a
// trajectory.
//
// Every trajectory is followed to its end. What the CPU kernel saves beyond the boxes of tiles
// (trajectories that meet are one, blocks with the same members are one) is not done here: the work
// is points x shifts x tiles, of which most are settled by their boxes. Then modes are taken one
// after the other: the best that no better one suppresses.
#pragma once

#include "mean_shift/instances.cuh"

namespace instembed::mean_shift::device {

struct Modes {                // where the trajectory of each pixel of all images ended
  double* means = nullptr;    // (pixels, channels)
  int32_t* counts = nullptr;  // members; 0: none; negative once a better mode suppresses it
  int32_t* order = nullptr;   // pixels whose modes are kept, best first, image by image
  int32_t* sizes = nullptr;   // points that those get

  void take(Workspace* workspace, const Images& images, int64_t channels) {
    means = workspace->take<double>(images.total * channels);
    counts = workspace->take<int32_t>(images.total);
    order = workspace->take<int32_t>(images.total);
    sizes = workspace->take<int32_t>(images.total);
  }
};

template <class S>
struct AllWork {
  Tiles<S> tiles;
  Clusters clusters;
  Exchange exchange;
  Modes modes;
};

template <class T, class S>
class AllPoints {
 public:
  struct Shared {
    SharedPtr<double> sums, centers;  // (kWarps, channels)
    SharedPtr<S> rounded;             // (kWarps, channels)
    SharedPtr<int64_t> label_class;   // that is grouped; not in a register: they are all taken
  };

  __device__ AllPoints(const Cloud<T, S>& cloud, const Rules& rules, const Modes& modes,
                       const Shared& shared, Group* group, Instances<T, S>* instances)
      : cloud_(cloud),
        rules_(rules),
        modes_(modes),
        shared_(shared),
        group_(*group),
        instances_(*instances) {}

  __device__ void run() {
    find_tiles(cloud_, &group_);
    while (!group_.first().none() && !instances_.overflow()) {
      const int64_t lowest = group_.first().label_class;
      __syncthreads();  // the class before has been read
      if (threadIdx.x == 0) shared_.label_class[0] = lowest;
      __syncthreads();
      climb_all();
      group_.wait();
      const int32_t kept = keep_modes();
      assign(kept);
      group_.wait();
      for (int32_t k = 0; k < kept && !instances_.overflow(); ++k) {
        const int32_t size = modes_.sizes[cloud_.start + k];
        // A mode may end without points: scikit-learn keeps it, and so does min_size = 1.
        instances_.add(group_.block == 0, rules_.min_size == 1 || size >= rules_.min_size, size,
                       label_class(), mean(modes_.order[cloud_.start + k]));
      }
      next_class();
    }
  }

 private:
  __device__ const double* mean(int64_t i) const {
    return modes_.means + (cloud_.start + i) * cloud_.channels;
  }
  __device__ int64_t label_class() const { return shared_.label_class[0]; }
  __device__ int32_t& count(int64_t i) const { return modes_.counts[cloud_.start + i]; }
  // Whether a pixel is of the class that is grouped.
  __device__ bool takes_part(int64_t i) const {
    const int64_t tile = i / kTile;
    return (cloud_.active(tile) >> (i % kTile) & 1) &&
           (!cloud_.classified() || cloud_.label_class(tile) == label_class());
  }

  __device__ void climb_all() {
    int32_t longest = 0;
    const auto pixels = static_cast<uint32_t>(cloud_.pixels);  // below 2^31, so that i is too
    const uint32_t step = group_.blocks * kWarps;
    for (uint32_t i = group_.block * kWarps + warp_of_thread(); i < pixels; i += step) {
      if (!takes_part(i)) continue;
      const int32_t iterations = climb(i);
      longest = iterations > longest ? iterations : longest;
    }
    if (lane_of_thread() == 0 && longest > 0) {
      atomicMax(reinterpret_cast<unsigned long long*>(instances_.out.iterations + instances_.image),
                static_cast<unsigned long long>(longest));
    }
  }

  // Follows the trajectory from pixel i, by a warp. Returns the shifts after the first.
  __device__ int32_t climb(uint32_t i) {
    const int lane = lane_of_thread(), channels = cloud_.channels;
    const SharedPtr<double> sum = shared_.sums + warp_of_thread() * channels;
    DeviceBall<S> ball;
    ball.center = shared_.centers + warp_of_thread() * channels;
    ball.rounded = shared_.rounded + warp_of_thread() * channels;
    const T* point = cloud_.point(i);
    for (int d = lane; d < channels; d += kWarp) {
      const auto x = static_cast<double>(point[d * cloud_.channel()]);
      ball.center[d] = x;
      ball.rounded[d] = static_cast<S>(x);
    }
    int32_t members = 0, shift = 0;
    for (;; ++shift) {
      for (int d = lane; d < channels; d += kWarp) sum[d] = 0.0;
      __syncwarp();
      members = ball.prepare(rules_.bandwidth, channels) ? add_all(ball, sum) : 0;
      __syncwarp();  // the sum is complete
      if (members == 0) break;
      for (int d = lane; d < channels; d += kWarp) {
        sum[d] = static_cast<double>(sum[d]) / static_cast<double>(members);
      }
      __syncwarp();
      double moved = 0;
      for (int d = 0; d < channels; ++d) {
        const double by = static_cast<double>(sum[d]) - static_cast<double>(ball.center[d]);
        moved += by * by;
      }
      __syncwarp();  // the centre has been read
      for (int d = lane; d < channels; d += kWarp) {
        const double c = sum[d];
        ball.center[d] = c;
        ball.rounded[d] = static_cast<S>(c);
      }
      if (sqrt(moved) <= rules_.tol * rules_.bandwidth || shift == rules_.max_iter) break;
    }
    for (int d = lane; d < channels; d += kWarp) {
      modes_.means[(cloud_.start + i) * channels + d] = ball.center[d];
    }
    if (lane == 0) count(i) = members;
    __syncwarp();
    return shift;
  }

  // The members of a ball among all points: their number, and their sum.
  __device__ int32_t add_all(const DeviceBall<S>& ball, SharedPtr<double> sum) {
    int32_t found = 0;
    for (int64_t first = 0; first < cloud_.tiles(); first += kChunk) {
      const Members members = find_members(cloud_, first, label_class(), ball);
      if (!__any_sync(kAllLanes, members.inside != 0)) continue;
      found += __popc(members.inside);
      add_members(cloud_, first, members, sum);
    }
    return reduce_warp(found, Sum{});
  }

  // Positive if the mean of a is above that of b, channel by channel; 0 if they are equal.
  __device__ int compare(int64_t a, int64_t b) const {
    for (int d = 0; d < cloud_.channels; ++d) {
      if (mean(a)[d] != mean(b)[d]) return mean(a)[d] > mean(b)[d] ? 1 : -1;
    }
    return 0;
  }

  // By (members, coordinates), descending, until none is left; returns how many are kept. Different
  // members may have the same mean: the count of the last such seed stands.
  __device__ int32_t keep_modes() {
    const double limit2 = rules_.bandwidth * rules_.bandwidth;
    int32_t kept = 0;
    int64_t suppressor = -1;
    while (true) {
      const int64_t best = group_.best(
          cloud_.pixels,
          [&](int64_t i) {
            if (!takes_part(i) || count(i) <= 0) return false;
            if (suppressor >= 0 &&
                squared_distance(mean(i), 1, mean(suppressor), cloud_.channels) <= limit2) {
              count(i) = -count(i);
              return false;
            }
            return true;
          },
          [&](int64_t a, int64_t b) {
            if (count(a) != count(b)) return count(a) > count(b);
            const int order = compare(a, b);
            return order != 0 ? order > 0 : a > b;
          });
      suppressor = -1;
      if (best < 0) return kept;
      const int64_t last = group_.best(
          cloud_.pixels,
          [&](int64_t i) { return takes_part(i) && count(i) > 0 && compare(i, best) == 0; },
          [](int64_t a, int64_t b) { return a > b; });
      // Whoever is ahead may already have suppressed them, which changes the sign alone.
      const int32_t stands = abs(count(last));
      if (stands == abs(count(best))) {
        if (group_.block == 0 && threadIdx.x == 0) {
          modes_.order[cloud_.start + kept] = static_cast<int32_t>(best);
          modes_.sizes[cloud_.start + kept] = 0;
        }
        ++kept;
        suppressor = best;
        continue;
      }
      group_.wait();  // all have seen that they differ
      group_.for_pixels(cloud_.pixels, [&](int64_t i) {
        if (i != last && takes_part(i) && count(i) > 0 && compare(i, last) == 0) count(i) = stands;
      });
    }
  }

  // Each point to the nearest mode, the first of equals, if that is within the bandwidth.
  __device__ void assign(int32_t kept) {
    const double limit2 = rules_.bandwidth * rules_.bandwidth;
    group_.for_pixels(cloud_.pixels, [&](int64_t i) {
      if (!takes_part(i)) return;
      int32_t nearest = -1;
      double least = 0;
      for (int32_t k = 0; k < kept; ++k) {
        const double squared =
            squared_distance(cloud_.point(i), cloud_.channel(),
                             mean(modes_.order[cloud_.start + k]), cloud_.channels);
        if (nearest < 0 || squared < least) {
          nearest = k;
          least = squared;
        }
      }
      const bool near = nearest >= 0 && least <= limit2;
      instances_.give(i, near ? instances_.owners + nearest + 1 : kNobody);
      if (near) atomicAdd(modes_.sizes + cloud_.start + nearest, 1);
    });
  }

  __device__ void next_class() {
    group_.template pass<false>([&](int64_t from, SharedPtr<double>, int*, First* first) {
      const int64_t end = from + kChunk < cloud_.tiles() ? from + kChunk : cloud_.tiles();
      for (int64_t tile = from; tile < end; ++tile) {
        Left left{cloud_.active(tile),
                  cloud_.classified() ? cloud_.label_class(tile) : label_class()};
        const uint32_t later = cloud_.classified() ? cloud_.later(tile) : 0;
        __syncwarp();  // all lanes have read
        if (left.active != 0 && left.label_class == label_class()) {
          left = describe(cloud_, tile, 0u, later, label_class());
        }
        meet_first(tile, left, first);
      }
    });
  }

  const Cloud<T, S>& cloud_;
  const Rules& rules_;
  const Modes& modes_;
  Shared shared_;
  Group& group_;
  Instances<T, S>& instances_;
};

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 1)
    all_points_kernel(Input<T> input, AllWork<S> work, Output out, Rules rules, int blocks) {
  INSTEMBED_SHARED(int64_t, numbers, Group::kNumbers + 1);
  DynamicShared shared;
  const int channels = input.channels;
  const SharedPtr<double> sums = shared.take<double>(kWarps * channels);
  const Group::Shared of_group{sums, shared.take<double>(channels), numbers};
  const typename AllPoints<T, S>::Shared of_points{sums, shared.take<double>(kWarps * channels),
                                                   shared.take<S>(kWarps * channels),
                                                   numbers + Group::kNumbers};
  Group group(work.exchange, of_group, channels, blocks);
  const int64_t groups = gridDim.x / blocks;
  for (int64_t image = group.index; image < input.images.images; image += groups) {
    const Cloud<T, S> cloud(input, work.tiles, image);
    Instances<T, S> instances{cloud, work.clusters, out, image};
    group.begin(cloud.tiles(), cloud.pixels);
    AllPoints<T, S>(cloud, rules, work.modes, of_points, &group, &instances).run();
    instances.finish(&group, true, rules.nearest, input.images.invalid);
  }
}

}  // namespace instembed::mean_shift::device
