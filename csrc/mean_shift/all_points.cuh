// Mean shift from every point on the device, as scikit-learn defines it: one kernel.
//
// Clusters that are far from all else are settled by the certificate; the other trajectories are
// followed to their end, tile by tile of their seeds. Then modes are taken one after the other: the
// best that no better one suppresses.
#pragma once

#include "mean_shift/certificate.cuh"
#include "mean_shift/climb.cuh"
#include "mean_shift/instances.cuh"

namespace instembed::mean_shift::device {

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
  __device__ AllPoints(const Trajectories<T, S>& all, Instances<T, S>* instances)
      : all_(all), cloud_(all.cloud), group_(all.group), instances_(*instances) {}

  __device__ void run() {
    group_.for_pixels(cloud_.pixels, [&](int64_t i) { all_.count(i) = 0; });
    find_tiles(cloud_, &group_);
    while (!group_.first().none() && !instances_.overflow()) {
      const First first = group_.first();
      __syncthreads();  // the class before has been read
      if (threadIdx.x == 0) all_.shared.label_class[0] = first.label_class;
      __syncthreads();
      find_means(first.pixel);
      const int32_t kept = keep_modes();
      assign(kept);
      group_.wait();
      for (int32_t k = 0; k < kept && !instances_.overflow(); ++k) {
        const int32_t size = all_.modes.sizes[cloud_.start + k];
        // A mode may end without points: scikit-learn keeps it, and so does min_size = 1.
        const bool keep = all_.rules.min_size == 1 || size >= all_.rules.min_size;
        instances_.add(group_.block == 0, keep, size, all_.label_class(), mode(k));
      }
      next_class();
    }
  }

 private:
  __device__ const double* mode(int32_t k) const {
    return all_.mean(all_.modes.order[cloud_.start + k]);
  }

  // Where each trajectory of the class ends.
  __device__ void find_means(int64_t first) {
    need(Certificate<T, S>(all_).run(first));
    group_.wait();
    need(Climber<T, S>(all_).run());
    group_.wait();
  }

  // A trajectory of the thread took so many shifts after the first.
  __device__ void need(int32_t shifts) {
    shifts = reduce_warp(shifts, Most{});
    if (lane_of_thread() == 0 && shifts > 0) {
      atomicMax(reinterpret_cast<unsigned long long*>(instances_.out.iterations + instances_.image),
                static_cast<unsigned long long>(shifts));
    }
  }

  // Positive if the mean of a is above that of b, channel by channel; 0 if they are equal.
  __device__ int compare(int64_t a, int64_t b) const {
    for (int d = 0; d < cloud_.channels; ++d) {
      const double of_a = all_.mean(a)[d], of_b = all_.mean(b)[d];
      if (of_a != of_b) return of_a > of_b ? 1 : -1;
    }
    return 0;
  }

  // By (members, coordinates), descending, until none is left; returns how many are kept. Different
  // members may have the same mean: the count of the last such seed stands.
  __device__ int32_t keep_modes() {
    const double limit2 = all_.bandwidth() * all_.bandwidth();
    int32_t kept = 0;
    int64_t suppressor = -1;
    while (true) {
      const int64_t best = group_.best(
          cloud_.pixels,
          [&](int64_t i) {
            if (!all_.takes_part(i) || all_.count(i) <= 0) return false;
            if (suppressor >= 0 && squared_distance(all_.mean(i), 1, all_.mean(suppressor),
                                                    cloud_.channels) <= limit2) {
              all_.count(i) = -all_.count(i);
              return false;
            }
            return true;
          },
          [&](int64_t a, int64_t b) {
            if (all_.count(a) != all_.count(b)) return all_.count(a) > all_.count(b);
            const int order = compare(a, b);
            return order != 0 ? order > 0 : a > b;
          });
      suppressor = -1;
      if (best < 0) return kept;
      const int64_t last = group_.best(
          cloud_.pixels,
          [&](int64_t i) {
            return all_.takes_part(i) && all_.count(i) > 0 && compare(i, best) == 0;
          },
          [](int64_t a, int64_t b) { return a > b; });
      // Whoever is ahead may already have suppressed them, which changes the sign alone.
      const int32_t stands = abs(all_.count(last));
      if (stands == abs(all_.count(best))) {
        if (group_.block == 0 && threadIdx.x == 0) {
          all_.modes.order[cloud_.start + kept] = static_cast<int32_t>(best);
          all_.modes.sizes[cloud_.start + kept] = 0;
        }
        ++kept;
        suppressor = best;
        continue;
      }
      group_.wait();  // all have seen that they differ
      group_.for_pixels(cloud_.pixels, [&](int64_t i) {
        if (i != last && all_.takes_part(i) && all_.count(i) > 0 && compare(i, last) == 0)
          all_.count(i) = stands;
      });
    }
  }

  // Each point to the nearest mode, the first of equals, if that is within the bandwidth.
  __device__ void assign(int32_t kept) {
    const double limit2 = all_.bandwidth() * all_.bandwidth();
    group_.for_pixels(cloud_.pixels, [&](int64_t i) {
      if (!all_.takes_part(i)) return;
      int32_t nearest = -1;
      double least = 0;
      for (int32_t k = 0; k < kept; ++k) {
        const double squared =
            squared_distance(cloud_.point(i), cloud_.channel(), mode(k), cloud_.channels);
        if (nearest < 0 || squared < least) {
          nearest = k;
          least = squared;
        }
      }
      const bool near = nearest >= 0 && least <= limit2;
      instances_.give(i, near ? instances_.owners + nearest + 1 : kNobody);
      if (near) atomicAdd(all_.modes.sizes + cloud_.start + nearest, 1);
    });
  }

  __device__ void next_class() {
    group_.template pass<false>([&](int64_t from, SharedPtr<double>, int*, First* first) {
      const int64_t end = from + kChunk < cloud_.tiles() ? from + kChunk : cloud_.tiles();
      for (int64_t tile = from; tile < end; ++tile) {
        Left left{cloud_.active(tile),
                  cloud_.classified() ? cloud_.label_class(tile) : all_.label_class()};
        const uint32_t later = cloud_.classified() ? cloud_.later(tile) : 0;
        __syncwarp();  // all lanes have read
        if (left.active != 0 && left.label_class == all_.label_class()) {
          left = describe(cloud_, tile, 0u, later, all_.label_class());
        }
        meet_first(tile, left, first);
      }
    });
  }

  const Trajectories<T, S>& all_;
  const Cloud<T, S>& cloud_;
  Group& group_;
  Instances<T, S>& instances_;
};

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 1)
    all_points_kernel(Input<T> input, AllWork<S> work, Output out, Rules rules, int blocks) {
  INSTEMBED_SHARED(int64_t, numbers, Group::kNumbers + 1);
  INSTEMBED_SHARED(double, bandwidth, 1);
  if (threadIdx.x == 0) bandwidth[0] = rules.bandwidth;
  __syncthreads();
  DynamicShared shared;
  const int channels = input.channels;
  const SharedPtr<double> sums = shared.take<double>(kWarps * channels);
  const Group::Shared of_group{sums, shared.take<double>(channels), numbers};
  const typename Trajectories<T, S>::Shared of_points{sums, shared.take<double>(kWarps * channels),
                                                      shared.take<S>(kWarps * channels), bandwidth,
                                                      numbers + Group::kNumbers};
  Group group(work.exchange, of_group, channels, blocks);
  const int64_t groups = gridDim.x / blocks;
  for (int64_t image = group.index; image < input.images.images; image += groups) {
    const Cloud<T, S> cloud(input, work.tiles, image);
    Instances<T, S> instances{cloud, work.clusters, out, image};
    group.begin(cloud.tiles(), cloud.pixels);
    const Trajectories<T, S> all{cloud, rules, work.modes, of_points, group};
    AllPoints<T, S>(all, &instances).run();
    instances.finish(&group, true, rules.nearest, input.images.invalid);
  }
}

}  // namespace instembed::mean_shift::device
