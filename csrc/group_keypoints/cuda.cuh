// Grouping of keypoints on CUDA: candidates, and the joints that people miss.
//
// Bytes, for maps of N pixels of T bytes and L dimensions of a tag: N T a joint for the candidates,
// N T (1 + L) for the missing joints of every 4 people, from the L2 but for the first. 8 images of
// 17 joints of 128 x 128, float32 and L = 1: 9 MB and 18 MB, 8 us at 3.3 TB/s. Flops: 6 L in double
// a pixel and missing joint, at most 0.4 GFLOP there, 13 us. What the loads take that wait for each
// other is more: 64 steps of a block's threads there, a microsecond each (assumed), for all blocks
// that the device holds at once; 17 joints of 8 images are 136 blocks for every 4 people.
//
// Peaks go to a list in any order, from which the best are taken one after the other: score, then
// pixel, decide, and no two are equal in both. So nothing depends on the order of the list.
#pragma once

#include <algorithm>

#include "common/numbers.cuh"
#include "group_keypoints/cuda.h"
#include "group_keypoints/formula.h"

namespace instembed::group_keypoints {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kEach = 4;  // people that a block looks for at a time
constexpr int kPlaces = kEach * kWarps;

struct DeviceMaps {  // (B, C, H, W)
  const void* data;
  DType type;
  int64_t strides[4];
  int64_t channels, height, width;

  __device__ __forceinline__ double at(int64_t b, int64_t c, int64_t pixel) const {
    const auto of_map = static_cast<uint32_t>(pixel), columns = static_cast<uint32_t>(width);
    return load_number(data, type,
                       b * strides[0] + c * strides[1] + of_map / columns * strides[2] +
                           of_map % columns * strides[3]);
  }
};

struct PeakRule {
  double threshold;
  int64_t rows, columns;  // that a window reaches to either side
};

// Higher than all before it in its window, and as high as all after it; what is not finite hides
// nothing.
__device__ __forceinline__ bool is_peak(const DeviceMaps& heat, const PeakRule& rule, int64_t b,
                                        int64_t k, int64_t pixel) {
  const double v = heat.at(b, k, pixel);
  if (!is_finite(v) || !(v > rule.threshold)) return false;
  const int64_t y = pixel / heat.width, x = pixel % heat.width;
  const int64_t left = x > rule.columns ? x - rule.columns : 0;
  const int64_t right = min(x + rule.columns, heat.width - 1);
  const int64_t bottom = min(y + rule.rows, heat.height - 1);
  for (int64_t row = y > rule.rows ? y - rule.rows : 0; row <= bottom; ++row) {
    for (int64_t column = left; column <= right; ++column) {
      const int64_t other = row * heat.width + column;
      const double w = heat.at(b, k, other);
      if (is_finite(w) && (other < pixel ? w >= v : w > v)) return false;
    }
  }
  return true;
}

__device__ __forceinline__ bool comes_first(double score, int64_t pixel, double other_score,
                                            int64_t other_pixel) {
  if (other_pixel < 0) return pixel >= 0;
  return pixel >= 0 && (score > other_score || (score == other_score && pixel < other_pixel));
}

// A pixel and its score.
struct Best {
  double score = 0;
  int64_t pixel = -1;  // none yet

  __device__ __forceinline__ void meet(double other, int64_t at) {
    if (!comes_first(other, at, score, pixel)) return;
    score = other;
    pixel = at;
  }
  __device__ __forceinline__ void meet_warp() {
#pragma unroll
    for (int other = kWarp / 2; other > 0; other /= 2) {
      const double theirs = __shfl_xor_sync(kAllLanes, score, other);
      meet(theirs, __shfl_xor_sync(kAllLanes, pixel, other));
    }
  }
};

// What the warps of a block found, in shared memory.
struct Found {
  SharedPtr<double> scores;
  SharedPtr<int64_t> pixels;

  __device__ __forceinline__ void write(int place, const Best& best) const {
    if (threadIdx.x % kWarp != 0) return;
    scores[place] = best.score;
    pixels[place] = best.pixel;
  }
  __device__ __forceinline__ Best of_warps(int first) const {
    Best best;
    for (int w = 0; w < kWarps; ++w) best.meet(scores[first + w], pixels[first + w]);
    return best;
  }
};

// A thread takes a pixel of a joint of an image.
__global__ void __launch_bounds__(kThreads, 2)
    peaks_kernel(DeviceMaps heat, DeviceMaps tags, PeakRule rule, int32_t* lists, int32_t* counts,
                 int64_t blocks) {
  const int64_t map = blockIdx.x / blocks, b = map / heat.channels, k = map % heat.channels;
  const int64_t size = heat.height * heat.width, dims = tags.channels / heat.channels;
  const int64_t pixel = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (pixel >= size || !is_peak(heat, rule, b, k, pixel)) return;
  for (int64_t d = 0; d < dims; ++d) {
    if (!is_finite(tags.at(b, k * dims + d, pixel))) return;
  }
  lists[map * size + atomicAdd(counts + map, 1)] = static_cast<int32_t>(pixel);
}

// A block takes the peaks of a joint of an image.
__global__ void __launch_bounds__(kThreads, 2)
    candidates_kernel(DeviceMaps heat, DeviceMaps tags, const int32_t* lists, const int32_t* counts,
                      int64_t most, double* candidates) {
  INSTEMBED_SHARED(double, scores, kWarps);
  INSTEMBED_SHARED(int64_t, pixels, kWarps);
  const Found found{scores, pixels};
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t map = blockIdx.x, b = map / heat.channels, k = map % heat.channels;
  const int64_t dims = tags.channels / heat.channels;
  const int32_t* list = lists + map * heat.height * heat.width;
  const int32_t count = counts[map];

  Best last;
  double* row = candidates + map * most * (2 + dims);
  for (int64_t i = 0; i < most; ++i, row += 2 + dims) {
    Best best;
    if (i < count) {
      for (int32_t j = tid; j < count; j += kThreads) {
        const int64_t pixel = list[j];
        const double v = heat.at(b, k, pixel);
        if (i == 0 || comes_first(last.score, last.pixel, v, pixel)) best.meet(v, pixel);
      }
      best.meet_warp();
      __syncthreads();  // the ones before have been read
      found.write(tid / kWarp, best);
      __syncthreads();
      last = best = found.of_warps(0);
    }
    if (tid == 0) {
      row[0] = best.score;
      row[1] = static_cast<double>(best.pixel);
    }
    for (int64_t d = tid; d < dims; d += kThreads) {
      row[2 + d] = best.pixel < 0 ? 0 : tags.at(b, k * dims + d, best.pixel);
    }
  }
}

// For those of some people who miss a joint, the pixel, the first of equals, with the largest
// `heatmap - round(|tag - person's tag|)`, of those that a warp looks at.
__device__ __forceinline__ void search(const DeviceMaps& heat, const DeviceMaps& tags, int64_t b,
                                       int64_t k, const double* tags_of_people, int64_t stride,
                                       const bool (&missing)[kEach], Best (&best)[kEach]) {
  const int64_t size = heat.height * heat.width, dims = tags.channels / heat.channels;
  for (int64_t pixel = threadIdx.x; pixel < size; pixel += kThreads) {
    const double v = heat.at(b, k, pixel);
    double squares[kEach] = {};
    bool finite = is_finite(v);
    for (int64_t d = 0; d < dims && finite; ++d) {
      const double tag = tags.at(b, k * dims + d, pixel);
      finite = is_finite(tag);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (!missing[j]) continue;
        const double difference = tag - tags_of_people[j * stride + d];
        squares[j] += dims == 1 ? fabs(difference) : difference * difference;
      }
    }
    if (!finite) continue;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (!missing[j]) continue;
      const double distance = dims == 1 ? squares[j] : sqrt(squares[j]);
      best[j].meet(v - rounded(distance > kFar ? kFar : distance), pixel);
    }
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (missing[j]) best[j].meet_warp();
  }
}

template <class A>
struct Joints {  // (B, P, K) each, but for the two coordinates
  A *keypoints, *scores;
  uint8_t* visibility;
};

// A block takes a joint of kEach people of an image, a thread a part of the pixels, and then one of
// the people.
template <class A>
__global__ void __launch_bounds__(kThreads, 3)
    finish_kernel(DeviceMaps heat, DeviceMaps tags, const int64_t* pixels, const double* people,
                  const int64_t* num_people, int64_t max_people, bool refine, bool adjust,
                  Joints<A> joints) {
  INSTEMBED_SHARED(double, scores, kPlaces);
  INSTEMBED_SHARED(int64_t, places, kPlaces);
  const Found found{scores, places};
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t groups = (max_people + kEach - 1) / kEach;
  const int64_t map = blockIdx.x / groups, b = map / heat.channels, k = map % heat.channels;
  const int64_t first = blockIdx.x % groups * kEach, count = num_people[b];
  const int64_t stride = 1 + tags.channels / heat.channels;
  const auto pixel_of = [&](int j) -> int64_t {  // of a person's joint, or -1
    const int64_t row = b * max_people + first + j;
    return first + j < count ? pixels[row * heat.channels + k] : -1;
  };
  bool missing[kEach], any = false;  // the same for the whole block
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    missing[j] = refine && first + j < count && pixel_of(j) < 0;
    any = any || missing[j];
  }
  if (any) {
    Best best[kEach];
    search(heat, tags, b, k, people + (b * max_people + first) * stride + 1, stride, missing, best);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (missing[j]) found.write(j * kWarps + tid / kWarp, best[j]);
    }
    __syncthreads();
  }
  if (tid >= kEach || first + tid >= max_people) return;
  int64_t pixel = pixel_of(tid);
  const bool refined = refine && first + tid < count && pixel < 0;
  if (refined) pixel = found.of_warps(tid * kWarps).pixel;
  const auto at = [&](int64_t i) { return heat.at(b, k, i); };
  const int64_t row = (b * max_people + first + tid) * heat.channels + k;
  const double score = pixel < 0 ? 0 : at(pixel);
  const bool there = pixel >= 0 && (!refined || score > 0);
  Point point{0, 0};
  if (there) point = place(at, pixel, heat.height, heat.width, adjust);
  joints.keypoints[2 * row] = static_cast<A>(point.x);
  joints.keypoints[2 * row + 1] = static_cast<A>(point.y);
  joints.scores[row] = static_cast<A>(there ? score : 0);
  joints.visibility[row] = there ? (refined ? 1 : 2) : 0;
}

// ---------------------------------------------------------------------------------------------------------
// The host's side

DeviceMaps maps_of(const Array& array) {
  DeviceMaps maps{array.data, array.dtype, {}, array.shape[1], array.shape[2], array.shape[3]};
  std::copy_n(array.strides.begin(), 4, maps.strides);
  return maps;
}

void check_maps(const Array& heatmaps, const Array& tags) {
  expect(heatmaps.ndim == 4 && tags.ndim == 4 && heatmaps.shape[1] > 0 && tags.shape[1] > 0 &&
             tags.shape[1] % heatmaps.shape[1] == 0 && tags.shape[0] == heatmaps.shape[0] &&
             tags.shape[2] == heatmaps.shape[2] && tags.shape[3] == heatmaps.shape[3],
         "tags: expected the heatmaps' shape, with one or more channels for each joint");
  expect(heatmaps.shape[2] * heatmaps.shape[3] <= INT32_MAX, "heatmaps: too many pixels");
}

struct CandidatesPlan {
  int32_t *counts, *lists;
  int64_t bytes;

  CandidatesPlan(void* base, const Array& heatmaps) {
    const int64_t maps = heatmaps.shape[0] * heatmaps.shape[1];
    Workspace workspace(base);
    counts = workspace.take<int32_t>(maps);
    lists = workspace.take<int32_t>(maps * heatmaps.shape[2] * heatmaps.shape[3]);
    bytes = workspace.used();
  }
};

}  // namespace

int64_t cuda_workspace(const Array& heatmaps) { return CandidatesPlan(nullptr, heatmaps).bytes; }

void find_candidates_cuda(const Array& heatmaps, const Array& tags, const Options& options,
                          const Array& candidates, const Array& workspace, int64_t stream) {
  check_maps(heatmaps, tags);
  const int64_t maps = heatmaps.shape[0] * heatmaps.shape[1];
  const int64_t dims = tags.shape[1] / heatmaps.shape[1];
  expect_contiguous(candidates, DType::f64, maps * options.max_people * (2 + dims), "candidates");
  const CandidatesPlan plan(workspace.data, heatmaps);
  expect_contiguous(workspace, DType::u8, workspace.size(), "workspace");
  expect(workspace.size() >= plan.bytes, "workspace: too small");
  const int64_t reach = options.nms / 2;
  const PeakRule rule{options.peak_threshold, std::min(reach, heatmaps.shape[2]),
                      std::min(reach, heatmaps.shape[3])};
  fill_bytes(plan.counts, 0, maps * 4, as_stream(stream));
  const int64_t blocks = (heatmaps.shape[2] * heatmaps.shape[3] + kThreads - 1) / kThreads;
  launch(peaks_kernel, "find_peaks", maps * blocks, kThreads, 0, as_stream(stream),
         maps_of(heatmaps), maps_of(tags), rule, plan.lists, plan.counts, blocks);
  launch(candidates_kernel, "candidates", maps, kThreads, 0, as_stream(stream), maps_of(heatmaps),
         maps_of(tags), plan.lists, plan.counts, options.max_people, candidates.as<double>());
}

void finish_cuda(const Array& heatmaps, const Array& tags, const Options& options,
                 const Array& pixels, const Array& people, const Array& num_people,
                 const Array& keypoints, const Array& keypoint_scores, const Array& visibility,
                 int64_t stream) {
  check_maps(heatmaps, tags);
  const int64_t images = heatmaps.shape[0], joints = heatmaps.shape[1];
  const int64_t places = images * options.max_people, dims = tags.shape[1] / joints;
  const DType type = heatmaps.dtype == DType::f64 ? DType::f64 : DType::f32;
  expect_contiguous(pixels, DType::i64, places * joints, "pixels");
  expect_contiguous(people, DType::f64, places * (1 + dims), "people");
  expect_contiguous(num_people, DType::i64, images, "num_people");
  expect_contiguous(keypoints, type, places * joints * 2, "keypoints");
  expect_contiguous(keypoint_scores, type, places * joints, "keypoint_scores");
  expect_contiguous(visibility, DType::u8, places * joints, "visibility");
  const int64_t groups = (options.max_people + kEach - 1) / kEach;
  const auto finish = [&](auto number) {
    using A = decltype(number);
    launch(finish_kernel<A>, "finish_people", images * joints * groups, kThreads, 0,
           as_stream(stream), maps_of(heatmaps), maps_of(tags), pixels.as<const int64_t>(),
           people.as<const double>(), num_people.as<const int64_t>(), options.max_people,
           options.refine, options.adjust,
           Joints<A>{keypoints.as<A>(), keypoint_scores.as<A>(), visibility.as<uint8_t>()});
  };
  type == DType::f64 ? finish(double{}) : finish(float{});
}

}  // namespace instembed::group_keypoints
