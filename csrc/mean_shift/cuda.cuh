// Mean-shift grouping on CUDA.
//
// For N pixels of D channels of T bytes, peeling moves
//   N (T D + 8)                  embeddings once from DRAM, labels filled with zeros
// + N / 32 (16 D + 16)           boxes and sums of the tiles, written
// + a pass: N / 32 (8 D + 4)     boxes of the tiles with points left, read, from the L2
//           + cut tiles, 32 T D each, and N / 32 / instances sums of whole ones
// + N 8                          labels, written as their pixels are claimed
// (in float32; with a class map its bytes and 8 a tile more). A frame of 1024 x 2048, D = 8,
// float32, all of it foreground: 67 + 17 + 9 + 17 MB, 0.033 ms at 3.3 TB/s, and at most 4.5 MB a
// pass, which is 1 us or less of the L2 of an H100 (5.5 TB/s) and shrinks as points are claimed.
// Flops: 6 D a tile and ball and 3 D a point of a cut tile and pass, which is little. So the time
// goes into waiting. A frame has 2048 chunks, and 128 blocks of 12 warps take them: a third of the
// warps have two, and most figures below are those of two.
//
// The first pass takes 43 tiles a warp, of which one is described (0.3 us) while the next is on its
// way (0.7 us from DRAM): 0.04 to 0.05 ms. One after the other 50 instances of a trained embedding
// then take 3 passes each (two shifts and the claim), 151 with the first. A round of up to 8 seeds
// (peel.cuh) takes 4, with the proof: 31 passes, counted in the simulator where all guesses hold;
// each instance whose guess fails ends a round, and costs one pass more than alone. A pass is a
// barrier of all blocks (assumed: 1 to 1.5 us on an H100), three dependent reads of the L2 a chunk
// (masks, boxes, points of two cut tiles at a time: 0.3 us each), the boxes again for each ball,
// from the L1 (0.15 us a ball and chunk), and the combination of 128 partial results (0.5 us; for 8
// balls each block reads 74 KB of them, 1.5 to 2 us for all): 6 to 8 us with 8 balls, 3 to 4 with
// one. To choose a seed, each block for itself, takes two reads of the L2 and three barriers of the
// block, 1 us; a look at the leaders of 384 chunks that finds none 1 us, and there are two of these
// at most, where seeds have run out. A chunk that has changed takes about 0.7 us a leader that it
// names. A round is 35 to 45 us, then, and all is 0.3 to 0.35 ms, where one seed at a time takes
// 0.5 to 0.6. A lane batch (8 x 256 x 512, 5 instances) has its images side by side, 16 blocks
// each, with less than a chunk a warp: 8 passes, 0.05 to 0.06 ms. Where points come in no order
// each ball cuts each tile: 67 MB a pass and ball in a frame, 0.02 ms and more, whether balls are
// moved one by one or together. Embeddings without clusters, where each of many points is one, stay
// slow.
//
// seeding="all" first looks for clusters that the certificate settles: two passes as above each,
// all active points in them, and 8 (D + 1) bytes a member, written: 50 instances take 0.3 to 0.4
// ms, and at most 8 attempts in vain more than others do. What is left goes tile by tile of its
// seeds, or by parts of tiles where those are fewer than warps: a first shift of N / 32 boxes (6 D
// flops) for each of up to 32 warps that share a tile, and of the points of tiles that the box of
// the seeds does not settle, a seed; then, for each trajectory, or one a tile where its seeds have
// the same members, the same a shift. 20,000 points in 8-D that are not certified, with 3 shifts:
// at most 0.3 G channels of boxes, 2 GFLOP and 2.4 GB, half a millisecond if all of it came from
// the L2, and a 32nd of that where points come in tiles of one cluster; cut tiles, of clusters that
// touch or points in no useful order, can cost 32 times as much. Then two looks at all points a
// mode, 2 to 3 us each, and N x modes distances. Trajectories of different tiles that meet are not
// merged, unlike on the CPU.
//
// All this is reasoned, not measured: the kernels have never run on a GPU.
//
// Membership is what the CPU kernel computes: tests in float that are certain, and double near the
// border, without fused multiply-adds (CMakeLists.txt). Sums are in double, in an order that the
// image's size and who is a member decide, and not how many seeds the device has room for.
#pragma once

#include <algorithm>
#include <cmath>

#include "mean_shift/all_points.cuh"
#include "mean_shift/cuda.h"
#include "mean_shift/peel.cuh"

namespace instembed::mean_shift {
namespace {

using namespace device;

// Tests of points: see Tiles.
template <class T>
using test_t = accumulator_t<T>;

constexpr int64_t kFixedShared = 1024;  // bytes of shared memory of a constant size, at most

// What a launch of either kernel needs.
template <class Work>
struct Plan {
  Work work;
  int64_t* invalid = nullptr;
  int blocks = 1;  // a group, which takes an image at a time
  int64_t groups = 1;
  int64_t shared = 0;
  int64_t bytes = 0;

  template <class Kernel>
  void share(Kernel kernel, const Images& images, int64_t channels, int64_t most_blocks) {
    const DeviceInfo device = device_info();
    if (shared + kFixedShared > device.shared) {
      throw std::invalid_argument(
          "embeddings: " + std::to_string(channels) +
          " channels are too many for this device: " + std::to_string(shared + kFixedShared) +
          " bytes of shared memory of " + std::to_string(device.shared));
    }
    const int64_t most = most_together(kernel, "mean_shift", kThreads, shared);
    if (most == 0) throw std::runtime_error("mean_shift: the device has no room for a block");
    const int64_t count = std::max<int64_t>(images.images, 1);
    blocks =
        static_cast<int>(std::clamp<int64_t>(most / count, 1, std::max<int64_t>(most_blocks, 1)));
    groups = std::min(count, most / blocks);
  }

  void take(Workspace* workspace, const Images& images, int64_t channels, bool classified,
            int64_t capacity, int64_t most_sums) {
    work.exchange.take(workspace, groups, blocks, most_sums);  // first: a test counts who arrived
    work.tiles.take(workspace, images, channels, classified);
    work.clusters.take(workspace, images, channels, capacity);
    invalid = workspace->take<int64_t>(1);
  }
};

template <class T>
struct PeelPlan : Plan<PeelWork<test_t<T>>> {
  static auto kernel() { return peel_kernel<T, test_t<T>>; }

  PeelPlan(void* base, const Images& images, int64_t channels, bool classified, int64_t capacity) {
    auto& work = this->work;
    // As many seeds at a time as the device has room for.
    for (work.seeds = kSeeds;; work.seeds /= 2) {
      const int64_t sums = work.sums(channels), centers = work.seeds * channels;
      this->shared = padded_bytes<double>(kWarps * sums) + padded_bytes<double>(sums) +
                     padded_bytes<double>(centers) + padded_bytes<test_t<T>>(centers);
      if (work.seeds == 1 || this->shared + kFixedShared <= device_info().shared) break;
    }
    this->share(kernel(), images, channels,
                parts_of(images.offsets ? images.total : images.pixels));
    Workspace workspace(base);
    this->take(&workspace, images, channels, classified, capacity, work.sums(channels));
    work.visited = workspace.take<uint32_t>(work.seeds * work.tiles.row);
    const int64_t leaders = (work.tiles.row / kChunk + images.images) * kLeaders;
    work.leaders = workspace.take<int32_t>(leaders);
    work.places = workspace.take<test_t<T>>(leaders * channels);
    this->bytes = workspace.used();
  }
};

template <class T>
struct AllPlan : Plan<AllWork<test_t<T>>> {
  static auto kernel() { return all_points_kernel<T, test_t<T>>; }

  AllPlan(void* base, const Images& images, int64_t channels, bool classified, int64_t capacity) {
    this->shared = 2 * padded_bytes<double>(kWarps * channels) + padded_bytes<double>(channels) +
                   padded_bytes<test_t<T>>(kWarps * channels);
    const int64_t pixels = images.offsets ? images.total : images.pixels;
    this->share(kernel(), images, channels, (pixels + kWarps - 1) / kWarps);
    Workspace workspace(base);
    this->take(&workspace, images, channels, classified, capacity, channels);
    this->work.modes.take(&workspace, images, channels, this->work.tiles.row);
    this->bytes = workspace.used();
  }
};

// f(plan type) for the seeding.
template <class T, class F>
void with_plan(Seeding seeding, F&& f) {
  if (seeding == Seeding::peel) {
    f(static_cast<PeelPlan<T>*>(nullptr));
  } else {
    f(static_cast<AllPlan<T>*>(nullptr));
  }
}

}  // namespace

int64_t cuda_workspace(const Array& embeddings, const Array* mask, const Array* offsets,
                       const Options& options, int64_t capacity) {
  expect(embeddings.ndim == 3, "embeddings: expected (images, channels, pixels)");
  const Images images = Images::of(embeddings, offsets, nullptr);
  int64_t bytes = 0;
  dispatch_floating(embeddings.dtype, "embeddings", [&](auto element) {
    with_plan<decltype(element)>(options.seeding, [&](auto* kind) {
      using PlanOf = std::remove_pointer_t<decltype(kind)>;
      bytes = PlanOf(nullptr, images, embeddings.shape[1], mask != nullptr, capacity).bytes;
    });
  });
  return bytes;
}

void group_cuda(const Array& embeddings, const Array* mask, const Array* offsets,
                const Options& options, const CudaOutput& output, const Array& workspace,
                int64_t stream) {
  expect(embeddings.ndim == 3, "embeddings: expected (images, channels, pixels)");
  expect(std::isfinite(options.bandwidth) && options.bandwidth > 0,
         "bandwidth: expected a positive number");
  const Images images = Images::of(embeddings, offsets, nullptr);
  const int64_t channels = embeddings.shape[1], rows = embeddings.shape[0];
  if (mask) {
    expect(mask->ndim == 2 && mask->shape[0] == rows && mask->shape[1] == embeddings.shape[2],
           "mask: expected the embeddings' shape without channels");
  }
  expect((offsets ? images.total : images.pixels) <= INT32_MAX,
         "embeddings: expected fewer than 2^31 pixels an image");
  const Array& centers = output.centers;
  expect(centers.ndim == 3 && centers.shape[0] == images.images && centers.shape[2] == channels,
         "centers: expected (images, capacity, channels)");
  expect(centers.dtype == DType::f32 || centers.dtype == DType::f64,
         "centers: expected float32 or float64");
  const int64_t capacity = centers.shape[1];
  expect_contiguous(centers, centers.dtype, images.images * capacity * channels, "centers");
  expect_contiguous(output.labels, DType::i64, images.total, "labels");
  expect_contiguous(output.counts, DType::i64, images.images * capacity, "counts");
  expect_contiguous(output.instances, DType::i64, images.images, "instances");
  expect_contiguous(output.iterations, DType::i64, images.images, "iterations");
  expect_contiguous(workspace, DType::u8, workspace.size(), "workspace");

  const Stream queue = as_stream(stream);
  fill_bytes(output.labels.data, 0, images.total * 8, queue);
  if (images.images == 0) return;
  fill_bytes(centers.data, 0, centers.size() * item_size(centers.dtype), queue);
  fill_bytes(output.counts.data, 0, output.counts.size() * 8, queue);
  fill_bytes(output.iterations.data, 0, images.images * 8, queue);

  dispatch_floating(embeddings.dtype, "embeddings", [&](auto element) {
    using T = decltype(element);
    Input<T> input{embeddings.as<const T>(),
                   {embeddings.strides[0], embeddings.strides[1], embeddings.strides[2]},
                   nullptr,
                   DType::u8,
                   {},
                   images,
                   static_cast<int>(channels)};
    if (mask) {
      input.mask = mask->data;
      input.mask_type = mask->dtype;
      input.mask_strides = {mask->strides[0], 0, mask->strides[1]};
    }
    const Output out{output.labels.as<int64_t>(),
                     centers.data,
                     centers.dtype == DType::f64,
                     output.counts.as<int64_t>(),
                     output.instances.as<int64_t>(),
                     output.iterations.as<int64_t>(),
                     capacity};
    const Rules rules{options.bandwidth, options.tol, options.min_size, options.max_iter,
                      options.leftovers == Leftovers::nearest};
    with_plan<T>(options.seeding, [&](auto* kind) {
      using PlanOf = std::remove_pointer_t<decltype(kind)>;
      const PlanOf plan(workspace.data, images, channels, mask != nullptr, capacity);
      expect(workspace.size() >= plan.bytes, "workspace: too small");
      input.images.invalid = plan.invalid;
      check_offsets(images, plan.invalid, queue);
      fill_bytes(plan.work.exchange.arrived, 0, plan.groups * 8, queue);
      launch_together(PlanOf::kernel(), "mean_shift", plan.groups * plan.blocks, kThreads,
                      plan.shared, queue, input, plan.work, out, rules, plan.blocks);
    });
  });
}

}  // namespace instembed::mean_shift
