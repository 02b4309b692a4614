// Intersections over unions of the masks of seeds with their instances, on CUDA.
//
// Bytes, for N pixels of D channels of T bytes, labels of L bytes, and S seeds: N (T D + L) from
// DRAM, and those of 8 channels, or of as many as it takes to rule a seed out, from the L1 for
// every 32 seeds. Flops: 3 N S D at most, 3 N S 8 where masks are small. 512 x 512, D = 64, 128
// seeds: 69 MB, 21 us at 3.3 TB/s; and 0.8 to 6.4 GFLOP, 13 to 110 us at 60 TFLOP/s. Memory: S (D +
// 2 T + 3) numbers an image.
//
// A warp takes 32 seeds and a part of the pixels; lane k keeps the counts of seed k in registers,
// and adds them to the image's when its pixels are done. The warps of a block mostly look at the
// same pixels. Counts are integers: their order does not matter.
#pragma once

#include "common/id_table.cuh"
#include "seeds/near.cuh"

namespace instembed::seeds {
namespace {

constexpr int kRadii = 8;  // in one pass

template <class A>
struct Radii {
  Radius<A> of[kRadii];
  int count = 0;
  A outer = -1;  // the largest
};

// The seeds that lie in an instance, of each image in no particular order. Rows have room for all.
template <class A>
struct LiveSeeds {
  A* values = nullptr;        // (images, seeds, row)
  int64_t* ids = nullptr;     // (images, seeds): of the instance
  int32_t* places = nullptr;  // (images, seeds): among all seeds
  Number* counts = nullptr;   // (images, seeds, 1 + 2 kRadii): the instance's pixels, those in the
                              // mask at each radius, those in both
  int32_t* found = nullptr;   // an image

  static constexpr int kCounts = 1 + 2 * kRadii;

  void take(Workspace* workspace, int64_t images, int64_t seeds, int channels) {
    values = workspace->take<A>(images * seeds * row_of(channels));
    ids = workspace->take<int64_t>(images * seeds);
    places = workspace->take<int32_t>(images * seeds);
    counts = workspace->take<Number>(images * seeds * kCounts);
    found = workspace->take<int32_t>(images);
  }
};

struct Labels {
  const void* data;
  DType type;
  Strides strides;
  DeviceRules rules;

  __device__ int64_t at(int64_t image, int64_t pixel) const {
    return load_id(data, type, image * strides.image + pixel * strides.pixel);
  }
};

// A warp takes a seed. The IoU of one that is no pixel becomes NaN.
template <class T, class A>
__global__ void __launch_bounds__(kThreads)
    find_live_kernel(Input<T> input, Labels labels, const int64_t* seeds, int64_t count,
                     LiveSeeds<A> live, A* iou, int64_t radii) {
  const int lane = lane_of_thread();
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_thread();
  if (k >= input.images * count) return;
  const int64_t image = k / count, pixel = seeds[k];
  if (pixel < 0 || pixel >= input.pixels) {
    if (pixel == -1) return;
    for (int64_t t = lane; t < radii; t += kWarp) iou[k * radii + t] = static_cast<A>(NAN);
    return;
  }
  const int64_t id = labels.at(image, pixel);
  if (labels.rules.is_background(id) || labels.rules.is_ignored(id)) return;
  int32_t slot = lane == 0 ? atomicAdd(live.found + image, 1) : 0;
  slot = __shfl_sync(kAllLanes, slot, 0);
  const int64_t row = image * count + slot;
  if (lane == 0) {
    live.ids[row] = id;
    live.places[row] = static_cast<int32_t>(k % count);
  }
  copy_row(input, image, pixel, live.values + row * row_of(input.channels));
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads, 2)
    count_kernel(Input<T> input, Labels labels, int64_t count, LiveSeeds<A> live, Radii<A> radii,
                 int64_t blocks) {
  const int lane = lane_of_thread();
  const int64_t image = blockIdx.x / blocks, warps = blocks * kWarps;
  const int64_t groups = input.groups();
  const int32_t found = live.found[image];
  const int64_t tiles = (found + kWarp - 1) / kWarp;
  if (tiles == 0) return;
  const int64_t share = warps / tiles;
  const int64_t parts = share < 1 ? 1 : share < groups ? share : groups;
  const int row = row_of(input.channels);
  for (int64_t item = blockIdx.x % blocks * kWarps + warp_of_thread(); item < tiles * parts;
       item += warps) {
    const int64_t first = image * count + item % tiles * kWarp, part = item / tiles;
    const int64_t left = found - item % tiles * kWarp;
    const int some = static_cast<int>(left < kWarp ? left : kWarp);
    const int64_t own_id = lane < some ? live.ids[first + lane] : 0;
    int32_t area = 0, members[kRadii] = {}, common[kRadii] = {};
    for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; ++group) {
      const int64_t i = group * kWarp + lane;
      const int64_t id = i < input.pixels ? labels.at(image, i) : 0;
      const bool there = i < input.pixels && !labels.rules.is_ignored(id);
      const Pixel<T, A> pixel(input, image, i, there);
      for (int k = 0; k < some; ++k) {
        const A* seed = live.values + (first + k) * row;
        const int64_t seed_id = __shfl_sync(kAllLanes, own_id, k);
        const unsigned same = __ballot_sync(kAllLanes, there && id == seed_id);
        if (lane == k) area += __popc(same);
        const A squared = pixel.squared(seed, radii.outer);
        if (!__any_sync(kAllLanes, squared <= radii.outer)) continue;
#pragma unroll
        for (int t = 0; t < kRadii; ++t) {
          if (t >= radii.count) break;
          const unsigned inside =
              __ballot_sync(kAllLanes, pixel.within(radii.of[t], squared, seed));
          if (lane == k) {
            members[t] += __popc(inside);
            common[t] += __popc(inside & same);
          }
        }
      }
    }
    if (lane >= some) continue;
    Number* const counts = live.counts + (first + lane) * LiveSeeds<A>::kCounts;
    atomicAdd(counts, static_cast<Number>(area));
#pragma unroll
    for (int t = 0; t < kRadii; ++t) {
      if (members[t] == 0) continue;
      atomicAdd(counts + 1 + t, static_cast<Number>(members[t]));
      atomicAdd(counts + 1 + kRadii + t, static_cast<Number>(common[t]));
    }
  }
}

// iou(images, seeds, stride), of which some radii from the first on are written.
template <class A>
__global__ void __launch_bounds__(kThreads)
    write_iou_kernel(LiveSeeds<A> live, int64_t images, int64_t count, int radii, A* iou,
                     int64_t stride) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= images * count || k % count >= live.found[k / count]) return;
  const Number* counts = live.counts + k * LiveSeeds<A>::kCounts;
  A* to = iou + (k / count * count + live.places[k]) * stride;
  for (int t = 0; t < radii; ++t) {
    const Number common = counts[1 + kRadii + t], united = counts[1 + t] + counts[0] - common;
    to[t] = static_cast<A>(static_cast<double>(common) / static_cast<double>(united));
  }
}

}  // namespace

int64_t mask_iou_cuda_workspace(const Array& embeddings, const Array& seeds) {
  return seeds_workspace<LiveSeeds>(embeddings, seeds);
}

void mask_iou_cuda(const Array& embeddings, const Array& labels, const Array& seeds,
                   const std::vector<double>& squared_radii, const LabelRules& rules,
                   const Array& iou, const Array& workspace, int64_t stream) {
  check_embeddings(embeddings);
  const int64_t images = embeddings.shape[0], pixels = embeddings.shape[2];
  expect(labels.ndim == 2 && labels.shape[0] == images && labels.shape[1] == pixels,
         "labels: expected the embeddings' shape without channels");
  check_seeds(seeds, images);
  const int64_t count = seeds.shape[1], radii = static_cast<int64_t>(squared_radii.size());
  expect_contiguous(iou, embeddings.dtype == DType::f64 ? DType::f64 : DType::f32,
                    seeds.size() * radii, "iou");
  expect_contiguous(workspace, DType::u8, workspace.size(), "workspace");
  const Stream queue = as_stream(stream);
  fill_bytes(iou.data, 0, iou.size() * item_size(iou.dtype), queue);
  if (seeds.size() == 0) return;
  const Labels device_labels{
      labels.data, labels.dtype, {labels.strides[0], 0, labels.strides[1]}, DeviceRules::of(rules)};
  dispatch_floating(embeddings.dtype, "embeddings", [&](auto element) {
    using T = decltype(element);
    using A = accumulator_t<T>;
    const auto input = Input<T>::of(embeddings, nullptr);
    const SeedsPlan<LiveSeeds<A>> plan(workspace.data, images, count, input.channels);
    expect(workspace.size() >= plan.bytes, "workspace: too small");
    const LiveSeeds<A>& live = plan.work;
    fill_bytes(live.found, 0, images * sizeof(int32_t), queue);
    launch(find_live_kernel<T, A>, "seed_mask_iou_find", (seeds.size() + kWarps - 1) / kWarps,
           kThreads, 0, queue, input, device_labels, seeds.as<const int64_t>(), count, live,
           iou.as<A>(), radii);
    if (pixels == 0) return;
    const int64_t groups = (pixels + kWarp - 1) / kWarp, tiles = (count + kWarp - 1) / kWarp;
    const int64_t blocks = blocks_an_image(images, (groups * tiles + kWarps - 1) / kWarps);
    for (int64_t from = 0; from < radii; from += kRadii) {
      Radii<A> some;
      for (; some.count < kRadii && from + some.count < radii; ++some.count) {
        const Radius<A> radius(squared_radii[from + some.count], input.channels);
        some.of[some.count] = radius;
        some.outer = std::max(some.outer, radius.outer);
      }
      fill_bytes(live.counts, 0, seeds.size() * LiveSeeds<A>::kCounts * sizeof(Number), queue);
      launch(count_kernel<T, A>, "seed_mask_iou", images * blocks, kThreads, 0, queue, input,
             device_labels, count, live, some, blocks);
      launch(write_iou_kernel<A>, "seed_mask_iou_write", (seeds.size() + kThreads - 1) / kThreads,
             kThreads, 0, queue, live, images, count, some.count, iou.as<A>() + from, radii);
    }
  });
}

}  // namespace instembed::seeds
