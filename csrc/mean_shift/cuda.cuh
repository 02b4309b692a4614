// Mean-shift grouping on CUDA.
#pragma once

#include <algorithm>
#include <cmath>

#include "mean_shift/cuda.h"
#include "mean_shift/peel.cuh"

namespace instembed::mean_shift {
namespace {

using namespace device;

// Tests of points: see Tiles.
template <class T>
using test_t = accumulator_t<T>;

template <class T>
struct PeelPlan {
  using S = test_t<T>;
  static constexpr auto kKernel = peel_kernel<T, S>;

  PeelWork<S> work;
  int64_t* invalid = nullptr;
  int blocks = 1;  // a group, which takes an image at a time
  int64_t groups = 1;
  int64_t shared = 0;
  int64_t bytes = 0;

  PeelPlan(void* base, const Images& images, int64_t channels, bool classified, int64_t capacity) {
    shared = padded<double>(kWarps * channels) + 3 * padded<double>(channels) + padded<S>(channels);
    const DeviceInfo device = device_info();
    if (shared > device.shared) {
      throw std::invalid_argument(
          "embeddings: " + std::to_string(channels) + " channels are too many for this device: " +
          std::to_string(shared) + " bytes of shared memory of " + std::to_string(device.shared));
    }
    const int64_t most =
        std::max<int64_t>(most_together(kKernel, "mean_shift", kThreads, shared), 1);
    const int64_t count = std::max<int64_t>(images.images, 1);
    blocks = static_cast<int>(std::clamp<int64_t>(
        most / count, 1, parts_of(images.offsets ? images.total : images.pixels)));
    groups = std::min(count, most / blocks);
    Workspace workspace(base);
    work.tiles.take(&workspace, images, channels, classified);
    work.clusters.take(&workspace, images, channels, capacity);
    work.exchange.take(&workspace, groups, channels);
    invalid = workspace.take<int64_t>(1);
    bytes = workspace.used();
  }

  template <class A>
  static int64_t padded(int64_t n) {
    return (n * static_cast<int64_t>(sizeof(A)) + 15) / 16 * 16;
  }
};

}  // namespace

int64_t cuda_workspace(const Array& embeddings, const Array* mask, const Array* offsets,
                       const Options&, int64_t capacity) {
  expect(embeddings.ndim == 3, "embeddings: expected (images, channels, pixels)");
  const Images images = Images::of(embeddings, offsets, nullptr);
  const DeviceGuard guard(embeddings.device_id);
  int64_t bytes = 0;
  dispatch_floating(embeddings.dtype, "embeddings", [&](auto element) {
    bytes =
        PeelPlan<decltype(element)>(nullptr, images, embeddings.shape[1], mask != nullptr, capacity)
            .bytes;
  });
  return bytes;
}

void group_cuda(const Array& embeddings, const Array* mask, const Array* offsets,
                const Options& options, const CudaOutput& output, const Array& workspace,
                int64_t stream) {
  expect(embeddings.ndim == 3, "embeddings: expected (images, channels, pixels)");
  expect(std::isfinite(options.bandwidth) && options.bandwidth > 0,
         "bandwidth: expected a positive number");
  Images images = Images::of(embeddings, offsets, nullptr);
  const int64_t channels = embeddings.shape[1], rows = embeddings.shape[0];
  if (mask) {
    expect(mask->ndim == 2 && mask->shape[0] == rows && mask->shape[1] == embeddings.shape[2],
           "mask: expected the embeddings' shape without channels");
  }
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

  const DeviceGuard guard(embeddings.device_id);
  const Stream queue = as_stream(stream);
  fill_bytes(output.labels.data, 0, images.total * 8, queue);
  if (images.images == 0) return;
  fill_bytes(centers.data, 0, centers.size() * item_size(centers.dtype), queue);
  fill_bytes(output.counts.data, 0, output.counts.size() * 8, queue);

  dispatch_floating(embeddings.dtype, "embeddings", [&](auto element) {
    using T = decltype(element);
    using Plan = PeelPlan<T>;
    const Plan plan(workspace.data, images, channels, mask != nullptr, capacity);
    expect(workspace.size() >= plan.bytes, "workspace: too small");
    images.invalid = plan.invalid;
    check_offsets(images, plan.invalid, queue);
    fill_bytes(plan.work.exchange.arrived, 0, plan.groups * 8, queue);
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
    launch_together(Plan::kKernel, "mean_shift", plan.groups * plan.blocks, kThreads, plan.shared,
                    queue, input, plan.work, out, rules, plan.blocks);
  });
}

}  // namespace instembed::mean_shift
