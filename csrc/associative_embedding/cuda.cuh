// The associative embedding loss on CUDA.
//
// Bytes: a sector of 32 for each dimension of a visible joint's tag, forward and backward, and the
// gradient's zeros: 8 images of 30 people with 17 joints, L = 1, 128 x 128, float32: 0.1 MB forward
// and 9 MB backward, 3 us at 3.3 TB/s. Flops: 10 L a pair of people, nothing. What it takes is the
// launches of a few kernels: everything is in double and each sum has a fixed order.
#pragma once

#include <algorithm>

#include "associative_embedding/cuda.h"
#include "associative_embedding/sizes.h"
#include "common/numbers.cuh"
#include "common/points.h"

namespace instembed::associative_embedding {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Tags, or their gradient: in a map or gathered.
struct Place {
  int64_t strides[4];
  int64_t tag, width;
  bool gathered;

  __device__ __forceinline__ int64_t at(int64_t b, int64_t n, int64_t k, int64_t pixel,
                                        int64_t l) const {
    if (gathered) return b * strides[0] + n * strides[1] + k * strides[2] + l * strides[3];
    return b * strides[0] + (k * tag + l) * strides[1] + pixel / width * strides[2] +
           pixel % width * strides[3];
  }
};

struct Joints {  // keypoints (B, P, K, 2), null where tags are gathered, and flags (B, P, K)
  const void *keypoints, *visible;
  DType keypoints_type, visible_type;
  int64_t keypoints_strides[4], visible_strides[3];
  int64_t height, width;

  // The pixel of a joint that counts, else -1.
  __device__ __forceinline__ int64_t pixel(int64_t b, int64_t n, int64_t k) const {
    const int64_t* v = visible_strides;
    if (!(load_number(visible, visible_type, b * v[0] + n * v[1] + k * v[2]) > 0)) return -1;
    if (!keypoints) return 0;
    const int64_t* s = keypoints_strides;
    const int64_t at = b * s[0] + n * s[1] + k * s[2];
    const int64_t x = nearest_pixel(load_number(keypoints, keypoints_type, at), width);
    const int64_t y = nearest_pixel(load_number(keypoints, keypoints_type, at + s[3]), height);
    return x < 0 || y < 0 ? -1 : y * width + x;
  }
};

struct Counts {     // of what counts
  int64_t* joints;  // a person
  int64_t* people;  // an image
};

__device__ __forceinline__ int64_t warp_of_launch() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}

// A warp takes a person: the mean tag, and the mean square of the distances from it.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    means_kernel(const T* tags, Place place, Joints joints, Sizes sizes, int64_t* pixels,
                 double* means, double* pulls) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = warp_of_launch(), b = row / sizes.people, n = row % sizes.people;
  if (row >= sizes.images * sizes.people) return;
  int64_t* own = pixels + row * sizes.joints;
  double count = 0;
  for (int64_t k = lane; k < sizes.joints; k += kWarp) {  // from here on a lane has its joints
    own[k] = joints.pixel(b, n, k);
    count += own[k] >= 0 ? 1 : 0;
  }
  count = warp_sum(count);
  double squares = 0;
  for (int64_t l = 0; l < sizes.tag; ++l) {
    double sum = 0;
    for (int64_t k = lane; k < sizes.joints; k += kWarp) {
      if (own[k] >= 0) sum += static_cast<double>(tags[place.at(b, n, k, own[k], l)]);
    }
    const double mean = count > 0 ? warp_sum(sum) / count : 0;
    if (lane == 0) means[row * sizes.tag + l] = mean;
    for (int64_t k = lane; k < sizes.joints; k += kWarp) {
      if (own[k] < 0) continue;
      const double difference = static_cast<double>(tags[place.at(b, n, k, own[k], l)]) - mean;
      squares += difference * difference;
    }
  }
  squares = warp_sum(squares);
  if (lane == 0) pulls[row] = count > 0 ? squares / count : 0;
}

// A warp takes an image.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const int64_t* pixels, Sizes sizes, Counts counts) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t b = warp_of_launch();
  if (b >= sizes.images) return;
  double people = 0;
  for (int64_t n = lane; n < sizes.people; n += kWarp) {
    const int64_t row = b * sizes.people + n;
    int64_t joints = 0;
    for (int64_t k = 0; k < sizes.joints; ++k)
      joints += pixels[row * sizes.joints + k] >= 0 ? 1 : 0;
    counts.joints[row] = joints;
    people += joints > 0 ? 1 : 0;
  }
  people = warp_sum(people);
  if (lane == 0) counts.people[b] = static_cast<int64_t>(people);
}

// A warp takes a person, and goes over the others of the image in order; a lane has some of the
// tag's dimensions.
__global__ void __launch_bounds__(kThreads)
    push_kernel(const double* means, Push push, Sizes sizes, Counts counts, double* pushes,
                double* gradients) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = warp_of_launch(), b = row / sizes.people, n = row % sizes.people;
  if (row >= sizes.images * sizes.people) return;
  const double* own = means + row * sizes.tag;
  double* gradient = gradients + row * sizes.tag;
  for (int64_t l = lane; l < sizes.tag; l += kWarp) gradient[l] = 0;
  double sum = 0;
  const auto people = static_cast<double>(counts.people[b]);
  const bool pushed = counts.joints[row] > 0 && people > 1;
  for (int64_t m = 0; m < sizes.people && pushed; ++m) {
    if (m == n || counts.joints[b * sizes.people + m] == 0) continue;
    const double* other = means + (b * sizes.people + m) * sizes.tag;
    double square = 0;
    for (int64_t l = lane; l < sizes.tag; l += kWarp) {
      square += (own[l] - other[l]) * (own[l] - other[l]);
    }
    const Push::Pair pair = push(warp_sum(square));
    sum += pair.value;
    for (int64_t l = lane; l < sizes.tag; l += kWarp) {
      gradient[l] += pair.slope * (own[l] - other[l]);
    }
  }
  for (int64_t l = lane; l < sizes.tag && pushed; l += kWarp) {
    gradient[l] /= people * (people - 1);
  }
  if (lane == 0) pushes[row] = sum;
}

// A warp takes an image.
template <class A>
__global__ void __launch_bounds__(kThreads)
    terms_kernel(const double* pulls, const double* pushes, Sizes sizes, Counts counts, A* terms) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t b = warp_of_launch();
  if (b >= sizes.images) return;
  double pull = 0, push = 0;
  for (int64_t n = lane; n < sizes.people; n += kWarp) {
    pull += pulls[b * sizes.people + n];
    push += pushes[b * sizes.people + n];
  }
  pull = warp_sum(pull);
  push = warp_sum(push);
  if (lane != 0) return;
  const auto people = static_cast<double>(counts.people[b]);
  terms[b * kTerms] = static_cast<A>(people > 0 ? pull / people : 0);
  terms[b * kTerms + 1] = static_cast<A>(people > 1 ? push * 0.5 / (people * (people - 1)) : 0);
}

// A thread takes a joint and a dimension of its tag. People whose joint lies on the same pixel are
// added up by the first of them, so that the sum is rounded once.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_kernel(const accumulator_t<T>* grad_terms, const T* tags, Place place,
                    const int64_t* pixels, const double* means, const double* pushes, Sizes sizes,
                    Counts counts, int64_t area, T* grad, Place to) {
  const int64_t total = sizes.images * sizes.people * sizes.joints * sizes.tag;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total;
       at += step) {
    const int64_t l = at % sizes.tag, k = at / sizes.tag % sizes.joints;
    const int64_t row = at / sizes.tag / sizes.joints, b = row / sizes.people;
    const int64_t pixel = pixels[row * sizes.joints + k];
    if (pixel < 0 || pixel >= area) continue;
    const auto same = [&](int64_t other) { return pixels[other * sizes.joints + k] == pixel; };
    bool first = true;
    for (int64_t other = b * sizes.people; other < row && first && !place.gathered; ++other) {
      first = !same(other);
    }
    if (!first) continue;
    const int64_t end = place.gathered ? row + 1 : (b + 1) * sizes.people;
    double sum = 0;
    for (int64_t other = row; other < end; ++other) {
      if (!same(other)) continue;
      const auto joints = static_cast<double>(counts.joints[other]);
      const double pull = static_cast<double>(grad_terms[b * kTerms]) * 2 /
                          (static_cast<double>(counts.people[b]) * joints);
      const double push = static_cast<double>(grad_terms[b * kTerms + 1]) / joints;
      const auto tag = static_cast<double>(tags[place.at(b, other % sizes.people, k, pixel, l)]);
      sum += pull * (tag - means[other * sizes.tag + l]) + push * pushes[other * sizes.tag + l];
    }
    grad[to.at(b, row % sizes.people, k, pixel, l)] = rounded<T>(sum);
  }
}

// ---------------------------------------------------------------------------------------------------------
// The host's side

struct Plan {
  Counts counts;
  double *pulls, *pushes;
  int64_t bytes;

  Plan(void* base, int64_t images, int64_t people) {
    Workspace workspace(base);
    counts.joints = workspace.take<int64_t>(images * people);
    counts.people = workspace.take<int64_t>(images);
    pulls = workspace.take<double>(images * people);
    pushes = workspace.take<double>(images * people);
    bytes = workspace.used();
  }
};

Place place_of(const Array& array, const Sizes& sizes, bool gathered) {
  Place place{{}, sizes.tag, array.shape[3], gathered};
  std::copy_n(array.strides.begin(), 4, place.strides);
  return place;
}

int64_t blocks_for_warps(int64_t warps) { return (warps + kWarps - 1) / kWarps; }

void expect_workspace(const Array& workspace, const Plan& plan) {
  expect_contiguous(workspace, DType::u8, workspace.size(), "workspace");
  expect(workspace.size() >= plan.bytes, "workspace: too small");
}

}  // namespace

int64_t cuda_workspace(int64_t images, int64_t people) {
  return Plan(nullptr, images, people).bytes;
}

void forward_cuda(const Array& tags, const Array* keypoints, const Array& visible, const Push& push,
                  const Array& terms, const State& state, const Array& workspace, int64_t stream) {
  const bool gathered = keypoints == nullptr;
  const Sizes sizes = checked_sizes(tags, visible, gathered);
  check_state(state, sizes);
  Joints joints{};
  joints.visible = visible.data;
  joints.visible_type = visible.dtype;
  std::copy_n(visible.strides.begin(), 3, joints.visible_strides);
  if (keypoints) {
    const auto& shape = keypoints->shape;
    expect(keypoints->ndim == 4 && shape[0] == sizes.images && shape[1] == sizes.people &&
               shape[2] == sizes.joints && shape[3] == 2,
           "keypoints: expected (images, people, joints, 2)");
    joints.keypoints = keypoints->data;
    joints.keypoints_type = keypoints->dtype;
    std::copy_n(keypoints->strides.begin(), 4, joints.keypoints_strides);
    joints.height = tags.shape[2];
    joints.width = tags.shape[3];
  }
  const Stream queue = as_stream(stream);
  const Plan plan(workspace.data, sizes.images, sizes.people);
  expect_workspace(workspace, plan);
  const int64_t rows = sizes.images * sizes.people;
  auto* pixels = state.pixels.as<int64_t>();
  auto* means = state.means.as<double>();
  dispatch_floating(tags.dtype, "tags", [&](auto element) {
    using T = decltype(element);
    using A = accumulator_t<T>;
    expect_contiguous(terms, sizeof(A) == 8 ? DType::f64 : DType::f32, sizes.images * kTerms,
                      "terms");
    launch(means_kernel<T>, "tag_means", blocks_for_warps(rows), kThreads, 0, queue,
           tags.as<const T>(), place_of(tags, sizes, gathered), joints, sizes, pixels, means,
           plan.pulls);
    launch(count_kernel, "count_people", blocks_for_warps(sizes.images), kThreads, 0, queue, pixels,
           sizes, plan.counts);
    launch(push_kernel, "push", blocks_for_warps(rows), kThreads, 0, queue, means, push, sizes,
           plan.counts, plan.pushes, state.pushes.as<double>());
    launch(terms_kernel<A>, "tag_terms", blocks_for_warps(sizes.images), kThreads, 0, queue,
           plan.pulls, plan.pushes, sizes, plan.counts, terms.as<A>());
  });
}

void backward_cuda(const Array& grad_terms, const Array& tags, const State& state, bool gathered,
                   const Array& grad, const Array& workspace, int64_t stream) {
  const Sizes sizes = checked_sizes(tags, state.pixels, gathered);
  check_state(state, sizes);
  expect(grad.dtype == tags.dtype && grad.ndim == tags.ndim && grad.shape == tags.shape,
         "grad: expected the tags' shape and type");
  expect_gapless(grad, "grad");
  const Stream queue = as_stream(stream);
  const Plan plan(workspace.data, sizes.images, sizes.people);
  expect_workspace(workspace, plan);
  fill_bytes(grad.data, 0, grad.size() * item_size(grad.dtype), queue);
  launch(count_kernel, "count_people", blocks_for_warps(sizes.images), kThreads, 0, queue,
         state.pixels.as<const int64_t>(), sizes, plan.counts);
  dispatch_floating(tags.dtype, "tags", [&](auto element) {
    using T = decltype(element);
    using A = accumulator_t<T>;
    expect_contiguous(grad_terms, sizeof(A) == 8 ? DType::f64 : DType::f32, sizes.images * kTerms,
                      "grad_terms");
    const int64_t threads = state.pixels.size() * sizes.tag;
    launch(gradient_kernel<T>, "tag_gradient",
           std::min<int64_t>((threads + kThreads - 1) / kThreads, device_info().processors * 16),
           kThreads, 0, queue, grad_terms.as<const A>(), tags.as<const T>(),
           place_of(tags, sizes, gathered), state.pixels.as<const int64_t>(),
           state.means.as<const double>(), state.pushes.as<const double>(), sizes, plan.counts,
           gathered ? 1 : tags.shape[2] * tags.shape[3], grad.as<T>(),
           place_of(grad, sizes, gathered));
  });
}

}  // namespace instembed::associative_embedding
