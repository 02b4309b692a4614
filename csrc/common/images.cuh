// The images of a batch on the device: of one size, or ragged sets of points end to end. The pixels
// of all images have one numbering, image after image.
#pragma once

#include <cstdint>

#include "common/array.h"
#include "common/cuda.h"

namespace instembed::cuda {

struct Images {
  int64_t images = 0;
  int64_t pixels = 0;  // an image, where all have the same number
  int64_t total = 0;
  const int64_t* offsets = nullptr;  // images + 1, where they are ragged
  const int64_t* invalid = nullptr;  // with offsets: not 0 if they are none; then no pixel exists

  __device__ int64_t start(int64_t b) const { return offsets ? offsets[b] : b * pixels; }
  __device__ int64_t count(int64_t b) const {
    if (!offsets) return pixels;
    return *invalid ? 0 : offsets[b + 1] - offsets[b];
  }
  // The image that pixel i belongs to.
  __device__ int64_t image_of(int64_t i) const {
    if (!offsets) return i / pixels;
    int64_t low = 0, high = images;  // start(low) <= i < start(high)
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      if (offsets[middle] <= i) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Of embeddings (B, D, N), or (1, D, N) with offsets (B + 1,).
  static Images of(const Array& array, const Array* offsets, const int64_t* invalid) {
    Images result;
    result.pixels = array.shape[array.ndim - 1];
    result.images = array.shape[0];
    result.total = result.images * result.pixels;
    if (offsets) {
      expect(offsets->dtype == DType::i64 && offsets->ndim == 1 && offsets->contiguous() &&
                 offsets->shape[0] >= 1 && array.shape[0] == 1,
             "offsets: expected a contiguous int64 vector of images + 1 elements");
      result.images = offsets->shape[0] - 1;
      result.offsets = offsets->as<const int64_t>();
      result.invalid = invalid;
    }
    return result;
  }
};

// Where elements are: the strides of (B, D, N), or of (1, D, N) with offsets.
struct Strides {
  int64_t image = 0, channel = 0, pixel = 0;

  __device__ int64_t at(const Images& images, int64_t b) const {
    return images.offsets ? images.offsets[b] * pixel : b * image;
  }
};

__global__ void __launch_bounds__(256)
    check_offsets_kernel(const int64_t* offsets, int64_t images, int64_t total, int64_t* invalid) {
  bool wrong = threadIdx.x == 0 && (offsets[0] != 0 || offsets[images] != total);
  for (int64_t b = threadIdx.x; b < images; b += 256) {
    wrong = wrong || offsets[b] > offsets[b + 1] || offsets[b] < 0;
  }
  const bool any = __syncthreads_or(wrong);
  if (threadIdx.x == 0) *invalid = any ? 1 : 0;
}

// Writes *invalid; 0 without offsets.
inline void check_offsets(const Images& images, int64_t* invalid, Stream stream) {
  if (!images.offsets) return fill_bytes(invalid, 0, sizeof(int64_t), stream);
  launch(check_offsets_kernel, "check_offsets", 1, 256, 0, stream, images.offsets, images.images,
         images.total, invalid);
}

}  // namespace instembed::cuda
