// Features at points on CUDA.
//
// For P points that read R pixels each (1, or 2 to the power of the axes) of C channels of T bytes,
// the bytes that must move are P C T (R + 1) forward; the gradient of the features needs N C T for
// zeros, P C T for what comes back and 96 R P for the sort. Reads of a planar map are scattered, a
// sector of 32 bytes each; those of a channels-last map are not. Floor of 510 keypoints that read
// 64 channels of 128 x 128 in 8 images: 34 MB backward, 10 us at 3.3 TB/s, 10 MB forward.
//
// What several points send to one pixel is added up in double, in the order of the points, and
// rounded once. So the reads of a map are sorted by pixel, in a fixed order and without atomics: a
// block sorts a map's, four bits of the pixel at a time, every thread counting and moving
// consecutive reads. Keypoints and proposals are thousands at most, for which a block is enough;
// for a million points on one map it is not.
#pragma once

#include <algorithm>

#include "common/cuda.h"
#include "common/numbers.cuh"
#include "common/points.h"
#include "gather_at/cuda.h"
#include "gather_at/formula.h"

namespace instembed::gather_at {
namespace {

using namespace cuda;

constexpr int kThreads = 256;

struct Points {  // (B, N, G, S), and (B, N, G) flags
  const void *data, *valid;
  DType type, valid_type;
  int64_t strides[4], valid_strides[3];
  int64_t count;  // N
  bool linear;
};

struct Map {  // (B, G, C, *spatial)
  int64_t images, groups, channels;
  int64_t image_stride, group_stride, channel_stride;
  int axes;
  int64_t size[3], strides[3];  // along x, y, z

  __device__ int64_t start(int64_t map) const {
    return map / groups * image_stride + map % groups * group_stride;
  }
};

// The cell of point n of a map; false if the point does not count.
__device__ __forceinline__ bool locate(const Points& points, const Map& map, int64_t which,
                                       int64_t n, Cell* cell) {
  const int64_t b = which / map.groups, g = which % map.groups;
  if (points.valid) {
    const int64_t* s = points.valid_strides;
    if (!(load_number(points.valid, points.valid_type, b * s[0] + n * s[1] + g * s[2]) > 0)) {
      return false;
    }
  }
  const int64_t* s = points.strides;
  bool inside = true;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    if (axis >= map.axes) break;
    const double x =
        load_number(points.data, points.type, b * s[0] + n * s[1] + g * s[2] + axis * s[3]);
    const int64_t pixel = nearest_pixel(x, map.size[axis]);
    inside = inside && pixel >= 0;
    cell->on[axis] = points.linear ? between(x, map.size[axis]) : on_pixel(pixel);
  }
  return inside;
}

__host__ __device__ inline int reads_of(int axes, bool linear) { return linear ? 1 << axes : 1; }

// A thread takes a point and a channel: neighbours write side by side.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const T* features, Map map, Points points, T* values) {
  const int64_t total = map.images * points.count * map.groups * map.channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int reads = reads_of(map.axes, points.linear);
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total;
       at += step) {
    const int64_t channel = at % map.channels, row = at / map.channels;  // (b, n, g)
    const int64_t g = row % map.groups, n = row / map.groups % points.count;
    const int64_t which = row / map.groups / points.count * map.groups + g;
    Cell cell;
    T value{};
    if (locate(points, map, which, n, &cell)) {
      const T* from = features + map.start(which) + channel * map.channel_stride;
      if (points.linear) {
        accumulator_t<T> sum = 0;
#pragma unroll
        for (int corner = 0; corner < 8; ++corner) {
          if (corner >= reads) break;
          sum += static_cast<accumulator_t<T>>(cell.weight(corner)) *
                 from[cell.offset(corner, map.strides)];
        }
        value = rounded<T>(sum);
      } else {
        value = from[cell.offset(0, map.strides)];
      }
    }
    values[at] = value;
  }
}

// A warp takes a point: its lanes share the channels, whose products are added up in a fixed order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    points_gradient_kernel(const T* grad_values, const T* features, Map map, Points points,
                           void* grad, DType grad_type) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int64_t rows = map.images * points.count * map.groups;
  const int reads = reads_of(map.axes, true);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
       row < rows; row += warps) {
    const int64_t g = row % map.groups, n = row / map.groups % points.count;
    const int64_t which = row / map.groups / points.count * map.groups + g;
    Cell cell;
    double sum[3] = {};
    if (locate(points, map, which, n, &cell)) {
      const T* from = features + map.start(which);
      const T* value = grad_values + row * map.channels;
#pragma unroll
      for (int corner = 0; corner < 8; ++corner) {
        if (corner >= reads) break;
        const T* at = from + cell.offset(corner, map.strides);
        double dot = 0;
        for (int64_t c = lane; c < map.channels; c += kWarp) {
          dot += static_cast<double>(value[c]) * static_cast<double>(at[c * map.channel_stride]);
        }
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) sum[axis] += cell.slope(corner, axis) * dot;
      }
    }
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      if (axis >= map.axes) break;
      const double total = warp_sum(sum[axis]);
      if (lane != 0) continue;
      const int64_t at = row * map.axes + axis;
      switch (grad_type) {
        case DType::f16:
          static_cast<Half*>(grad)[at] = rounded<Half>(total);
          break;
        case DType::bf16:
          static_cast<BFloat16*>(grad)[at] = rounded<BFloat16>(total);
          break;
        case DType::f32:
          static_cast<float*>(grad)[at] = static_cast<float>(total);
          break;
        default:
          static_cast<double*>(grad)[at] = total;
      }
    }
  }
}

// What a point sends to a pixel.
struct Share {
  uint32_t pixel, point;
  double weight;
};

// Of all maps, in the order of the points; those that do not count go to the pixel after the last.
__global__ void __launch_bounds__(kThreads, 2)
    find_shares_kernel(Map map, Points points, Share* shares) {
  const int64_t total = map.images * map.groups * points.count;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int reads = reads_of(map.axes, points.linear);
  const auto nowhere = static_cast<uint32_t>(map.size[0] * map.size[1] * map.size[2]);
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total;
       at += step) {
    const int64_t n = at % points.count;
    Cell cell;
    const bool counts = locate(points, map, at / points.count, n, &cell);
#pragma unroll
    for (int corner = 0; corner < 8; ++corner) {
      if (corner >= reads) break;
      const int64_t row = cell.pixel(corner, 2) * map.size[1] + cell.pixel(corner, 1);
      const int64_t pixel = row * map.size[0] + cell.pixel(corner, 0);
      shares[at * reads + corner] = {counts ? static_cast<uint32_t>(pixel) : nowhere,
                                     static_cast<uint32_t>(n), cell.weight(corner)};
    }
  }
}

constexpr int kDigitBits = 4, kDigits = 1 << kDigitBits;

// A block sorts the n shares of a map, keeping the order of equals: digit by digit from the lowest.
// The result is in `shares` after an even number of passes, else in `other`.
__global__ void __launch_bounds__(kThreads)
    sort_shares_kernel(Share* shares, Share* other, int64_t n, int passes) {
  INSTEMBED_SHARED(uint32_t, places, kDigits* kThreads);  // digit by digit, thread by thread
  INSTEMBED_SHARED(uint32_t, sums, kThreads);
  const int tid = static_cast<int>(threadIdx.x);
  Share* from = shares + blockIdx.x * n;
  Share* to = other + blockIdx.x * n;
  const int64_t each = (n + kThreads - 1) / kThreads;
  const int64_t first = min(tid * each, n), last = min(first + each, n);
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = pass * kDigitBits;
    const auto place = [&](const Share& share) {
      return static_cast<int>(share.pixel >> shift & (kDigits - 1)) * kThreads + tid;
    };
    for (int digit = 0; digit < kDigits; ++digit) places[digit * kThreads + tid] = 0;
    for (int64_t i = first; i < last; ++i) {
      const int at = place(from[i]);
      places[at] = places[at] + 1;
    }
    __syncthreads();
    // Counts to places: a thread adds up some in a row, then the sums of the threads before it.
    uint32_t sum = 0;
    for (int k = tid * kDigits; k < (tid + 1) * kDigits; ++k) sum += places[k];
    sums[tid] = sum;
    for (int reach = 1; reach < kThreads; reach *= 2) {
      __syncthreads();
      const uint32_t before = tid >= reach ? static_cast<uint32_t>(sums[tid - reach]) : 0;
      __syncthreads();
      sums[tid] = sums[tid] + before;
    }
    uint32_t next = sums[tid] - sum;
    for (int k = tid * kDigits; k < (tid + 1) * kDigits; ++k) {
      const uint32_t count = places[k];
      places[k] = next;
      next += count;
    }
    __syncthreads();
    for (int64_t i = first; i < last; ++i) {
      const Share share = from[i];
      const int at = place(share);
      const uint32_t where = places[at];
      places[at] = where + 1;
      to[where] = share;
    }
    __syncthreads();  // what was written is read by others
    Share* sorted = to;
    to = from;
    from = sorted;
  }
}

// A thread takes a channel of the first share of a pixel, and adds up all the pixel's.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_shares_kernel(const T* grad_values, const Share* shares, int64_t n, Map map, Points points,
                      T* grad) {
  const int64_t total = map.images * map.groups * n * map.channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const auto nowhere = static_cast<uint32_t>(map.size[0] * map.size[1] * map.size[2]);
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total;
       at += step) {
    const int64_t channel = at % map.channels, which = at / map.channels / n;
    const Share* own = shares + which * n;
    int64_t i = at / map.channels % n;
    const uint32_t pixel = own[i].pixel;
    if (pixel == nowhere || (i > 0 && own[i - 1].pixel == pixel)) continue;
    const int64_t b = which / map.groups, g = which % map.groups;
    double sum = 0;
    for (; i < n && own[i].pixel == pixel; ++i) {
      const int64_t row = (b * points.count + own[i].point) * map.groups + g;
      sum += own[i].weight * static_cast<double>(grad_values[row * map.channels + channel]);
    }
    const int64_t x = pixel % map.size[0], y = pixel / map.size[0] % map.size[1];
    const int64_t z = pixel / map.size[0] / map.size[1];
    grad[map.start(which) + channel * map.channel_stride + x * map.strides[0] + y * map.strides[1] +
         z * map.strides[2]] = rounded<T>(sum);
  }
}

// ---------------------------------------------------------------------------------------------------------
// The host's side

Map map_of(const Array& features) {
  expect(features.ndim >= 4 && features.ndim <= 6,
         "features: expected (images, groups, channels, *spatial) with 1 to 3 spatial dimensions");
  Map map{features.shape[0],   features.shape[1],   features.shape[2],
          features.strides[0], features.strides[1], features.strides[2],
          features.ndim - 3,   {1, 1, 1},           {0, 0, 0}};
  for (int axis = 0; axis < map.axes; ++axis) {
    map.size[axis] = features.shape[features.ndim - 1 - axis];
    map.strides[axis] = features.strides[features.ndim - 1 - axis];
  }
  return map;
}

Points checked_points(const Query& query, const Map& map, const Array& features,
                      const Array& values) {
  const Array& points = query.points;
  const int64_t count = points.ndim == 4 ? points.shape[1] : 0;
  const auto fits = [&](const Array& array, int64_t last) {
    return array.ndim == 4 && array.shape[0] == map.images && array.shape[1] == count &&
           array.shape[2] == map.groups && array.shape[3] == last;
  };
  expect(fits(points, map.axes), "points: expected (images, points, groups, spatial dimensions)");
  expect(values.dtype == features.dtype && values.contiguous() && fits(values, map.channels),
         "values: expected a contiguous (images, points, groups, channels) of the features' type");
  Points result{points.data, nullptr, points.dtype, DType::u8, {}, {}, count, query.linear};
  std::copy_n(points.strides.begin(), 4, result.strides);
  if (query.valid) {
    expect(query.valid->ndim == 3 && query.valid->shape[0] == map.images &&
               query.valid->shape[1] == count && query.valid->shape[2] == map.groups,
           "valid: expected (images, points, groups)");
    result.valid = query.valid->data;
    result.valid_type = query.valid->dtype;
    std::copy_n(query.valid->strides.begin(), 3, result.valid_strides);
  }
  return result;
}

int64_t blocks_for(int64_t threads) {
  return std::min<int64_t>((threads + kThreads - 1) / kThreads, device_info().processors * 16);
}

struct BackwardPlan {
  int64_t shares;  // a map
  int passes = 0;
  Share *first, *second;
  int64_t bytes;

  BackwardPlan(void* base, const Map& map, int64_t points, bool linear)
      : shares(points * reads_of(map.axes, linear)) {
    const int64_t pixels = map.size[0] * map.size[1] * map.size[2];
    expect(pixels < UINT32_MAX && shares < UINT32_MAX, "features: too many pixels, or points");
    while (pixels >> (passes * kDigitBits) > 0) ++passes;
    Workspace workspace(base);
    first = workspace.take<Share>(map.images * map.groups * shares);
    second = workspace.take<Share>(map.images * map.groups * shares);
    bytes = workspace.used();
  }
};

}  // namespace

void forward_cuda(const Array& features, const Query& query, const Array& values, int64_t stream) {
  const Map map = map_of(features);
  const Points points = checked_points(query, map, features, values);
  dispatch_floating(features.dtype, "features", [&](auto element) {
    using T = decltype(element);
    launch(gather_kernel<T>, "gather_at", blocks_for(values.size()), kThreads, 0, as_stream(stream),
           features.as<const T>(), map, points, values.as<T>());
  });
}

int64_t cuda_workspace(const Array& features, const Query& query) {
  return BackwardPlan(nullptr, map_of(features), query.points.shape[1], query.linear).bytes;
}

void backward_cuda(const Array& grad_values, const Array& features, const Query& query,
                   const Array* grad_features, const Array* grad_points, const Array& workspace,
                   int64_t stream) {
  const Map map = map_of(features);
  const Points points = checked_points(query, map, features, grad_values);
  const Stream queue = as_stream(stream);
  const int64_t rows = map.images * points.count * map.groups;
  if (grad_features) {
    expect(grad_features->dtype == features.dtype && grad_features->ndim == features.ndim &&
               grad_features->shape == features.shape,
           "grad_features: expected the features' shape and type");
    expect_gapless(*grad_features, "grad_features");
    fill_bytes(grad_features->data, 0, grad_features->size() * item_size(grad_features->dtype),
               queue);
  }
  if (grad_features && rows > 0) {
    const BackwardPlan plan(workspace.data, map, points.count, points.linear);
    expect_contiguous(workspace, DType::u8, workspace.size(), "workspace");
    expect(workspace.size() >= plan.bytes, "workspace: too small");
    launch(find_shares_kernel, "find_shares", blocks_for(rows), kThreads, 0, queue, map, points,
           plan.first);
    launch(sort_shares_kernel, "sort_shares", map.images * map.groups, kThreads, 0, queue,
           plan.first, plan.second, plan.shares, plan.passes);
    const Share* sorted = plan.passes % 2 ? plan.second : plan.first;
    dispatch_floating(features.dtype, "features", [&](auto element) {
      using T = decltype(element);
      launch(add_shares_kernel<T>, "add_shares",
             blocks_for(map.images * map.groups * plan.shares * map.channels), kThreads, 0, queue,
             grad_values.as<const T>(), sorted, plan.shares, map_of(*grad_features), points,
             grad_features->as<T>());
    });
  }
  if (grad_points) {
    expect_contiguous(*grad_points, query.points.dtype, query.points.size(), "grad_points");
    dispatch_floating(grad_points->dtype, "grad_points", [](auto) {});
    if (!points.linear) {
      return fill_bytes(grad_points->data, 0, grad_points->size() * item_size(grad_points->dtype),
                        queue);
    }
    dispatch_floating(features.dtype, "features", [&](auto element) {
      using T = decltype(element);
      launch(points_gradient_kernel<T>, "points_gradient", blocks_for(rows * kWarp), kThreads, 0,
             queue, grad_values.as<const T>(), features.as<const T>(), map, points,
             grad_points->data, grad_points->dtype);
    });
  }
}

}  // namespace instembed::gather_at
