// Greedy choice of seeds on CUDA: one kernel, in which the blocks of an image wait for each other
// after each pass over its pixels.
//
// A pass is one seed's: it brings the distance of each pixel from its nearest seed up to date, its
// objective where that changed, and finds the largest objective, all at once. Bytes a pass, for N
// pixels of D channels of T bytes: N (T D + 16), from the L2 where it holds them, and 16 N of
// scratch memory. 512 x 1024, D = 8, float32: 25 MB, 5 us at 5.5 TB/s of an H100's L2, and what
// the waiting takes, which was never measured. Flops: 3 N D, and a few logarithms in double
// where a seed is the nearest so far. The CPU kernel looks at a few blocks of pixels a seed; here a
// look at all of them should cost little more than the waiting.
//
// A sum in A tells most pixels that a seed is not their nearest; the rest is in double, without
// fused multiply-adds, as on the CPU. Of equal objectives the lowest index wins, whatever the order
// in which they are met. Logarithms are the device's, which may differ from the CPU's in the last
// bit.
#pragma once

#include <cmath>

#include "common/numbers.cuh"
#include "seeds/near.cuh"

namespace instembed::seeds {
namespace {

constexpr double kTaken = -1;  // in place of a distance: no seed can be here

// A pixel and its objective.
struct Best {
  double value = -INFINITY;
  int64_t pixel = -1;

  __device__ void meet(double other, int64_t other_pixel) {
    if (other > value || (other == value && pixel >= 0 && other_pixel < pixel)) {
      value = other;
      pixel = other_pixel;
    }
  }
  __device__ void meet(const Best& other) {
    if (other.pixel >= 0) meet(other.value, other.pixel);
  }
};

__device__ __forceinline__ Best best_of_warp(Best best) {
#pragma unroll
  for (int other = kWarp / 2; other > 0; other /= 2) {
    const double value = __shfl_xor_sync(kAllLanes, best.value, other);
    const int64_t pixel = __shfl_xor_sync(kAllLanes, best.pixel, other);
    best.meet({value, pixel});
  }
  return best;
}

struct SelectWork {
  double* distances = nullptr;            // (images, pixels), squared, from the nearest seed
  double* objectives = nullptr;           // (images, pixels)
  double* values = nullptr;               // (2, groups, blocks): what each block found
  int64_t* found = nullptr;               // likewise
  unsigned long long* arrived = nullptr;  // a group

  void take(Workspace* workspace, int64_t images, int64_t pixels, const Crew& crew) {
    distances = workspace->take<double>(images * pixels);
    objectives = workspace->take<double>(images * pixels);
    values = workspace->take<double>(2 * crew.groups * crew.blocks);
    found = workspace->take<int64_t>(2 * crew.groups * crew.blocks);
    arrived = workspace->take<unsigned long long>(crew.groups);
  }
};

// Numbers of any floating type.
struct Seediness {
  const void* data;
  DType type;
  Strides strides;

  __device__ double at(int64_t image, int64_t pixel) const {
    return load_number(data, type, image * strides.image + pixel * strides.pixel);
  }
};

struct Chosen {
  int64_t* indices;  // (images, count)
  void* scores;      // double or float
  bool wide;
  int64_t count;

  __device__ void write(int64_t at, int64_t pixel, double score) const {
    indices[at] = pixel;
    if (wide) {
      static_cast<double*>(scores)[at] = score;
    } else {
      static_cast<float*>(scores)[at] = static_cast<float>(score);
    }
  }
};

// One image, as a block of its group sees it.
template <class T, class A>
struct Selector {
  const Input<T>& input;
  const Seediness& seediness;
  const Selection& rule;
  const int64_t image;
  double* const distances;
  double* const objectives;

  __device__ double objective(int64_t i, double distance) const {
    const double value = log(seediness.at(image, i));
    return rule.diversity > 0 ? value + rule.diversity * log(distance) : value;
  }

  // Whether a seed can be here, with no other so far; then the objective is the seediness.
  __device__ void open(int64_t i, Best* best) const {
    const double value = seediness.at(image, i);
    bool possible =
        value > 0 && value >= rule.min_seediness && value - value == 0 && input.counts(image, i);
    const T* pixel = input.at(image, i);
    for (int d = 0; d < input.channels && possible; ++d) {
      const A x = static_cast<A>(pixel[d * input.strides.channel]);
      possible = x - x == 0;
    }
    distances[i] = possible ? INFINITY : kTaken;
    objectives[i] = possible ? objective(i, INFINITY) : 0;
    if (possible) best->meet(value, i);
  }

  // There is one more seed.
  __device__ void approach(int64_t i, SharedPtr<A> seed, Best* best) const {
    double distance = distances[i], value = objectives[i];  // on their way at once
    if (!(distance > 0)) return;
    const T* pixel = input.at(image, i);
    A squared = 0;
#pragma unroll 8
    for (int d = 0; d < input.channels; ++d) {
      const A difference = static_cast<A>(pixel[d * input.strides.channel]) - seed[d];
      squared += difference * difference;
    }
    if (squared <= Radius<A>(distance, input.channels).outer) {
      const double exact =
          mean_shift::squared_distance(pixel, input.strides.channel, seed, input.channels);
      if (exact < distance) {
        distances[i] = distance = exact;
        if (!(distance > 0)) return;  // the seed itself, or its embedding again
        objectives[i] = value = objective(i, distance);
      }
    }
    best->meet(value, i);
  }
};

template <class T, class A>
__global__ void __launch_bounds__(kThreads, 2)
    select_kernel(Input<T> input, Seediness seediness, SelectWork work, Chosen chosen,
                  Selection rule, int blocks) {
  INSTEMBED_SHARED(double, values, kWarps + 1);  // of each warp, and the best of all blocks
  INSTEMBED_SHARED(int64_t, pixels, kWarps + 1);
  DynamicShared shared;
  const auto seed = shared.take<A>(input.channels);
  const int tid = static_cast<int>(threadIdx.x), lane = lane_of_thread(), warp = warp_of_thread();
  const int block = static_cast<int>(blockIdx.x) % blocks;
  const int64_t group = blockIdx.x / blocks, groups = gridDim.x / blocks;
  GroupBarrier barrier;
  int64_t phase = 0;  // blocks are at most one pass apart: what they found alternates between two

  // The best of all threads of the group, which all get to know it.
  const auto best_of_group = [&](Best best) {
    best = best_of_warp(best);
    if (lane == 0) {
      values[warp] = best.value;
      pixels[warp] = best.pixel;
    }
    __syncthreads();
    const int64_t place = (phase * groups + group) * blocks;
    if (tid == 0) {
      for (int w = 1; w < kWarps; ++w) best.meet({values[w], pixels[w]});
      work.values[place + block] = best.value;
      work.found[place + block] = best.pixel;
    }
    barrier.wait(work.arrived + group, blocks);
    phase ^= 1;
    if (warp == 0) {
      Best all;
      for (int b = lane; b < blocks; b += kWarp) {
        all.meet({work.values[place + b], work.found[place + b]});
      }
      all = best_of_warp(all);
      if (lane == 0) {
        values[kWarps] = all.value;
        pixels[kWarps] = all.pixel;
      }
    }
    __syncthreads();
    return Best{values[kWarps], pixels[kWarps]};
  };

  for (int64_t image = group; image < input.images; image += groups) {
    const Selector<T, A> selector{input,
                                  seediness,
                                  rule,
                                  image,
                                  work.distances + image * input.pixels,
                                  work.objectives + image * input.pixels};
    const auto pass = [&](auto&& visit) {
      Best best;
      for (int64_t i = int64_t{block} * kThreads + tid; i < input.pixels;
           i += int64_t{blocks} * kThreads) {
        visit(i, &best);
      }
      return best_of_group(best);
    };
    const int64_t first = image * chosen.count;
    int64_t k = 0;
    Best best = pass([&](int64_t i, Best* b) { selector.open(i, b); });
    while (k < chosen.count && best.pixel >= 0) {
      if (block == 0 && tid == 0) {
        chosen.write(first + k, best.pixel, seediness.at(image, best.pixel));
      }
      if (++k == chosen.count) break;
      const T* pixel = input.at(image, best.pixel);
      for (int d = tid; d < input.channels; d += kThreads) {
        seed[d] = static_cast<A>(pixel[d * input.strides.channel]);
      }
      __syncthreads();
      best = pass([&](int64_t i, Best* b) { selector.approach(i, seed, b); });
    }
    if (block != 0) continue;
    for (k += tid; k < chosen.count; k += kThreads) chosen.write(first + k, -1, 0);
  }
}

template <class T>
struct SelectPlan {
  using A = accumulator_t<T>;

  static auto kernel() { return select_kernel<T, A>; }

  SelectWork work;
  Crew crew;
  int64_t shared, bytes = 0;

  SelectPlan(void* base, int64_t images, int64_t pixels, int64_t channels)
      : shared(padded_bytes<A>(channels)) {
    crew = Crew::of(kernel(), "select_seeds", shared, images, pixels);
    Workspace workspace(base);
    work.take(&workspace, images, pixels, crew);
    bytes = workspace.used();
  }
};

}  // namespace

int64_t select_cuda_workspace(const Array& embeddings) {
  check_embeddings(embeddings);
  return dispatch_floating(embeddings.dtype, "embeddings", [&](auto element) {
    return SelectPlan<decltype(element)>(nullptr, embeddings.shape[0], embeddings.shape[2],
                                         embeddings.shape[1])
        .bytes;
  });
}

void select_cuda(const Array& embeddings, const Array& seediness, const Array* mask,
                 const Selection& selection, const Array& indices, const Array& scores,
                 const Array& workspace, int64_t stream) {
  check_embeddings(embeddings);
  const int64_t images = embeddings.shape[0], pixels = embeddings.shape[2];
  expect(seediness.ndim == 2 && seediness.shape[0] == images && seediness.shape[1] == pixels,
         "seediness: expected the embeddings' shape without channels");
  dispatch_floating(seediness.dtype, "seediness", [](auto) {});
  expect(indices.ndim == 2 && indices.shape[0] == images, "indices: expected (images, seeds)");
  expect_contiguous(indices, DType::i64, indices.size(), "indices");
  expect(scores.dtype == DType::f32 || scores.dtype == DType::f64,
         "scores: expected float32 or float64");
  expect_contiguous(scores, scores.dtype, indices.size(), "scores");
  expect_contiguous(workspace, DType::u8, workspace.size(), "workspace");
  if (indices.size() == 0) return;
  const Stream queue = as_stream(stream);
  dispatch_floating(embeddings.dtype, "embeddings", [&](auto element) {
    using T = decltype(element);
    const SelectPlan<T> plan(workspace.data, images, pixels, embeddings.shape[1]);
    expect(workspace.size() >= plan.bytes, "workspace: too small");
    fill_bytes(plan.work.arrived, 0, plan.crew.groups * 8, queue);
    launch_together(
        SelectPlan<T>::kernel(), "select_seeds", plan.crew.groups * plan.crew.blocks, kThreads,
        plan.shared, queue, Input<T>::of(embeddings, mask),
        Seediness{seediness.data, seediness.dtype, {seediness.strides[0], 0, seediness.strides[1]}},
        plan.work,
        Chosen{indices.as<int64_t>(), scores.data, scores.dtype == DType::f64, indices.shape[1]},
        selection, plan.crew.blocks);
  });
}

}  // namespace instembed::seeds
