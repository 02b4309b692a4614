// The certificate: clusters that are far from all else, whose trajectories need not be followed.
//
// If all points of a set M lie within h/2 of some centre, and no other point of the class within
// 1.5 h, then any two of M are within h of each other, and every other point is farther than h from
// each of them. So each point of M has the members M, moves to their mean, and stays: about the
// mean the same holds. The members of any point of such a set are the set, so one shift finds it,
// the mean is the centre to try, and where the test fails, it fails for all members of the ball
// alike: none is tried again.
//
// An attempt is two passes over the tiles by all blocks: the members of a point's ball, then the
// two balls about their mean. Both are tested so that rounding can only refuse.
#pragma once

#include "mean_shift/trajectories.cuh"

namespace instembed::mean_shift::device {

// Whether rounding errors of squares of distances near the bandwidth are relative to them.
template <class S>
__device__ bool keeps_squares(double bandwidth) {
  return sizeof(S) == sizeof(float) ? fits_float(bandwidth)
                                    : bandwidth >= 1e-140 && bandwidth <= 1e140;
}

template <class T, class S>
class Certificate {
 public:
  explicit __device__ Certificate(const Trajectories<T, S>& all)
      : all_(all), cloud_(all.cloud), group_(all.group) {}

  // Tries the points of the class, the first of which is given, in their order. Returns the most
  // shifts after the first that points of the thread need: 0 or 1.
  __device__ int32_t run(int64_t seed) {
    if (!keeps_squares<S>(all_.bandwidth())) return 0;
    bool moves = false;
    int credit = kCredit;
    for (; seed != INT64_MAX && credit > 0; ++attempts_) {
      const T* point = cloud_.point(seed);
      move_to([&](int d) { return static_cast<double>(point[d * cloud_.channel()]); });
      look_about(attempts_ == 0);
      const auto members = static_cast<int32_t>(group_.count());
      move_to([&](int d) { return group_.total(d) / static_cast<double>(members); });
      const bool holds = test(members);
      if (holds) moves = settle(members) || moves;
      credit += holds && members >= kTile ? 1 : -1;
      seed = group_.first().pixel;
      __syncthreads();  // all have read it, and the centre
    }
    return moves && all_.rules.max_iter > 0 ? 1 : 0;
  }

 private:
  // How many more attempts may fail than succeed. All blocks wait for each other in an attempt,
  // while a trajectory has a warp, so points without clusters are better followed; as are clusters
  // of a few points, which count as failures.
  static constexpr int kCredit = 8;

  __device__ uint32_t& open(int64_t tile) const { return all_.modes.open[cloud_.first + tile]; }
  __device__ uint32_t& found(int64_t tile) const {
    return all_.modes.found[(attempts_ & 1) * cloud_.all.row + cloud_.first + tile];
  }

  // The block's centre is `value(d)`. It lies where the first warp has its own.
  template <class Value>
  __device__ void move_to(Value&& value) const {
    for_channels(cloud_.channels, static_cast<int>(threadIdx.x), kThreads, [&](int d) {
      const double c = value(d);
      all_.shared.centers[d] = c;
      all_.shared.rounded[d] = static_cast<S>(c);
    });
    __syncthreads();
  }

  __device__ bool ball_of(double radius, DeviceBall<S>* ball) const {
    ball->center = all_.shared.centers;
    ball->rounded = all_.shared.rounded;
    return ball->prepare(radius, cloud_.channels);
  }

  // The members of the ball about a point, and their number and sum.
  __device__ void look_about(bool begins) const {
    DeviceBall<S> ball;
    ball_of(all_.bandwidth(), &ball);
    group_.template pass<true>([&](int64_t from, SharedPtr<double> sum, int* count, First*) {
      const Members members = find_members(cloud_, from, all_.label_class(), ball);
      const int64_t tile = from + lane_of_thread();
      if (tile < cloud_.tiles()) {
        const bool own = members.label_class == all_.label_class();
        const uint32_t before = !begins ? open(tile) : own ? members.active : 0;
        open(tile) = before & ~members.inside;
        found(tile) = members.inside;
      }
      if (!__any_sync(kAllLanes, members.inside != 0)) return;
      *count += __popc(members.inside);
      add_members(cloud_, from, members, sum);
    });
  }

  // Whether all members are certainly within h/2 of their mean and all others certainly beyond
  // 1.5 h. Also finds the first point that is open.
  __device__ bool test(int32_t members) const {
    // More than distances here and about any member are rounded by, however many channels fit.
    constexpr double margin = 1e-9;
    DeviceBall<S> ball;
    bool finite = ball_of(0.5 * (1 - margin) * all_.bandwidth(), &ball);
    const S core2 = ball.certain.inner2;
    finite = ball_of(1.5 * (1 + margin) * all_.bandwidth(), &ball) && finite;
    ball.certain.inner2 = core2;
    group_.template pass<false>([&](int64_t from, SharedPtr<double>, int* count, First* first) {
      const int lane = lane_of_thread();
      uint32_t own = 0;
      if (from + lane < cloud_.tiles()) {
        own = found(from + lane);
        meet_first(from + lane, {open(from + lane), all_.label_class()}, first);
      }
      const Members members = compare_boxes(cloud_, from, all_.label_class(), [&](int64_t tile) {
        return finite ? side_of(cloud_, tile, ball) : Side::outside;
      });
      uint32_t core = members.inside, near = members.inside;
      const auto visit = [&](int tile, uint32_t active, int64_t, S squared) {
        const uint32_t in = active & __ballot_sync(kAllLanes, squared <= core2);
        const uint32_t out = active & __ballot_sync(kAllLanes, squared > ball.certain.outer2);
        if (lane == tile) {
          core = in;
          near = active & ~out;
        }
      };
      for_cut_tiles(cloud_, from, members, ball, visit);
      *count += __popc(core & own) - __popc(near & ~own);
    });
    return group_.count() == members;
  }

  // All members end at the centre. Whether one of the thread's moves there.
  __device__ bool settle(int32_t members) const {
    bool moves = false;
    group_.for_pixels(cloud_.pixels, [&](int64_t i) {
      if (!(found(i / kTile) >> (i % kTile) & 1)) return;
      const T* point = cloud_.point(i);
      double moved2 = 0;
      for_channels(cloud_.channels, 0, 1, [&](int d) {
        const double c = all_.shared.centers[d];
        const double by = c - static_cast<double>(point[d * cloud_.channel()]);
        moved2 += by * by;
        all_.mean(i)[d] = c;
      });
      all_.count(i) = members;
      moves = moves || !all_.stays(moved2);
    });
    return moves;
  }

  const Trajectories<T, S>& all_;
  const Cloud<T, S>& cloud_;
  Group& group_;
  int attempts_ = 0;
};

}  // namespace instembed::mean_shift::device
