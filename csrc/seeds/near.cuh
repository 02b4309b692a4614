// What the CUDA kernels of seeds share: the pixels of an image, 32 at a time by a warp, and their
// squared distances from one seed after another.
//
// A pixel has its first channels in registers for all seeds. A seed that these rule out for all
// pixels of a warp costs no more than they do; further channels come from the L1. Membership is
// what the CPU kernels compute: tests in A that are certain, and double near the border, without
// fused multiply-adds (CMakeLists.txt).
#pragma once

#include <algorithm>

#include "common/dtype.h"
#include "common/group_barrier.cuh"
#include "common/images.cuh"
#include "mean_shift/formula.h"
#include "seeds/cuda.h"
#include "seeds/radius.h"

namespace instembed::seeds {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kAhead = 8;  // channels of a pixel in registers

using Number = unsigned long long;  // that atomics take

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarp; }

// The embeddings of a batch, and a mask of pixels that count, or null.
template <class T>
struct Input {
  const T* embeddings;
  Strides strides;
  const uint8_t* mask;
  Strides mask_strides;
  int64_t images, pixels;
  int channels;

  static Input of(const Array& embeddings, const Array* mask) {
    Input input{embeddings.as<const T>(),
                {embeddings.strides[0], embeddings.strides[1], embeddings.strides[2]},
                nullptr,
                {},
                embeddings.shape[0],
                embeddings.shape[2],
                static_cast<int>(embeddings.shape[1])};
    if (mask) {
      expect(mask->dtype == DType::u8 && mask->ndim == 2 && mask->shape[0] == input.images &&
                 mask->shape[1] == input.pixels,
             "mask: expected bytes in the embeddings' shape without channels");
      input.mask = mask->as<const uint8_t>();
      input.mask_strides = {mask->strides[0], 0, mask->strides[1]};
    }
    return input;
  }

  __device__ const T* at(int64_t image, int64_t pixel) const {
    return embeddings + image * strides.image + pixel * strides.pixel;
  }
  __device__ bool counts(int64_t image, int64_t pixel) const {
    return !mask || mask[image * mask_strides.image + pixel * mask_strides.pixel] != 0;
  }
  __device__ int64_t groups() const { return (pixels + kWarp - 1) / kWarp; }  // of a warp's pixels
};

// Rows of seeds are padded with zeros.
inline __host__ __device__ int row_of(int channels) {
  return channels < kAhead ? kAhead : channels;
}

// Copies the embedding of a pixel to a row, by a warp.
template <class T, class A>
__device__ __forceinline__ void copy_row(const Input<T>& input, int64_t image, int64_t pixel,
                                         A* row) {
  const T* from = input.at(image, pixel);
  for (int d = lane_of_thread(); d < row_of(input.channels); d += kWarp) {
    row[d] = d < input.channels ? static_cast<A>(from[d * input.strides.channel]) : A(0);
  }
}

// The pixel of a lane.
template <class T, class A>
class Pixel {
 public:
  // One that is not `there` is near nothing.
  __device__ Pixel(const Input<T>& input, int64_t image, int64_t i, bool there)
      : channels_(input.at(image, there ? i : 0)),
        stride_(input.strides.channel),
        dims_(input.channels) {
#pragma unroll
    for (int d = 0; d < kAhead; ++d) {
      first_[d] = d < dims_ ? static_cast<A>(channels_[d * stride_]) : A(0);
    }
    if (!there) first_[0] = static_cast<A>(NAN);
  }

  // The squared distance from a seed, channels added in order; something that is not within `outer`
  // if that is so for all pixels of the warp.
  __device__ A squared(const A* seed, A outer) const {
    A sum = 0;
#pragma unroll
    for (int d = 0; d < kAhead; ++d) {
      const A difference = first_[d] - seed[d];
      sum += difference * difference;
    }
    for (int from = kAhead; from < dims_; from += kAhead) {  // sums only grow
      if (!__any_sync(kAllLanes, sum <= outer)) break;
      const int end = from + kAhead < dims_ ? from + kAhead : dims_;
      for (int d = from; d < end; ++d) {
        const A difference = static_cast<A>(channels_[d * stride_]) - seed[d];
        sum += difference * difference;
      }
    }
    return sum;
  }

  __device__ double exact(const A* seed) const {
    return mean_shift::squared_distance(channels_, stride_, seed, dims_);
  }

  // Whether the pixel is in a ball around a seed from which it has the distance `squared`.
  __device__ bool within(const Radius<A>& radius, A squared, const A* seed) const {
    return squared <= radius.inner || (squared <= radius.outer && exact(seed) <= radius.exact);
  }

 private:
  const T* channels_;
  int64_t stride_;
  int dims_;
  A first_[kAhead];
};

// Blocks for each image of a launch in which warps share the work: enough to fill the device.
inline int64_t blocks_an_image(int64_t images, int64_t most) {
  const int64_t fill = 8 * int64_t{device_info().processors} / std::max<int64_t>(images, 1);
  return std::clamp<int64_t>(fill, 1, std::max<int64_t>(most, 1));
}

// How the blocks of a cooperative launch are shared: a group takes an image at a time. Two a
// multiprocessor are enough: more would only have more to wait for.
struct Crew {
  int blocks = 1;
  int64_t groups = 1;

  template <class Kernel>
  static Crew of(Kernel kernel, const char* name, int64_t shared, int64_t images, int64_t pixels) {
    expect(shared <= device_info().shared, "embeddings: too many channels for this device");
    const int64_t fit = std::max<int64_t>(most_together(kernel, name, kThreads, shared), 1);
    const int64_t most = std::min(fit, 2 * int64_t{device_info().processors});
    const int64_t count = std::max<int64_t>(images, 1);
    const int64_t useful = std::max<int64_t>((pixels + kThreads - 1) / kThreads, 1);
    Crew crew;
    crew.blocks = static_cast<int>(std::clamp<int64_t>(most / count, 1, useful));
    crew.groups = std::min(count, most / crew.blocks);
    return crew;
  }
};

inline void check_embeddings(const Array& embeddings) {
  expect(embeddings.ndim == 3, "embeddings: expected 3 dimensions (images, channels, pixels)");
  expect(embeddings.shape[2] <= INT32_MAX, "embeddings: expected fewer than 2^31 pixels an image");
}

inline void check_seeds(const Array& seeds, int64_t images) {
  expect(seeds.ndim == 2 && seeds.shape[0] == images, "seeds: expected (images, seeds)");
  expect_contiguous(seeds, DType::i64, seeds.size(), "seeds");
}

// What work on the seeds of some images needs on the device.
template <class Work>
struct SeedsPlan {
  Work work;
  int64_t bytes = 0;

  SeedsPlan(void* base, int64_t images, int64_t seeds, int channels) {
    Workspace workspace(base);
    work.take(&workspace, images, seeds, channels);
    bytes = workspace.used();
  }
};

template <template <class> class Work>
int64_t seeds_workspace(const Array& embeddings, const Array& seeds) {
  check_embeddings(embeddings);
  check_seeds(seeds, embeddings.shape[0]);
  const int64_t images = seeds.shape[0], count = seeds.shape[1];
  const auto channels = static_cast<int>(embeddings.shape[1]);
  return embeddings.dtype == DType::f64
             ? SeedsPlan<Work<double>>(nullptr, images, count, channels).bytes
             : SeedsPlan<Work<float>>(nullptr, images, count, channels).bytes;
}

}  // namespace
}  // namespace instembed::seeds
