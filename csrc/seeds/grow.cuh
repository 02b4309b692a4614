// Instances from seeds on CUDA.
//
// One pass over the pixels counts the masks of all seeds and their pairwise intersections; a block
// an image accepts seeds one after the other; and one more pass gives every pixel to the accepted
// seed that is most similar, with another if instances are given up. For N pixels of D
// channels of T bytes and S seeds that are N (2 T D + 8) bytes, 25 MB and 8 us at 3.3 TB/s for 512
// x 512, D = 8 and float32; at least 6 N S 8 flops, 1.3 GFLOP and 20 us at 60 TFLOP/s for 100
// seeds; and S steps of accepting, a quarter of a microsecond each (assumed). Memory: S^2 counters
// an image.
//
// A pixel's mask membership is a bit of a warp's word for each seed, which lives in shared memory
// until the pairs of the few seeds that have any are counted. Integers only: their order does not
// matter. Which seed is the nearest is decided in double, always.
#pragma once

#include "seeds/near.cuh"
#include "seeds/order.h"

namespace instembed::seeds {
namespace {

// The seeds of each image that are there, best first.
template <class A>
struct Candidates {
  A* values = nullptr;         // (images, seeds, row)
  Radius<A>* radii = nullptr;  // (images, seeds)
  int32_t* places = nullptr;   // (images, seeds): among all seeds
  int32_t* found = nullptr;    // an image
  int32_t* pairs = nullptr;    // (images, seeds, seeds): pixels in the masks of both, a <= b
  int32_t* chosen = nullptr;  // (images, 2, seeds): candidates that are accepted, and those of them
                              // that are not given up, ascending
  int32_t* sizes = nullptr;   // (images, 2, seeds): pixels that they own
  int32_t* kept = nullptr;    // (images, 2): how many are chosen

  void take(Workspace* workspace, int64_t images, int64_t seeds, int channels) {
    values = workspace->take<A>(images * seeds * row_of(channels));
    radii = workspace->take<Radius<A>>(images * seeds);
    places = workspace->take<int32_t>(images * seeds);
    found = workspace->take<int32_t>(images);
    pairs = workspace->take<int32_t>(images * seeds * seeds);
    chosen = workspace->take<int32_t>(images * 2 * seeds);
    sizes = workspace->take<int32_t>(images * 2 * seeds);
    kept = workspace->take<int32_t>(images * 2);
  }
};

struct Given {  // what a caller knows of seeds (images, count)
  const int64_t* pixels;
  const double *scores, *squared_radii;
  int64_t count;

  __device__ bool there(int64_t k, int64_t end) const { return pixels[k] >= 0 && pixels[k] < end; }
};

// A warp takes a seed: its rank is the number of those that are better, by score and then by place.
template <class T, class A>
__global__ void __launch_bounds__(kThreads)
    rank_seeds_kernel(Input<T> input, Given seeds, Candidates<A> candidates) {
  const int lane = lane_of_thread();
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_thread();
  if (k >= input.images * seeds.count || !seeds.there(k, input.pixels)) return;
  const int64_t image = k / seeds.count, first = image * seeds.count;
  const double score = seeds.scores[k];
  int32_t rank = 0;
  for (int64_t other = first + lane; other - lane < first + seeds.count; other += kWarp) {
    const bool better =
        other < first + seeds.count && seeds.there(other, input.pixels) &&
        (is_better(seeds.scores[other], score) ||
         (other < k && !is_better(score, seeds.scores[other])));  // each has a rank of its own
    rank += __popc(__ballot_sync(kAllLanes, better));
  }
  const int64_t row = first + rank;
  if (lane == 0) {
    candidates.places[row] = static_cast<int32_t>(k - first);
    candidates.radii[row] = Radius<A>(seeds.squared_radii[k], input.channels);
    atomicAdd(candidates.found + image, 1);
  }
  copy_row(input, image, seeds.pixels[k], candidates.values + row * row_of(input.channels));
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads, 2)
    count_pairs_kernel(Input<T> input, int64_t count, Candidates<A> candidates, int64_t blocks) {
  DynamicShared shared;
  const int lane = lane_of_thread();
  const auto words = shared.take<uint32_t>(static_cast<int>(kWarps * count)) +
                     warp_of_thread() * count;  // of the warp, a seed
  const int64_t image = blockIdx.x / blocks;
  const int32_t found = candidates.found[image];
  const int row = row_of(input.channels);
  for (int64_t group = blockIdx.x % blocks * kWarps + warp_of_thread(); group < input.groups();
       group += blocks * kWarps) {
    const int64_t i = group * kWarp + lane;
    const bool there = i < input.pixels && input.counts(image, i);
    if (!__any_sync(kAllLanes, there)) continue;
    const Pixel<T, A> pixel(input, image, i, there);
    __syncwarp();  // the words before have been read
    for (int32_t from = 0; from < found; from += kWarp) {
      uint32_t own = 0;
      for (int k = 0; k < kWarp && from + k < found; ++k) {
        const int64_t at = image * count + from + k;
        const A* seed = candidates.values + at * row;
        const Radius<A> radius = candidates.radii[at];
        const A squared = pixel.squared(seed, radius.outer);
        const uint32_t word = __ballot_sync(kAllLanes, pixel.within(radius, squared, seed));
        if (lane == k) own = word;
      }
      if (from + lane < found) words[from + lane] = own;
    }
    __syncwarp();
    for (int32_t from = 0; from < found; from += kWarp) {
      const uint32_t own = from + lane < found ? words[from + lane] : 0u;
      for (uint32_t bits = __ballot_sync(kAllLanes, own != 0); bits; bits &= bits - 1) {
        const int32_t a = from + __ffs(static_cast<int>(bits)) - 1;
        const uint32_t word = words[a];
        for (int32_t b = a + lane; b < found; b += kWarp) {
          const int both = __popc(word & words[b]);
          if (both) atomicAdd(candidates.pairs + (image * count + a) * count + b, both);
        }
      }
    }
  }
}

// In order: a candidate is accepted if its mask is large enough and does not share more than
// `overlap` of the smaller of two masks with one that was accepted. A block takes an image.
template <class A>
__global__ void __launch_bounds__(kThreads)
    accept_kernel(int64_t count, Candidates<A> candidates, Growth growth) {
  DynamicShared shared;
  const auto sizes = shared.take<int32_t>(static_cast<int>(count));   // of all masks
  const auto chosen = shared.take<int32_t>(static_cast<int>(count));  // the accepted
  const int64_t image = blockIdx.x;
  const auto tid = static_cast<int32_t>(threadIdx.x);
  const int32_t* pairs = candidates.pairs + image * count * count;
  const int32_t found = candidates.found[image];
  for (int32_t k = tid; k < found; k += kThreads) sizes[k] = pairs[k * count + k];
  __syncthreads();
  int32_t accepted = 0;
  for (int32_t k = 0; k < found; ++k) {
    const int32_t size = sizes[k];
    bool duplicate = false;
    for (int32_t j = tid; j < accepted; j += kThreads) {
      const int32_t other = chosen[j], theirs = sizes[other];
      const int32_t smaller = size < theirs ? size : theirs;
      duplicate = duplicate || !(static_cast<double>(pairs[other * count + k]) <=
                                 growth.overlap * static_cast<double>(smaller));
    }
    if (__syncthreads_or(duplicate) || size < growth.min_size) continue;
    if (tid == 0) chosen[accepted] = k;
    ++accepted;
    __syncthreads();
  }
  int32_t* const to = candidates.chosen + image * 2 * count;
  for (int32_t j = tid; j < accepted; j += kThreads) to[j] = chosen[j];
  if (tid == 0) candidates.kept[image * 2] = accepted;
}

// Labels: 1 + the most similar of the chosen in whose ball a pixel lies, the first of equals. Once
// for the accepted seeds, and once again if some of them are given up.
template <class T, class A>
__global__ void __launch_bounds__(kThreads, 2)
    assign_kernel(Input<T> input, int64_t count, Candidates<A> candidates, bool again,
                  int64_t* labels, int64_t blocks) {
  const int lane = lane_of_thread();
  const int64_t image = blockIdx.x / blocks, own = (image * 2 + (again ? 1 : 0)) * count;
  const int row = row_of(input.channels);
  const A* values = candidates.values + image * count * row;
  const Radius<A>* radii = candidates.radii + image * count;
  const int32_t* chosen = candidates.chosen + own;
  const int32_t n = candidates.kept[image * 2 + (again ? 1 : 0)];
  if (again && n == candidates.kept[image * 2]) return;
  const auto add = [&](int32_t owner, int pixels) {
    if (owner > 0 && pixels > 0) atomicAdd(candidates.sizes + own + owner - 1, pixels);
  };
  int32_t last = 0;  // the owner of the pixels before, of which so many have not been added yet
  int run = 0;
  const int64_t groups = input.groups(), warps = blocks * kWarps;
  const int64_t part = blockIdx.x % blocks * kWarps + warp_of_thread();
  for (int64_t group = groups * part / warps; group < groups * (part + 1) / warps; ++group) {
    const int64_t i = group * kWarp + lane;
    const Pixel<T, A> pixel(input, image, i, i < input.pixels && input.counts(image, i));
    int32_t owner = 0;
    double nearest = 0;
    for (int32_t k = 0; k < n; ++k) {
      const A* seed = values + int64_t{chosen[k]} * row;
      const Radius<A> radius = radii[chosen[k]];
      if (!(pixel.squared(seed, radius.outer) <= radius.outer)) continue;
      const double exact = pixel.exact(seed);
      if (exact <= radius.exact && (owner == 0 || exact < nearest)) {
        owner = k + 1;
        nearest = exact;
      }
    }
    if (i < input.pixels) labels[image * input.pixels + i] = owner;
    if (__all_sync(kAllLanes, owner == last)) {
      run += kWarp;
      continue;
    }
    if (lane == 0) add(last, run);
    last = __shfl_sync(kAllLanes, owner, kWarp - 1);
    run = 0;
    for (unsigned rest = __ballot_sync(kAllLanes, owner > 0); rest != 0;) {
      const int leader = __ffs(static_cast<int>(rest)) - 1;
      const unsigned same =
          __ballot_sync(kAllLanes, owner == __shfl_sync(kAllLanes, owner, leader));
      if (lane == leader) add(owner, __popc(same));
      rest &= ~same;
    }
  }
  if (lane == 0) add(last, run);
}

// What others took too much of is given up, and its pixels go to those: which only grow, so that
// nothing else will be. A warp takes an image.
template <class A>
__global__ void __launch_bounds__(kThreads)
    give_up_kernel(int64_t images, int64_t count, Candidates<A> candidates, int64_t min_size,
                   int64_t* instances) {
  const int lane = lane_of_thread();
  const int64_t image = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_thread();
  if (image >= images) return;
  const int32_t* chosen = candidates.chosen + image * 2 * count;
  const int32_t* sizes = candidates.sizes + image * 2 * count;
  const int32_t n = candidates.kept[image * 2];
  int32_t kept = 0;
  for (int32_t from = 0; from < n; from += kWarp) {
    const int32_t k = from + lane;
    const bool keep = k < n && sizes[k] >= min_size;
    const unsigned bits = __ballot_sync(kAllLanes, keep);
    if (keep) {
      candidates.chosen[(image * 2 + 1) * count + kept + __popc(bits & ((1u << lane) - 1))] =
          chosen[k];
    }
    kept += __popc(bits);
  }
  if (lane == 0) instances[image] = candidates.kept[image * 2 + 1] = kept;
}

// A thread takes a row of the outputs.
template <class A>
__global__ void __launch_bounds__(kThreads)
    write_instances_kernel(int64_t images, int64_t count, Candidates<A> candidates, int64_t* order,
                           int64_t* counts) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= images * count) return;
  const int64_t image = row / count, k = row % count;
  const int32_t n = candidates.kept[image * 2 + 1];
  const int64_t own = (image * 2 + (n < candidates.kept[image * 2] ? 1 : 0)) * count + k;
  order[row] = k < n ? int64_t{candidates.places[image * count + candidates.chosen[own]]} : -1;
  counts[row] = k < n ? candidates.sizes[own] : 0;
}

}  // namespace

int64_t grow_cuda_workspace(const Array& embeddings, const Array& seeds) {
  return seeds_workspace<Candidates>(embeddings, seeds);
}

void grow_cuda(const Array& embeddings, const Array* mask, const Array& seeds, const Array& scores,
               const Array& squared_radii, const Growth& growth, const Array& labels,
               const Array& order, const Array& counts, const Array& instances,
               const Array& workspace, int64_t stream) {
  check_embeddings(embeddings);
  const int64_t images = embeddings.shape[0], pixels = embeddings.shape[2];
  check_seeds(seeds, images);
  const int64_t count = seeds.shape[1];
  expect_contiguous(scores, DType::f64, seeds.size(), "scores");
  expect_contiguous(squared_radii, DType::f64, seeds.size(), "squared_radii");
  expect_contiguous(labels, DType::i64, images * pixels, "labels");
  expect_contiguous(order, DType::i64, seeds.size(), "order");
  expect_contiguous(counts, DType::i64, seeds.size(), "counts");
  expect_contiguous(instances, DType::i64, images, "instances");
  expect_contiguous(workspace, DType::u8, workspace.size(), "workspace");
  if (images == 0) return;
  const Stream queue = as_stream(stream);
  const int64_t shared = padded_bytes<uint32_t>(kWarps * count);
  expect(shared <= device_info().shared,
         "num_seeds: " + std::to_string(count) + " seeds are too many for this device");
  dispatch_floating(embeddings.dtype, "embeddings", [&](auto element) {
    using T = decltype(element);
    using A = accumulator_t<T>;
    const auto input = Input<T>::of(embeddings, mask);
    const SeedsPlan<Candidates<A>> plan(workspace.data, images, count, input.channels);
    expect(workspace.size() >= plan.bytes, "workspace: too small");
    const Candidates<A>& candidates = plan.work;
    fill_bytes(candidates.found, 0, images * sizeof(int32_t), queue);
    fill_bytes(candidates.pairs, 0, images * count * count * sizeof(int32_t), queue);
    fill_bytes(candidates.sizes, 0, images * 2 * count * sizeof(int32_t), queue);
    launch(rank_seeds_kernel<T, A>, "grow_seeds_rank", (seeds.size() + kWarps - 1) / kWarps,
           kThreads, 0, queue, input,
           Given{seeds.as<const int64_t>(), scores.as<const double>(),
                 squared_radii.as<const double>(), count},
           candidates);
    const int64_t blocks = blocks_an_image(images, (pixels + kThreads - 1) / kThreads);
    launch(count_pairs_kernel<T, A>, "grow_seeds_count", images * blocks, kThreads, shared, queue,
           input, count, candidates, blocks);
    launch(accept_kernel<A>, "grow_seeds_accept", images, kThreads,
           2 * padded_bytes<int32_t>(count), queue, count, candidates, growth);
    const auto assign = [&](bool again) {
      launch(assign_kernel<T, A>, "grow_seeds", images * blocks, kThreads, 0, queue, input, count,
             candidates, again, labels.as<int64_t>(), blocks);
    };
    assign(false);
    launch(give_up_kernel<A>, "grow_seeds_give_up", (images + kWarps - 1) / kWarps, kThreads, 0,
           queue, images, count, candidates, growth.min_size, instances.as<int64_t>());
    assign(true);
    launch(write_instances_kernel<A>, "grow_seeds_write", (seeds.size() + kThreads - 1) / kThreads,
           kThreads, 0, queue, images, count, candidates, order.as<int64_t>(),
           counts.as<int64_t>());
  });
}

}  // namespace instembed::seeds
