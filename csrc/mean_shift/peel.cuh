// Peeling on the device: one kernel, in which the blocks of an image wait for each other after each
// pass over its tiles.
//
// Three passes a cluster, if its first shift ends at the mode as in a trained embedding: two shifts
// and the claim, which also finds the next seed. A pass reads the boxes of the tiles, from the L2,
// and the points of tiles that the sphere cuts.
#pragma once

#include "mean_shift/instances.cuh"

namespace instembed::mean_shift::device {

template <class S>
struct PeelWork {
  Tiles<S> tiles;
  Clusters clusters;
  Exchange exchange;
};

template <class T, class S>
class Peeler {
 public:
  struct Shared {
    SharedPtr<double> center, next;
    SharedPtr<S> rounded;
    SharedPtr<int64_t>
        seed;  // class and pixel, like all here in shared memory for the registers' sake
  };

  __device__ Peeler(const Cloud<T, S>& cloud, const Rules& rules, const Shared& shared,
                    Group* group, Instances<T, S>* instances)
      : cloud_(cloud), rules_(rules), shared_(shared), group_(*group), instances_(*instances) {
    ball_.center = shared.center;
    ball_.rounded = shared.rounded;
  }

  __device__ void run() {
    find_tiles(cloud_, &group_);
    while (!group_.first().none() && !instances_.overflow()) {
      climb();
      const int32_t owner = instances_.owners + 1;
      int64_t claimed = 0;
      if (finite_) {
        claim(owner, false);
        claimed = group_.count();
      }
      const bool keep = claimed > 0 && claimed >= rules_.min_size;
      // Rounding or overflow put the centre out of reach of every point: the seed is given up.
      if (claimed == 0) claim(owner, true);
      instances_.add(group_.block == 0, keep, claimed, seed_class(), shared_.center);
    }
    if (group_.block == 0 && threadIdx.x == 0) {
      instances_.out.iterations[instances_.image] = longest_;
    }
  }

 private:
  // The centre is `value(d)`.
  template <class Value>
  __device__ void move_to(Value&& value) {
    for (int d = static_cast<int>(threadIdx.x); d < cloud_.channels; d += kThreads) {
      const double c = value(d);
      shared_.center[d] = c;
      shared_.rounded[d] = static_cast<S>(c);
    }
    __syncthreads();
    finite_ = ball_.prepare(rules_.bandwidth, cloud_.channels);
  }

  __device__ int64_t seed_class() const { return shared_.seed[0]; }
  __device__ int64_t seed_pixel() const { return shared_.seed[1]; }

  // Moves the ball from the first point that nobody owns to the mode above.
  __device__ void climb() {
    const First seed = group_.first();
    __syncthreads();  // the seed before has been read
    if (threadIdx.x == 0) {
      shared_.seed[0] = seed.label_class;
      shared_.seed[1] = seed.pixel;
    }
    const T* point = cloud_.point(seed.pixel);
    move_to([&](int d) { return static_cast<double>(point[d * cloud_.channel()]); });
    for (int32_t step = 0; step < rules_.max_iter && finite_; ++step) {
      group_.template pass<true>([&](int64_t from, SharedPtr<double> sum, int* count, First*) {
        const Members members = find_members(cloud_, from, seed_class(), ball_);
        if (!__any_sync(kAllLanes, members.inside != 0)) return;
        *count += __popc(members.inside);
        add_members(cloud_, from, members, sum);
      });
      const int64_t count = group_.count();
      if (count == 0) return;
      for (int d = static_cast<int>(threadIdx.x); d < cloud_.channels; d += kThreads) {
        shared_.next[d] = group_.total(d) / static_cast<double>(count);
      }
      __syncthreads();
      double moved = 0;
      for (int d = 0; d < cloud_.channels; ++d) {
        const double by = static_cast<double>(shared_.next[d]) - shared_.center[d];
        moved += by * by;
      }
      __syncthreads();  // the centre has been read
      if (step + 1 > longest_) longest_ = step + 1;
      move_to([&](int d) -> double { return shared_.next[d]; });
      if (sqrt(moved) <= rules_.tol * rules_.bandwidth) return;
    }
  }

  // Gives all active points of the seed's class in the ball to `owner`, or the seed alone; finds
  // how many those are, and the first point that is left.
  __device__ void claim(int32_t owner, bool seed_alone) {
    const int lane = lane_of_thread();
    group_.template pass<false>([&](int64_t from, SharedPtr<double>, int* count, First* first) {
      const Members members = seed_alone ? one_member(from, seed_pixel())
                                         : find_members(cloud_, from, seed_class(), ball_);
      Left left{members.active, members.label_class};
      *count += __popc(members.inside);
      for (uint32_t bits = __ballot_sync(kAllLanes, members.inside != 0); bits; bits &= bits - 1) {
        const int k = __ffs(static_cast<int>(bits)) - 1;
        const int64_t tile = from + k;
        const uint32_t inside = __shfl_sync(kAllLanes, members.inside, k);
        const uint32_t active = __shfl_sync(kAllLanes, members.active, k);
        if (inside >> lane & 1) instances_.give(tile * kTile + lane, owner);
        const uint32_t later = cloud_.classified() ? cloud_.later(tile) : 0;
        const Left now = describe(cloud_, tile, active & ~inside, later, seed_class());
        if (lane == k) left = now;
      }
      meet_first(from + lane, left, first);
    });
  }

  __device__ Members one_member(int64_t from, int64_t pixel) const {
    const int64_t tile = from + lane_of_thread();
    Members members;
    if (tile >= cloud_.tiles()) return members;
    members.active = cloud_.active(tile);
    members.label_class = cloud_.classified() ? cloud_.label_class(tile) : 1;
    if (tile == pixel / kTile) members.inside = 1u << (pixel % kTile);
    return members;
  }

  const Cloud<T, S>& cloud_;
  const Rules& rules_;
  Shared shared_;
  Group& group_;
  Instances<T, S>& instances_;
  DeviceBall<S> ball_;
  bool finite_ = true;
  int32_t longest_ = 0;  // shifts of one trajectory
};

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 1)
    peel_kernel(Input<T> input, PeelWork<S> work, Output out, Rules rules, int blocks) {
  INSTEMBED_SHARED(int64_t, numbers, Group::kNumbers + 2);
  DynamicShared shared;
  const int channels = input.channels;
  const Group::Shared of_group{shared.take<double>(kWarps * channels),
                               shared.take<double>(channels), numbers};
  const typename Peeler<T, S>::Shared of_peeler{
      shared.take<double>(channels), shared.take<double>(channels), shared.take<S>(channels),
      numbers + Group::kNumbers};
  Group group(work.exchange, of_group, channels, blocks);
  const int64_t groups = gridDim.x / blocks;
  for (int64_t image = group.index; image < input.images.images; image += groups) {
    const Cloud<T, S> cloud(input, work.tiles, image);
    Instances<T, S> instances{cloud, work.clusters, out, image};
    group.begin(cloud.tiles(), cloud.pixels);
    Peeler<T, S>(cloud, rules, of_peeler, &group, &instances).run();
    instances.finish(&group, false, rules.nearest, input.images.invalid);
  }
}

}  // namespace instembed::mean_shift::device
