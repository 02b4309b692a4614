// Peeling on the device: one kernel, in which the blocks of an image wait for each other after each
// pass over its tiles. A pass reads the boxes of the tiles, from the L2, and the points of tiles
// that a sphere cuts.
//
// Clusters are found one after the other, each from the first point that those before left. A round
// guesses the seeds of several, moves their balls side by side, and proves in one more pass which
// of them, from the first on, are what one after the other would have found:
//   nobody before took a point that was a member in any of the ball's shifts, and
//   nobody before left a point that comes before the ball's seed, or that seed would not be next.
// Those are claimed. So the guess decides the speed alone, and the first ball always holds. Sums do
// not depend on who else is active (add_members()), so that the bits are the same, however many
// seeds a round has.
//
// A round is two shifts where they end at modes as in a trained embedding, the proof, and the
// claim, in which each chunk also names the next seeds, for the round after. A round of one seed
// needs no proof.
#pragma once

#include "mean_shift/instances.cuh"

namespace instembed::mean_shift::device {

constexpr int kSeeds = 8;       // of a round, at most, each with a warp
constexpr int kLeaders = 8;     // seeds that a chunk names, at most
constexpr int kWorthwhile = 4;  // seeds of a round that cost as much one after the other
constexpr int kLongPause = 63;  // rounds of one seed, after rounds that were not worthwhile
constexpr int kInVain = 2;      // looks for seeds, of kThreads chunks each, before it is given up
static_assert(kSeeds <= kWarps);

template <class S>
struct PeelWork {
  Tiles<S> tiles;
  Clusters clusters;
  Exchange exchange;
  uint32_t* visited = nullptr;  // (seeds, row of tiles): members in any shift of the round
  int32_t* leaders = nullptr;   // (chunks of all images, kLeaders): pixels, ascending, then -1
  S* places = nullptr;          // (chunks of all images, kLeaders, channels): their embeddings
  int seeds = 1;                // of a round, at most

  // Numbers that a pass adds up, at most.
  __host__ __device__ int64_t sums(int64_t channels) const { return seeds * (channels + 1); }
};

template <class T, class S>
class Peeler {
 public:
  // A row for each ball. What is the same for all threads is here for the registers' sake.
  struct Shared {
    SharedPtr<double> center;
    SharedPtr<S> rounded;
    SharedPtr<S> inner2, outer2;  // squared distances that are certain
    SharedPtr<int64_t> seed;      // pixel
    SharedPtr<int32_t> steps;     // shifts
    SharedPtr<int32_t> moving, finite;
    SharedPtr<int32_t> seen;         // by each warp
    SharedPtr<int32_t> plan;         // kPlan numbers
    SharedPtr<int64_t> label_class;  // of the round
  };

  __device__ Peeler(const Cloud<T, S>& cloud, const Rules& rules, const PeelWork<S>& work,
                    const Shared& shared, Group* group, Instances<T, S>* instances)
      : cloud_(cloud),
        rules_(rules),
        work_(work),
        shared_(shared),
        group_(*group),
        instances_(*instances) {}

  // Whether chunks name seeds in this claim, and whether they did in the one before; how many
  // rounds of one seed are to come, and how many were to come last.
  enum { kNamed, kNamedBefore, kRest, kPause, kPlan };

  __device__ void run() {
    // Nobody has named seeds. The pass below is a barrier.
    if (threadIdx.x < kPlan) shared_.plan[threadIdx.x] = 0;
    find_tiles(cloud_, &group_);
    while (!group_.first().none() && !instances_.overflow()) {
      const int balls = choose();
      climb(balls);
      const int sure = balls > 1 ? prove(balls) : 1;
      if (threadIdx.x == 0) plan(balls, sure);
      __syncthreads();
      claim(sure, false);
      // Rounding or overflow put the centre out of reach of every point: the seed is given up.
      const bool lost = group_.total(0) == 0;
      if (lost) claim(1, true);
      for (int k = 0; k < sure && !instances_.overflow(); ++k) {
        const auto claimed = static_cast<int64_t>(group_.total(k));
        if (group_.block == 0 && threadIdx.x == 0) {
          int64_t* longest = instances_.out.iterations + instances_.image;
          *longest = max(*longest, static_cast<int64_t>(shared_.steps[k]));
        }
        instances_.add(group_.block == 0, !lost && claimed >= rules_.min_size, claimed,
                       shared_.label_class[0], shared_.center + k * cloud_.channels);
      }
    }
  }

 private:
  // Whether the next round guesses, by one thread.
  __device__ void plan(int balls, int sure) {
    if (balls > 1) {
      const int longer = min(2 * shared_.plan[kPause] + 1, kLongPause);
      shared_.plan[kPause] = sure == balls || sure >= kWorthwhile ? 0 : longer;
      shared_.plan[kRest] = shared_.plan[kPause];
    } else if (shared_.plan[kRest] > 0) {
      shared_.plan[kRest] = shared_.plan[kRest] - 1;
    }
    shared_.plan[kNamedBefore] = shared_.plan[kNamed];
    shared_.plan[kNamed] = shared_.plan[kRest] == 0;
  }

  __device__ DeviceBall<S> ball(int k) const {
    DeviceBall<S> result;
    result.center = shared_.center + k * cloud_.channels;
    result.rounded = shared_.rounded + k * cloud_.channels;
    result.certain.inner2 = shared_.inner2[k];
    result.certain.outer2 = shared_.outer2[k];
    result.bandwidth2 = rules_.bandwidth * rules_.bandwidth;
    return result;
  }
  __device__ uint32_t& visited(int k, int64_t tile) const {
    return work_.visited[k * work_.tiles.row + cloud_.first + tile];
  }
  // Leader r of a chunk, among all.
  __device__ int64_t leader(int64_t chunk, int r) const {
    return (cloud_.first / kChunk + instances_.image + chunk) * kLeaders + r;
  }
  // The points of the round's class in the tile that the lane has.
  __device__ uint32_t asked(const Left& left) const {
    return left.label_class == shared_.label_class[0] ? left.active : 0;
  }
  // Adds the number of bits that the lanes of a warp have.
  __device__ static void tally(uint32_t bits, SharedPtr<double> sum, int i) {
    if (!__any_sync(kAllLanes, bits != 0)) return;
    const int count = reduce_warp(__popc(bits), Sum{});
    if (lane_of_thread() == 0) sum[i] += count;
  }

  // The seeds of the next round: the first point that nobody owns, and of those that the chunks
  // name the first ones that are farther than the bandwidth from all before, as well as float
  // tells. A thread has a chunk, and compares no more of its leaders than it must. Returns how
  // many.
  __device__ int choose() {
    const First first = group_.first();
    __syncthreads();  // the round before has been read
    if (threadIdx.x == 0) shared_.label_class[0] = first.label_class;
    put_seed(0, first.pixel);
    int balls = 1;
    if (!shared_.plan[kNamed]) return balls;
    const auto chunks = static_cast<int32_t>((cloud_.tiles() + kChunk - 1) / kChunk);
    auto from = static_cast<int32_t>(first.pixel / (kTile * kChunk));
    for (int vain = 0; from < chunks && balls < work_.seeds && vain < kInVain; from += kThreads) {
      const int32_t chunk = from + static_cast<int32_t>(threadIdx.x);
      int32_t own = chunk < chunks ? work_.leaders[leader(chunk, 0)] : -1;
      if (own >= 0 && cloud_.classified() &&  // a chunk names points of one class
          cloud_.label_class(own / kTile) != shared_.label_class[0]) {
        own = -1;
      }
      ++vain;
      for (int r = 0, compared = 0; balls < work_.seeds; vain = 0) {
        while (own >= 0 && compared < balls) {
          if (beyond(leader(chunk, r), compared)) {
            ++compared;
          } else {
            own = ++r < kLeaders ? work_.leaders[leader(chunk, r)] : -1;
            compared = 0;
          }
        }
        const int32_t next = first_of_block(own);
        if (next < 0) break;
        put_seed(balls++, next);
      }
    }
    return balls;
  }

  // Whether a leader is farther than the bandwidth from a seed.
  __device__ bool beyond(int64_t leader, int k) const {
    const S* const place = work_.places + leader * cloud_.channels;
    const SharedPtr<S> seed = shared_.rounded + k * cloud_.channels;
    S squared = 0;
#pragma unroll 4
    for (int d = 0; d < cloud_.channels; ++d) {
      const S difference = place[d] - seed[d];
      squared += difference * difference;
    }
    return squared > static_cast<S>(rules_.bandwidth * rules_.bandwidth);
  }

  __device__ void put_seed(int k, int64_t pixel) {
    const T* point = cloud_.point(pixel);
    for (int d = static_cast<int>(threadIdx.x); d < cloud_.channels; d += kThreads) {
      const T x = point[d * cloud_.channel()];
      shared_.center[k * cloud_.channels + d] = static_cast<double>(x);
      shared_.rounded[k * cloud_.channels + d] = static_cast<S>(x);
    }
    if (threadIdx.x == 0) shared_.seed[k] = pixel;
    __syncthreads();
  }

  // The pixel of the first thread that has one; -1 if none does.
  __device__ int32_t first_of_block(int32_t own) {
    const uint32_t votes = __ballot_sync(kAllLanes, own >= 0);
    own = __shfl_sync(kAllLanes, own, votes ? __ffs(static_cast<int>(votes)) - 1 : 0);
    if (lane_of_thread() == 0) shared_.seen[warp_of_thread()] = own;
    __syncthreads();
    int32_t first = -1;
    for (int w = kWarps - 1; w >= 0; --w) {
      const int32_t pixel = shared_.seen[w];
      if (pixel >= 0) first = pixel;
    }
    __syncthreads();
    return first;
  }

  // Moves the balls from their seeds to the modes above.
  __device__ void climb(int balls) {
    const int warp = warp_of_thread(), channels = cloud_.channels;
    if (warp < balls) settle(warp, 0, [&](int d) -> double { return shared_.center[d]; });
    __syncthreads();
    for (int32_t step = 0; step < rules_.max_iter && any_moving(balls); ++step) {
      group_.template pass<true>(
          [&](int64_t from, SharedPtr<double> sum, int*, First*) {
            const uint32_t points = asked(left_of(cloud_, from));
            if (!__any_sync(kAllLanes, points != 0)) return;
#pragma unroll 1
            for (int k = 0; k < balls; ++k) {
              if (!shared_.moving[k]) continue;
              const Members members = members_among(cloud_, from, points, ball(k));
              if (balls > 1 && points != 0) {
                uint32_t& seen = visited(k, from + lane_of_thread());
                seen = step == 0 ? members.inside : seen | members.inside;
              }
              if (!__any_sync(kAllLanes, members.inside != 0)) continue;
              add_members(cloud_, from, members, sum + k * (channels + 1));
              tally(members.inside, sum, k * (channels + 1) + channels);
            }
          },
          balls * (channels + 1));
      if (warp < balls && shared_.moving[warp]) {
        const int sums = warp * (channels + 1);
        const double count = group_.total(sums + channels);
        if (count > 0) {
          settle(warp, step + 1,
                 [&](int d) { return group_.total(sums + d - warp * channels) / count; });
        } else {
          __syncwarp();  // all have read it
          if (lane_of_thread() == 0) shared_.moving[warp] = 0;
        }
      }
      __syncthreads();
    }
  }

  __device__ bool any_moving(int balls) const {
#pragma unroll 1
    for (int k = 0; k < balls; ++k) {
      if (shared_.moving[k]) return true;
    }
    return false;
  }

  // Moves ball k to `value(d)`, d from k * channels on, by a warp. Sums are in the channels' order.
  template <class Value>
  __device__ void settle(int k, int32_t step, Value&& value) {
    const int lane = lane_of_thread(), channels = cloud_.channels;
    double moved2 = 0, error2 = 0;
    bool finite = true;
    for (int from = 0; from < channels; from += kWarp) {
      double by2 = 0, own2 = 0;
      if (from + lane < channels) {
        const int d = k * channels + from + lane;
        const double c = value(d), by = c - shared_.center[d];
        const S rounded = static_cast<S>(c);
        const double error = c - static_cast<double>(rounded);
        shared_.center[d] = c;
        shared_.rounded[d] = rounded;
        by2 = by * by;
        own2 = error * error;
        finite = finite && c - c == 0;
      }
      for (int d = 0; d < kWarp && from + d < channels; ++d) {
        if (step > 0) moved2 += __shfl_sync(kAllLanes, by2, d);
        if (sizeof(S) < sizeof(double)) error2 += __shfl_sync(kAllLanes, own2, d);
      }
    }
    finite = __all_sync(kAllLanes, finite);
    if (lane == 0) {
      const Certain<S> certain = certain_of<S>(channels, rules_.bandwidth, error2);
      const bool stays = step > 0 && sqrt(moved2) <= rules_.tol * rules_.bandwidth;
      shared_.inner2[k] = certain.inner2;
      shared_.outer2[k] = certain.outer2;
      shared_.finite[k] = finite ? 1 : 0;
      shared_.moving[k] = finite && !stays ? 1 : 0;
      shared_.steps[k] = step;
    }
  }

  // Returns how many balls, from the first on, claim what they would one after the other.
  __device__ int prove(int balls) {
    group_.template pass<true>(
        [&](int64_t from, SharedPtr<double> sum, int*, First*) {
          const uint32_t points = asked(left_of(cloud_, from));
          if (!__any_sync(kAllLanes, points != 0)) return;
          const int64_t tile = from + lane_of_thread();
          uint32_t open = points;  // that no ball before has
#pragma unroll 1
          for (int k = 0; k < balls; ++k) {
            if (!shared_.finite[k]) continue;
            const int64_t seed = shared_.seed[k] - tile * kTile;
            const uint32_t early = seed >= kTile ? ~0u : seed > 0 ? (1u << seed) - 1 : 0u;
            const uint32_t taken = points & ~open;
            uint32_t against = open & early;
            if (taken != 0 && shared_.steps[k] > 0) against |= taken & visited(k, tile);
            tally(against, sum, 2 * k);
            const uint32_t inside = members_among(cloud_, from, open, ball(k)).inside;
            tally(inside, sum, 2 * k + 1);
            open &= ~inside;
          }
        },
        2 * balls);
    int sure = 1;
    while (sure < balls && group_.total(2 * sure) == 0 && group_.total(2 * sure + 1) > 0) ++sure;
    return sure;
  }

  // Gives the active points of the round's class in each ball to the next owners, or the first seed
  // alone; finds how many those are, and the first point that is left.
  __device__ void claim(int balls, bool seed_alone) {
    const int lane = lane_of_thread();
    group_.template pass<true, true>(
        [&](int64_t from, SharedPtr<double> sum, int*, First* first) {
          Left left = left_of(cloud_, from);
          const uint32_t points = asked(left);
          uint32_t open = points;
#pragma unroll 1
          for (int k = 0; k < balls; ++k) {
            if (!__any_sync(kAllLanes, open != 0)) break;
            uint32_t inside = 0;
            if (seed_alone) {
              const int64_t seed = shared_.seed[k] - (from + lane) * kTile;
              if (seed >= 0 && seed < kTile) inside = 1u << seed;
            } else if (shared_.finite[k]) {
              inside = members_among(cloud_, from, open, ball(k)).inside;
            }
            tally(inside, sum, k);
            for (uint32_t bits = __ballot_sync(kAllLanes, inside != 0); bits; bits &= bits - 1) {
              const int tile = __ffs(static_cast<int>(bits)) - 1;
              if (__shfl_sync(kAllLanes, inside, tile) >> lane & 1) {
                instances_.give((from + tile) * kTile + lane, instances_.owners + 1 + k);
              }
            }
            open &= ~inside;
          }
          const uint32_t changed = __ballot_sync(kAllLanes, open != points);
          for (uint32_t bits = changed; bits; bits &= bits - 1) {
            const int k = __ffs(static_cast<int>(bits)) - 1;
            const uint32_t active = __shfl_sync(kAllLanes, open, k);
            const uint32_t later = cloud_.classified() ? cloud_.later(from + k) : 0;
            const Left now = describe(cloud_, from + k, active, later, shared_.label_class[0]);
            if (lane == k) left = now;
          }
          meet_first(from + lane, left, first);
          if (shared_.plan[kNamed] && (changed != 0 || !shared_.plan[kNamedBefore])) {
            name_leaders(from, left);
          }
        },
        balls);
  }

  // The seeds that a chunk names: the first point of its lowest class, and the first ones that are
  // farther than the bandwidth from all before.
  __device__ void name_leaders(int64_t from, const Left& left) {
    const int lane = lane_of_thread();
    const int64_t lowest =
        reduce_warp(left.active != 0 ? left.label_class : int64_t{INT64_MAX}, Least{});
    uint32_t open = left.label_class == lowest ? left.active : 0;
    int32_t own = -1;
    __syncwarp();  // the boxes are described
    for (int r = 0; r < kLeaders; ++r) {
      const uint32_t tiles = __ballot_sync(kAllLanes, open != 0);
      if (tiles == 0) break;
      const int tile = __ffs(static_cast<int>(tiles)) - 1;
      const uint32_t points = __shfl_sync(kAllLanes, open, tile);
      const int64_t pixel = (from + tile) * kTile + __ffs(static_cast<int>(points)) - 1;
      if (lane == r) own = static_cast<int32_t>(pixel);
      const PointBall<T, S> near(cloud_, pixel, rules_.bandwidth);
      S* const place = work_.places + leader(from / kChunk, r) * cloud_.channels;
      for_channels(cloud_.channels, lane, kWarp, [&](int d) { place[d] = near.rounded[d]; });
      open &= ~members_among(cloud_, from, open, near).inside;
    }
    if (lane < kLeaders) work_.leaders[leader(from / kChunk, lane)] = own;
  }

  const Cloud<T, S>& cloud_;
  const Rules& rules_;
  const PeelWork<S>& work_;
  Shared shared_;
  Group& group_;
  Instances<T, S>& instances_;
};

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 1)
    peel_kernel(Input<T> input, PeelWork<S> work, Output out, Rules rules, int blocks) {
  INSTEMBED_SHARED(int64_t, numbers, Group::kNumbers);
  INSTEMBED_SHARED(S, inner2, kSeeds);
  INSTEMBED_SHARED(S, outer2, kSeeds);
  INSTEMBED_SHARED(int64_t, seed, kSeeds);
  INSTEMBED_SHARED(int32_t, steps, kSeeds);
  INSTEMBED_SHARED(int32_t, moving, kSeeds);
  INSTEMBED_SHARED(int32_t, finite, kSeeds);
  INSTEMBED_SHARED(int32_t, seen, kWarps);
  INSTEMBED_SHARED(int32_t, plan, (Peeler<T, S>::kPlan));
  INSTEMBED_SHARED(int64_t, label_class, 1);
  DynamicShared shared;
  const int channels = input.channels, sums = static_cast<int>(work.sums(channels));
  const Group::Shared of_group{shared.take<double>(kWarps * sums), shared.take<double>(sums),
                               numbers};
  const typename Peeler<T, S>::Shared of_peeler{shared.take<double>(work.seeds * channels),
                                                shared.take<S>(work.seeds * channels),
                                                inner2,
                                                outer2,
                                                seed,
                                                steps,
                                                moving,
                                                finite,
                                                seen,
                                                plan,
                                                label_class};
  Group group(work.exchange, of_group, sums, blocks);
  const int groups = static_cast<int>(gridDim.x) / blocks;
  for (int64_t image = group.index; image < input.images.images; image += groups) {
    const Cloud<T, S> cloud(input, work.tiles, image);
    Instances<T, S> instances{cloud, work.clusters, out, image};
    group.begin(cloud.tiles(), cloud.pixels);
    Peeler<T, S>(cloud, rules, work, of_peeler, &group, &instances).run();
    instances.finish(&group, false, rules.nearest, input.images.invalid);
  }
}

}  // namespace instembed::mean_shift::device
