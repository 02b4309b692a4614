// Trajectories that the certificate did not settle, followed to their end: a warp takes a tile of
// seeds, or a part of one where there are fewer tiles than warps.
//
// The first shift is made for the tile: boxes that lie in the ball of every seed have one sum and
// number for all of them, those outside of all are nothing, and each seed looks only into what is
// left. Where nothing is, all seeds of the tile have the same members, and go on as one. Others go
// on alone.
#pragma once

#include "mean_shift/trajectories.cuh"

namespace instembed::mean_shift::device {

template <class T, class S>
class Climber {
 public:
  explicit __device__ Climber(const Trajectories<T, S>& all)
      : all_(all), cloud_(all.cloud), sum_(all.shared.sums + warp_of_thread() * cloud_.channels) {
    ball_.center = all.shared.centers + warp_of_thread() * cloud_.channels;
    ball_.rounded = all.shared.rounded + warp_of_thread() * cloud_.channels;
  }

  // From every point of the class without a result. Returns the most shifts after the first that
  // one of the warp's needed.
  __device__ int32_t run() {
    const auto tiles = static_cast<uint32_t>(cloud_.tiles());
    const uint32_t warps = all_.group.blocks * kWarps;
    // Where there are more warps than tiles, 2^halvings of them share the seeds of a tile.
    int halvings = 0;
    while (halvings < 5 && tiles << (halvings + 1) <= warps) ++halvings;
    int32_t longest = 0;
    uint32_t k = all_.group.block * kWarps + warp_of_thread();
    for (; k < tiles << halvings; k += warps) {
      const int seeds = kTile >> halvings;
      const int from = static_cast<int>(k * seeds % kTile);
      climb(k >> halvings, kAllLanes >> (kTile - seeds) << from, &longest);
    }
    return longest;
  }

 private:
  __device__ void climb(uint32_t tile, uint32_t seeds, int32_t* longest) {
    const int lane = lane_of_thread();
    const uint32_t i = tile * kTile + lane;
    const bool seed =
        (seeds >> lane & 1) && i < cloud_.pixels && all_.takes_part(i) && all_.count(i) == 0;
    seeds = __ballot_sync(kAllLanes, seed);
    if (seeds == 0) return;
    if (seed) {
      for_channels(cloud_.channels, 0, 1, [&](int d) { all_.mean(i)[d] = 0; });
    }
    bool alike = true;
    const int32_t members = add_first(tile, seeds, &alike);
    bool moves = false;
    if (seed) {
      const T* point = cloud_.point(i);
      double moved2 = 0;
      for_channels(cloud_.channels, 0, 1, [&](int d) {
        const double c = (sum_[d] + all_.mean(i)[d]) / static_cast<double>(members);
        const double by = c - static_cast<double>(point[d * cloud_.channel()]);
        moved2 += by * by;
        all_.mean(i)[d] = c;
      });
      all_.count(i) = members;
      moves = all_.rules.max_iter > 0 && !all_.stays(moved2);
    }
    __syncwarp();  // the sum has been read
    for (uint32_t left = __ballot_sync(kAllLanes, moves); left != 0;) {
      const uint32_t next = tile * kTile + __ffs(static_cast<int>(left)) - 1;
      const uint32_t together = alike ? left : left & (0u - left);
      const int32_t shifts = follow(next);
      if (shifts > *longest) *longest = shifts;
      if ((together >> lane & 1) && i != next) {
        for_channels(cloud_.channels, 0, 1, [&](int d) { all_.mean(i)[d] = all_.mean(next)[d]; });
        all_.count(i) = all_.count(next);
      }
      left &= ~together;
    }
  }

  // The first shift of a tile's seeds. The lane learns how many members its seed has. Their sum is
  // sum_, of those that all seeds have, and the seed's mean, of others.
  __device__ int32_t add_first(uint32_t tile, uint32_t seeds, bool* alike) {
    const int lane = lane_of_thread();
    for_channels(cloud_.channels, lane, kWarp, [&](int d) { sum_[d] = 0.0; });
    __syncwarp();
    ball_.bandwidth2 = all_.bandwidth() * all_.bandwidth();
    ball_.set_certain(all_.bandwidth(), cloud_.channels, 0);
    const auto low = [&](int d) { return cloud_.low(d, tile); };
    const auto high = [&](int d) { return cloud_.high(d, tile); };
    int32_t common = 0, own = 0;
    const auto tiles = static_cast<int32_t>(cloud_.tiles());
    for (int32_t first = 0; first < tiles; first += kChunk) {
      const Members members = compare_boxes(cloud_, first, all_.label_class(), [&](int64_t other) {
        return side_of(cloud_, other, low, high, ball_.certain);
      });
      if (__any_sync(kAllLanes, members.whole)) {
        common += __popc(members.inside);
        add_members(cloud_, first, members, sum_);
      }
      const uint32_t cut = __ballot_sync(kAllLanes, members.cut);
      if (cut == 0) continue;
      *alike = false;
      for (uint32_t bits = seeds; bits; bits &= bits - 1) {
        const int k = __ffs(static_cast<int>(bits)) - 1;
        const int32_t found = add_own(tile * kTile + k, first, cut);
        if (lane == k) own += found;
      }
    }
    __syncwarp();  // the sums are complete
    return reduce_warp(common, Sum{}) + own;
  }

  // Adds the members of a seed's ball in those tiles of a chunk that are `among` to its mean.
  __device__ int32_t add_own(uint32_t seed, int32_t first, uint32_t among) {
    const T* point = cloud_.point(seed);
    move_to([&](int d) { return static_cast<double>(point[d * cloud_.channel()]); });
    const Members members = find_members(cloud_, first, all_.label_class(), ball_, among);
    const int32_t found = reduce_warp(static_cast<int32_t>(__popc(members.inside)), Sum{});
    if (found > 0) add_members(cloud_, first, members, all_.mean(seed));
    return found;
  }

  // The warp's centre is `value(d)`.
  template <class Value>
  __device__ void move_to(Value&& value) {
    for_channels(cloud_.channels, lane_of_thread(), kWarp, [&](int d) {
      const double c = value(d);
      ball_.center[d] = c;
      ball_.rounded[d] = static_cast<S>(c);
    });
    __syncwarp();
  }

  // Follows a trajectory from the mean that its first shift led to. Returns the shifts after that.
  __device__ int32_t follow(uint32_t i) {
    const int lane = lane_of_thread(), channels = cloud_.channels;
    move_to([&](int d) { return all_.mean(i)[d]; });
    int32_t members = 0, shift = 1;
    for (;; ++shift) {
      for_channels(channels, lane, kWarp, [&](int d) { sum_[d] = 0.0; });
      __syncwarp();
      members = ball_.prepare(all_.bandwidth(), channels) ? add_all() : 0;
      __syncwarp();  // the sum is complete
      if (members == 0) break;
      for_channels(channels, lane, kWarp, [&](int d) {
        sum_[d] = static_cast<double>(sum_[d]) / static_cast<double>(members);
      });
      __syncwarp();
      double moved2 = 0;
      for_channels(channels, 0, 1, [&](int d) {
        const double by = static_cast<double>(sum_[d]) - static_cast<double>(ball_.center[d]);
        moved2 += by * by;
      });
      __syncwarp();  // the centre has been read
      move_to([&](int d) -> double { return sum_[d]; });
      if (all_.stays(moved2) || shift == all_.rules.max_iter) break;
    }
    for_channels(channels, lane, kWarp, [&](int d) { all_.mean(i)[d] = ball_.center[d]; });
    if (lane == 0) all_.count(i) = members;
    __syncwarp();
    return shift;
  }

  // The members of the ball among all points: their number, and their sum.
  __device__ int32_t add_all() {
    int32_t found = 0;
    const auto tiles = static_cast<int32_t>(cloud_.tiles());
    for (int32_t first = 0; first < tiles; first += kChunk) {
      const Members members = find_members(cloud_, first, all_.label_class(), ball_);
      if (!__any_sync(kAllLanes, members.inside != 0)) continue;
      found += __popc(members.inside);
      add_members(cloud_, first, members, sum_);
    }
    return reduce_warp(found, Sum{});
  }

  const Trajectories<T, S>& all_;
  const Cloud<T, S>& cloud_;
  SharedPtr<double> sum_;
  DeviceBall<S> ball_;
};

}  // namespace instembed::mean_shift::device
