// The blocks that share an image, and what they tell each other.
//
// An image is cut into parts of whole chunks, by its size alone; a part belongs to one block. After
// each pass over the tiles a block leaves the results of its parts in global memory; all blocks
// wait for each other; and each combines all parts in their order. So all blocks know the same, no
// float is added atomically, and the bits depend neither on the device nor on the other images.
// Results alternate between two places: nobody can be two passes ahead.
#pragma once

#include "common/group_barrier.cuh"
#include "mean_shift/tiles.cuh"

namespace instembed::mean_shift::device {

constexpr int kParts = 128;      // at most
constexpr int kChunksAPart = 8;  // at least, if there are several parts

struct Rules {
  double bandwidth = 1, tol = 1e-3;
  int64_t min_size = 1, max_iter = 300;
  bool nearest = false;
};

struct Output {
  int64_t* labels;
  void* centers;  // double or float
  bool wide;
  int64_t *counts, *instances, *iterations;
  int64_t capacity;
};

// Memory of the groups.
struct Exchange {
  unsigned long long* arrived = nullptr;  // a group
  double* sums = nullptr;                 // (groups, 2, sums of a pass, kParts)
  // (groups, 2, most_numbers): of a pass, (3, kParts) counts, classes and pixels; or each block's
  // best pixel.
  int64_t* numbers = nullptr;
  int64_t most_numbers = 0;

  void take(Workspace* workspace, int64_t groups, int64_t blocks, int64_t most_sums) {
    most_numbers = blocks > 3 * kParts ? blocks : 3 * kParts;
    arrived = workspace->take<unsigned long long>(groups);
    sums = workspace->take<double>(groups * 2 * most_sums * kParts);
    numbers = workspace->take<int64_t>(groups * 2 * most_numbers);
  }
};

inline __host__ __device__ int parts_of(int64_t pixels) {
  const int64_t chunks = (pixels + kTile * kChunk - 1) / (kTile * kChunk);
  const int64_t parts = (chunks + kChunksAPart - 1) / kChunksAPart;
  return static_cast<int>(parts < 1 ? 1 : parts > kParts ? kParts : parts);
}

// The point that comes first: by class, then by pixel.
struct First {
  int64_t label_class = INT64_MAX, pixel = INT64_MAX;  // none

  __device__ void meet(int64_t other_class, int64_t other_pixel) {
    if (other_class < label_class || (other_class == label_class && other_pixel < pixel)) {
      label_class = other_class;
      pixel = other_pixel;
    }
  }
  __device__ bool none() const { return pixel == INT64_MAX; }
};

__device__ __forceinline__ First reduce_warp(First first) {
#pragma unroll
  for (int other = kWarp / 2; other > 0; other /= 2) {
    const int64_t label_class = __shfl_xor_sync(kAllLanes, first.label_class, other);
    const int64_t pixel = __shfl_xor_sync(kAllLanes, first.pixel, other);
    first.meet(label_class, pixel);
  }
  return first;
}

class Group {
 public:
  // Shared memory of a block: what all its warps found, before it is a part's.
  struct Shared {
    SharedPtr<double> warp_sums;  // (kWarps, sums of a pass)
    SharedPtr<double> total;      // sums of a pass
    SharedPtr<int64_t> numbers;   // (3, kWarps), then the result's 3
  };
  static constexpr int kNumbers = 3 * kWarps + 3;

  __device__ Group(const Exchange& exchange, const Shared& shared, int most_sums, int blocks)
      : block(static_cast<int>(blockIdx.x) % blocks),
        blocks(blocks),
        index(static_cast<int>(blockIdx.x) / blocks),
        exchange_(exchange),
        shared_(shared),
        most_sums_(most_sums) {}

  // For the image that comes next.
  __device__ void begin(int64_t tiles, int64_t pixels) {
    chunks_ = static_cast<int>((tiles + kChunk - 1) / kChunk);
    parts_ = parts_of(pixels);
  }

  // visit(first tile, the warp's sum, &count, &first) for each chunk of the block, by a warp, whose
  // lanes count what is theirs. Then the image's `n` sums (if `with_sums`; as many as can be, if
  // it is not told), the count and the first point (if `with_first`) are known to all blocks, by
  // total(), count() and first().
  template <bool with_sums, bool with_first = !with_sums, class Visit>
  __device__ void pass(Visit&& visit) {
    pass<with_sums, with_first>(visit, most_sums_);
  }
  template <bool with_sums, bool with_first = !with_sums, class Visit>
  __device__ void pass(Visit&& visit, int n) {
    const int tid = static_cast<int>(threadIdx.x);
    const int lane = lane_of_thread(), warp = warp_of_thread();
    const SharedPtr<double> own = shared_.warp_sums + warp * n;
    const int64_t place = 2 * index + phase_;
    double* const sums = exchange_.sums + place * most_sums_ * kParts;
    int64_t* const numbers = exchange_.numbers + place * exchange_.most_numbers;
    for (int part = block; part < parts_; part += blocks) {
      if (with_sums) {
        for (int d = lane; d < n; d += kWarp) own[d] = 0.0;
        __syncwarp();
      }
      int count = 0;
      First first;
      for (int c = part + parts_ * warp; c < chunks_; c += parts_ * kWarps) {
        visit(int64_t{c} * kChunk, own, &count, &first);
      }
      count = reduce_warp(count, Sum{});
      if (with_first) first = reduce_warp(first);
      if (lane == 0) {
        shared_.numbers[warp] = int64_t{count};
        shared_.numbers[kWarps + warp] = first.label_class;
        shared_.numbers[2 * kWarps + warp] = first.pixel;
      }
      __syncthreads();
      if (with_sums) {
        for (int d = tid; d < n; d += kThreads) {
          double sum = 0;
#pragma unroll 4  // more would cost registers
          for (int w = 0; w < kWarps; ++w) sum += shared_.warp_sums[w * n + d];
          sums[d * kParts + part] = sum;
        }
      }
      if (tid == 0) {
        int64_t all = 0;
        First of_all;
        for (int w = 0; w < kWarps; ++w) {
          all += shared_.numbers[w];
          of_all.meet(shared_.numbers[kWarps + w], shared_.numbers[2 * kWarps + w]);
        }
        numbers[part] = all;
        numbers[kParts + part] = of_all.label_class;
        numbers[2 * kParts + part] = of_all.pixel;
      }
      __syncthreads();
    }
    wait();
    if (with_sums) {
      for (int d = warp; d < n; d += kWarps) {
        double sum = 0;
        for (int part = lane; part < parts_; part += kWarp) sum += sums[d * kParts + part];
        sum = warp_sum(sum);
        if (lane == 0) shared_.total[d] = sum;
      }
    }
    if (warp == kWarps - 1) {
      int64_t count = 0;
      First first;
      for (int part = lane; part < parts_; part += kWarp) {
        count += numbers[part];
        first.meet(numbers[kParts + part], numbers[2 * kParts + part]);
      }
      count = reduce_warp(count, Sum{});
      if (with_first) first = reduce_warp(first);
      if (lane == 0) {
        shared_.numbers[3 * kWarps] = count;
        shared_.numbers[3 * kWarps + 1] = first.label_class;
        shared_.numbers[3 * kWarps + 2] = first.pixel;
      }
    }
    __syncthreads();
    phase_ ^= 1;
  }

  // The best of the pixels for which take(pixel), by better(a, b), which never calls two equal; -1
  // if there is none. All blocks get the same.
  template <class Take, class Better>
  __device__ int64_t best(int64_t pixels, Take&& take, Better&& better) {
    const int lane = lane_of_thread(), warp = warp_of_thread();
    int64_t* const numbers = exchange_.numbers + (2 * index + phase_) * exchange_.most_numbers;
    const auto reduce = [&](int64_t mine) {
#pragma unroll
      for (int other = kWarp / 2; other > 0; other /= 2) {
        const int64_t theirs = __shfl_xor_sync(kAllLanes, mine, other);
        if (theirs >= 0 && (mine < 0 || better(theirs, mine))) mine = theirs;
      }
      return mine;
    };
    int64_t mine = -1;
    for_pixels(pixels, [&](int64_t i) {
      if (take(i) && (mine < 0 || better(i, mine))) mine = i;
    });
    __syncwarp();  // what take() changed is there for the other lanes
    mine = reduce(mine);
    if (lane == 0) shared_.numbers[warp] = mine;
    __syncthreads();
    if (warp == 0) {
      mine = reduce(lane < kWarps ? static_cast<int64_t>(shared_.numbers[lane]) : int64_t{-1});
      if (lane == 0) numbers[block] = mine;
    }
    wait();
    if (warp == kWarps - 1) {
      mine = -1;
      for (int k = lane; k < blocks; k += kWarp) {
        const int64_t theirs = numbers[k];
        if (theirs >= 0 && (mine < 0 || better(theirs, mine))) mine = theirs;
      }
      mine = reduce(mine);
      if (lane == 0) shared_.numbers[3 * kWarps] = mine;
    }
    __syncthreads();
    phase_ ^= 1;
    return shared_.numbers[3 * kWarps];
  }

  __device__ double total(int d) const { return shared_.total[d]; }
  __device__ void set_total(int d, double value) { shared_.total[d] = value; }
  __device__ int64_t count() const { return shared_.numbers[3 * kWarps]; }
  __device__ First first() const {
    return {shared_.numbers[3 * kWarps + 1], shared_.numbers[3 * kWarps + 2]};
  }

  // visit(pixel) for each pixel that the thread has here and in best(), which are not those of its
  // chunks: points that are few have many threads.
  template <class Visit>
  __device__ void for_pixels(int64_t pixels, Visit&& visit) {
    int64_t i = int64_t{block} * kThreads + threadIdx.x;
    for (; i < pixels; i += int64_t{blocks} * kThreads) visit(i);
  }

  __device__ void wait() { barrier_.wait(exchange_.arrived + index, blocks); }

  const int block, blocks, index;

 private:
  GroupBarrier barrier_;
  const Exchange& exchange_;
  Shared shared_;
  int most_sums_;
  int chunks_ = 0;
  int parts_ = 1;
  int phase_ = 0;
};

__device__ __forceinline__ void meet_first(int64_t tile, const Left& left, First* first) {
  if (left.active == 0) return;
  first->meet(left.label_class, tile * kTile + __ffs(static_cast<int>(left.active)) - 1);
}

// The first pass: describes all tiles, while the next is on its way, and finds the first point.
template <class T, class S>
__device__ __forceinline__ void find_tiles(const Cloud<T, S>& cloud, Group* group) {
  group->template pass<false>([&](int64_t from, SharedPtr<double>, int*, First* first) {
    const int64_t end = from + kChunk < cloud.tiles() ? from + kChunk : cloud.tiles();
    Pixel<T> next = read_pixel(cloud, from);
    for (int64_t tile = from; tile < end; ++tile) {
      const Pixel<T> pixel = next;
      if (tile + 1 < end) next = read_pixel(cloud, tile + 1);
      meet_first(tile, find_points(cloud, tile, pixel), first);
    }
  });
}

}  // namespace instembed::mean_shift::device
