// The pairwise similarity loss on CUDA.
//
// For B images of M points of D channels, M = instances x samples of those that are there, forward:
//   reads    M D elements where they lie, and writes them side by side
//   pairs    M^2 D (3 flops of distances, and 3 of gradients where a tile of pairs has any), M^2
//            terms of about 100 flops
// At B = 8, M = 1600, D = 64: 7.9 + 2 GFLOP, 0.2 ms at 60 TFLOP/s; bytes are nothing beside it, 26
// MB to gather and 160 MB of sums of gradients in the L2. Backward: B D N bytes of zeros and B M D
// numbers into their places. Each pair is looked at from both sides: half of the distances could be
// saved, for sums in an order that is not the rows' own.
//
// A block has 32 rows and goes over all points, 64 columns at a time: squared distances from
// differences, in registers, channels by way of shared memory; then terms, and slopes in shared
// memory; and where one is not zero, the rows' gradients, which no other block touches. So no float
// is added atomically. Slots without a pixel weigh nothing; those after the last pixel are not
// looked at. What room for more instances costs is memory: the slopes of every slot are zeroed.
#pragma once

#include <cmath>

#include "common/block_sum.cuh"
#include "common/dtype.h"
#include "common/images.cuh"
#include "pairwise_similarity/cuda.h"
#include "pairwise_similarity/scalar.h"

namespace instembed::pairwise_similarity {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kRows = 32, kColumns = 64;  // points of a tile
constexpr int kChannels = 32;             // in shared memory at a time
constexpr int kAtOnce = 4;                // pixels of an instance whose loads do not wait
// Odd, so that neither points nor channels of a tile lie in one bank.
constexpr int kRow = kRows + 1, kColumn = kColumns + 1;
constexpr int kSide = 16;                                 // threads along either side of a tile
constexpr int kR = kRows / kSide, kC = kColumns / kSide;  // pairs of a thread

struct Shape {
  int64_t images, instances, samples, slots;  // slots = instances x samples, of an image
  int channels;
};

constexpr int32_t kInfinite = 1;  // a point is not finite
constexpr int32_t kWrong = 2;     // an index is neither of a pixel nor none

// What is known of each image's points.
template <class A>
struct Points {
  A* values = nullptr;        // (images, slots, channels), where there is a pixel
  A* shares = nullptr;        // (images, slots): 1 / pixels of the instance, 0 where no pixel is
  int32_t* counts = nullptr;  // (images, instances)
  int32_t* ends = nullptr;    // an image: slots up to its last instance
  int32_t* flags = nullptr;   // an image: kInfinite, kWrong
  double* sums = nullptr;     // (images, row tiles) of weighted terms, each pair twice

  void take(Workspace* workspace, const Shape& shape) {
    const int64_t slots = shape.images * shape.slots;
    values = workspace->take<A>(slots * shape.channels);
    shares = workspace->take<A>(slots);
    counts = workspace->take<int32_t>(shape.images * shape.instances);
    ends = workspace->take<int32_t>(shape.images);
    flags = workspace->take<int32_t>(shape.images);
    sums = workspace->take<double>(shape.images * row_tiles(shape));
  }
  static int64_t row_tiles(const Shape& shape) { return (shape.slots + kRows - 1) / kRows; }
};

// A warp takes an instance.
template <class T, class A>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const T* embeddings, Strides strides, int64_t pixels, const int64_t* indices,
                  Shape shape, Points<A> points) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kBlockWarps + threadIdx.x / kWarp;
  if (row >= shape.images * shape.instances) return;
  const int64_t image = row / shape.instances, first = row * shape.samples;
  int32_t count = 0;
  bool wrong = false, infinite = false;
  for (int64_t k = lane; k - lane < shape.samples; k += kWarp) {
    const int64_t pixel = k < shape.samples ? indices[first + k] : -1;
    count += __popc(__ballot_sync(kAllLanes, pixel >= 0));
    wrong = wrong || pixel < -1 || pixel >= pixels;
  }
  const T* source = embeddings + image * strides.image;
  const int64_t end = count > 0 ? first + shape.samples : first;
  const auto limit = static_cast<A>(kLargest);
  for (int64_t from = first; from < end; from += kAtOnce) {
    int64_t chosen[kAtOnce];
#pragma unroll
    for (int q = 0; q < kAtOnce; ++q) chosen[q] = from + q < end ? indices[from + q] : -1;
#pragma unroll
    for (int q = 0; q < kAtOnce; ++q) {
      if (lane != q || from + q >= end) continue;
      points.shares[from + q] = chosen[q] < 0 ? A(0) : A(1) / static_cast<A>(count);
    }
    for (int d = lane; d < shape.channels; d += kWarp) {
      A x[kAtOnce];
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        const int64_t pixel = chosen[q];
        const bool there = pixel >= 0 && pixel < pixels;
        x[q] = there ? static_cast<A>(source[pixel * strides.pixel + d * strides.channel]) : A(0);
      }
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        if (!(x[q] - x[q] == 0)) {
          infinite = true;
          x[q] = 0;
        }
        x[q] = x[q] < -limit ? -limit : (x[q] > limit ? limit : x[q]);
        if (from + q < end) points.values[(from + q) * shape.channels + d] = x[q];
      }
    }
  }
  infinite = __any_sync(kAllLanes, infinite);
  wrong = __any_sync(kAllLanes, wrong);
  if (lane != 0) return;
  points.counts[row] = count;
  if (infinite || wrong) {
    atomicOr(points.flags + image, (infinite ? kInfinite : 0) | (wrong ? kWrong : 0));
  }
  if (count > 0) {
    atomicMax(points.ends + image,
              static_cast<int32_t>(first + shape.samples - image * shape.slots));
  }
}

// The sum of the weights of an image's pairs, each once, by a block.
template <class A>
__device__ __forceinline__ double sum_of_weights(const Points<A>& points, const Shape& shape,
                                                 int64_t image, SharedPtr<double> room) {
  double found = 0, same = 0;
  const int64_t instances = points.ends[image] / shape.samples;
  for (int64_t c = threadIdx.x; c < instances; c += kThreads) {
    const double n = points.counts[image * shape.instances + c];
    if (n > 0) {
      found += 1;
      same += 0.5 * (n - 1) / n;
    }
  }
  found = sum_block(found, room);
  return 0.5 * found * (found - 1) + sum_block(same, room);
}

// Whether the loss of an image is NaN.
template <class A>
__device__ __forceinline__ bool is_nan(const Points<A>& points, int64_t image, double weights) {
  const int32_t flags = points.flags[image];
  return (flags & kWrong) != 0 || ((flags & kInfinite) != 0 && weights > 0);
}

// A channel of a warp's points of a tile, those from `first` on, on its way from global memory to
// tile[channel * stride + point]; 0 where no pixel is. All loads come before the first store, which
// would wait for them.
template <class A, int count>
struct Load {
  A values[count / kBlockWarps];

  __device__ __forceinline__ Load(const A* from, const A* shares, int64_t step, int32_t first,
                                  int32_t end) {
    const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarp;
    A weights[count / kBlockWarps];
#pragma unroll
    for (int q = 0; q < count / kBlockWarps; ++q) {
      const int32_t p = first + warp + q * kBlockWarps;
      weights[q] = p < end ? shares[p] : A(0);
      values[q] = p < end ? from[p * step] : A(0);
    }
#pragma unroll
    for (int q = 0; q < count / kBlockWarps; ++q) {
      if (weights[q] == 0) values[q] = 0;  // where nothing was written
    }
  }
  __device__ __forceinline__ void store(SharedPtr<A> row) const {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
    for (int q = 0; q < count / kBlockWarps; ++q) row[warp + q * kBlockWarps] = values[q];
  }
};

template <class A>
__global__ void __launch_bounds__(kThreads, 2)
    pairs_kernel(Points<A> points, Shape shape, A* gradients, int64_t row_tiles) {
  INSTEMBED_SHARED(A, rows, kChannels * kRow);
  INSTEMBED_SHARED(A, columns, kChannels * kColumn);
  INSTEMBED_SHARED(A, slopes, kRows * kColumn);
  INSTEMBED_SHARED(double, room, kBlockWarps);
  const int64_t image = blockIdx.x / row_tiles;
  const int32_t end = points.ends[image];
  const auto first = static_cast<int32_t>(blockIdx.x % row_tiles * kRows);
  if (first >= end) return;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp, warp = tid / kWarp;
  const int x = tid % kSide, y = tid / kSide;
  const int channels = shape.channels;
  const A* values = points.values + image * shape.slots * channels;
  const A* shares = points.shares + image * shape.slots;
  const auto samples = static_cast<int32_t>(shape.samples);
  const auto load = [&](int32_t column, int from) {
    const int some = channels - from < kChannels ? channels - from : kChannels;
    const int own = lane < some ? lane : 0;
    const Load<A, kRows> left(values + from + own, shares, channels, first, end);
    const Load<A, kColumns> right(values + from + own, shares, channels, column, end);
    __syncthreads();  // what was there has been read
    if (lane < some) left.store(rows + lane * kRow);
    if (lane < some) right.store(columns + lane * kColumn);
    __syncthreads();
    return some;
  };
  // f(point, its place among all) for the rows of which a warp keeps the gradient.
  const auto for_rows = [&](auto&& f) {
#pragma unroll
    for (int q = 0; q < kRows / kBlockWarps; ++q) {
      const int32_t i = first + warp + q * kBlockWarps;
      if (i < end) f(q, image * shape.slots + i);
    }
  };

  double total = 0;
  for (int32_t column = 0; column < end; column += kColumns) {
    A squares[kR][kC] = {};
    for (int from = 0; from < channels; from += kChannels) {
      const int some = load(column, from);
      for (int d = 0; d < some; ++d) {
        A a[kR], b[kC];
#pragma unroll
        for (int r = 0; r < kR; ++r) a[r] = rows[d * kRow + y + r * kSide];
#pragma unroll
        for (int c = 0; c < kC; ++c) b[c] = columns[d * kColumn + x + c * kSide];
#pragma unroll
        for (int r = 0; r < kR; ++r) {
#pragma unroll
          for (int c = 0; c < kC; ++c) squares[r][c] += (a[r] - b[c]) * (a[r] - b[c]);
        }
      }
    }
    A sum = 0;
    bool any = false;
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const int32_t i = first + y + r * kSide, j = column + x + c * kSide;
        A slope = 0;
        if (i < end && j < end) {  // of a point with itself, 0
          const A weight = shares[i] * shares[j];
          const Term<A> term =
              i / samples == j / samples ? term_of_same(squares[r][c]) : term_of_two(squares[r][c]);
          sum += weight * term.value;
          slope = weight * term.slope;
        }
        slopes[(y + r * kSide) * kColumn + x + c * kSide] = slope;
        any = any || slope != 0;
      }
    }
    total += static_cast<double>(sum);
    if (gradients == nullptr || !__syncthreads_or(any)) continue;
    for (int from = 0; from < channels; from += kChannels) {
      if (lane >= load(column, from)) continue;
      A own[kRows / kBlockWarps], sums[kRows / kBlockWarps] = {};
#pragma unroll
      for (int q = 0; q < kRows / kBlockWarps; ++q) {
        own[q] = rows[lane * kRow + warp + q * kBlockWarps];
      }
      for (int j = 0; j < kColumns; ++j) {
        const A other = columns[lane * kColumn + j];
#pragma unroll
        for (int q = 0; q < kRows / kBlockWarps; ++q) {
          sums[q] += slopes[(warp + q * kBlockWarps) * kColumn + j] * (own[q] - other);
        }
      }
      for_rows([&](int q, int64_t slot) { gradients[slot * channels + from + lane] += sums[q]; });
    }
  }
  total = sum_block(total, room);
  if (tid == 0) points.sums[blockIdx.x] = total;
  if (gradients == nullptr) return;

  const double weights = sum_of_weights(points, shape, image, room);
  const double scale = weights > 0 ? 2 / weights : 0;  // 2: of the derivative of a square
  const bool nan = is_nan(points, image, weights);
  for_rows([&](int, int64_t slot) {
    if (points.shares[slot] == 0) return;
    for (int d = lane; d < channels; d += kWarp) {
      A* to = gradients + slot * channels + d;
      const bool limited = !(std::abs(points.values[slot * channels + d]) < A(kLargest));
      *to = nan       ? static_cast<A>(NAN)
            : limited ? A(0)
                      : static_cast<A>(static_cast<double>(*to) * scale);
    }
  });
}

// A block takes an image.
template <class A>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Points<A> points, Shape shape, A* losses, int64_t row_tiles) {
  INSTEMBED_SHARED(double, room, kBlockWarps);
  const int64_t image = blockIdx.x, tiles = (points.ends[image] + kRows - 1) / kRows;
  double sum = 0;
  for (int64_t t = threadIdx.x; t < tiles; t += kThreads) sum += points.sums[image * row_tiles + t];
  sum = sum_block(sum, room);
  const double weights = sum_of_weights(points, shape, image, room);
  if (threadIdx.x != 0) return;
  const bool nan = is_nan(points, image, weights);
  losses[image] = static_cast<A>(nan ? NAN : weights > 0 ? sum / (2 * weights) : 0.0);
}

// A warp takes a slot.
template <class T, class A>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const A* grad_losses, const A* slopes, const int64_t* indices, Shape shape,
                   T* grad, Strides strides, int64_t pixels) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kBlockWarps + threadIdx.x / kWarp;
  if (slot >= shape.images * shape.slots) return;
  const int64_t image = slot / shape.slots, pixel = indices[slot];
  if (pixel < 0 || pixel >= pixels) return;
  const auto scale = static_cast<double>(grad_losses[image]);
  T* to = grad + image * strides.image + pixel * strides.pixel;
  for (int d = lane; d < shape.channels; d += kWarp) {
    to[d * strides.channel] =
        rounded<T>(scale * static_cast<double>(slopes[slot * shape.channels + d]));
  }
}

Shape shape_of(const Array& embeddings, const Array& indices) {
  expect(embeddings.ndim == 3, "embeddings: expected 3 dimensions (images, channels, pixels)");
  expect(indices.ndim == 3 && (embeddings.shape[0] == indices.shape[0] || embeddings.shape[0] == 1),
         "indices: expected (images, instances, samples)");
  expect_contiguous(indices, DType::i64, indices.size(), "indices");
  const int64_t slots = indices.shape[1] * indices.shape[2];
  expect(slots <= INT32_MAX, "indices: expected fewer than 2^31 an image");
  return {indices.shape[0], indices.shape[1], indices.shape[2], slots,
          static_cast<int>(embeddings.shape[1])};
}

// Points of all images lie in one, whose pixels the indices count.
Strides strides_of(const Array& array, const Shape& shape) {
  return {array.shape[0] == shape.images ? array.strides[0] : 0, array.strides[1],
          array.strides[2]};
}

template <class A>
struct Plan {
  Points<A> points;
  int64_t bytes = 0;

  Plan(void* base, const Shape& shape) {
    Workspace workspace(base);
    points.take(&workspace, shape);
    bytes = workspace.used();
  }
};

constexpr DType accumulation(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

int64_t blocks_of_warps(int64_t warps) { return (warps + kBlockWarps - 1) / kBlockWarps; }

}  // namespace

int64_t cuda_workspace(const Array& embeddings, const Array& indices) {
  const Shape shape = shape_of(embeddings, indices);
  return embeddings.dtype == DType::f64 ? Plan<double>(nullptr, shape).bytes
                                        : Plan<float>(nullptr, shape).bytes;
}

void forward_cuda(const Array& embeddings, const Array& indices, const Array& losses,
                  const Array* slopes, const Array& workspace, int64_t stream) {
  const Shape shape = shape_of(embeddings, indices);
  const DType type = accumulation(embeddings.dtype);
  expect_contiguous(losses, type, shape.images, "losses");
  if (slopes) expect_contiguous(*slopes, type, indices.size() * shape.channels, "slopes");
  expect_contiguous(workspace, DType::u8, workspace.size(), "workspace");
  const Stream queue = as_stream(stream);
  if (slopes) fill_bytes(slopes->data, 0, slopes->size() * item_size(type), queue);
  if (indices.size() == 0) {
    return fill_bytes(losses.data, 0, losses.size() * item_size(type), queue);
  }
  dispatch_floating(embeddings.dtype, "embeddings", [&](auto element) {
    using T = decltype(element);
    using A = accumulator_t<T>;
    const Plan<A> plan(workspace.data, shape);
    expect(workspace.size() >= plan.bytes, "workspace: too small");
    const Points<A>& points = plan.points;
    fill_bytes(points.shares, 0, indices.size() * sizeof(A), queue);
    fill_bytes(points.ends, 0, shape.images * sizeof(int32_t), queue);
    fill_bytes(points.flags, 0, shape.images * sizeof(int32_t), queue);
    launch(gather_kernel<T, A>, "pairwise_similarity_gather",
           blocks_of_warps(shape.images * shape.instances), kThreads, 0, queue,
           embeddings.as<const T>(), strides_of(embeddings, shape), embeddings.shape[2],
           indices.as<const int64_t>(), shape, points);
    const int64_t row_tiles = Points<A>::row_tiles(shape);
    launch(pairs_kernel<A>, "pairwise_similarity", shape.images * row_tiles, kThreads, 0, queue,
           points, shape, slopes ? slopes->as<A>() : nullptr, row_tiles);
    launch(finish_kernel<A>, "pairwise_similarity_finish", shape.images, kThreads, 0, queue, points,
           shape, losses.as<A>(), row_tiles);
  });
}

void backward_cuda(const Array& grad_losses, const Array& slopes, const Array& indices,
                   const Array& grad, int64_t stream) {
  const Shape shape = shape_of(grad, indices);
  const DType type = accumulation(grad.dtype);
  expect_contiguous(grad_losses, type, shape.images, "grad_losses");
  expect_contiguous(slopes, type, indices.size() * shape.channels, "slopes");
  expect_gapless(grad, "grad");
  const Stream queue = as_stream(stream);
  fill_bytes(grad.data, 0, grad.size() * item_size(grad.dtype), queue);
  dispatch_floating(grad.dtype, "grad", [&](auto element) {
    using T = decltype(element);
    using A = accumulator_t<T>;
    launch(scatter_kernel<T, A>, "pairwise_similarity_scatter",
           blocks_of_warps(shape.images * shape.slots), kThreads, 0, queue,
           grad_losses.as<const A>(), slopes.as<const A>(), indices.as<const int64_t>(), shape,
           grad.as<T>(), strides_of(grad, shape), grad.shape[2]);
  });
}

}  // namespace instembed::pairwise_similarity
