// How the pixels of a batch are addressed: images of one size, or ragged point sets end to end.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/array.h"

namespace instembed {

// The address of channel d of pixel i of image b is
//   first(b) + d * channel_stride + i * pixel_stride,
// whatever the memory format: planar (pixel_stride 1), channels-last (channel_stride 1), or
// neither.
struct Batch {
  int64_t images = 0;
  int64_t channels = 1;
  int64_t image_stride = 0;
  int64_t channel_stride = 0;
  int64_t pixel_stride = 0;
  int64_t pixels = 0;                // an image, where all have the same number
  const int64_t* offsets = nullptr;  // images + 1, where they are ragged

  int64_t first(int64_t b) const { return offsets ? offsets[b] * pixel_stride : b * image_stride; }
  int64_t count(int64_t b) const { return offsets ? offsets[b + 1] - offsets[b] : pixels; }

  // `array` is (B, D, N), or (1, D, N) with `offsets` (B + 1,).
  static Batch of_embeddings(const Array& array, const Array* offsets) {
    expect(array.ndim == 3, "embeddings: expected 3 dimensions (images, channels, pixels)");
    return make(array, offsets, array.shape[1], array.strides[1], array.strides[2]);
  }

  // `array` is (B, N), or (1, N) with `offsets` (B + 1,).
  static Batch of_labels(const Array& array, const Array* offsets) {
    expect(array.ndim == 2, "labels: expected 2 dimensions (images, pixels)");
    return make(array, offsets, 1, 0, array.strides[1]);
  }

 private:
  static Batch make(const Array& array, const Array* offsets, int64_t channels,
                    int64_t channel_stride, int64_t pixel_stride) {
    Batch batch;
    batch.channels = channels;
    batch.image_stride = array.strides[0];
    batch.channel_stride = channel_stride;
    batch.pixel_stride = pixel_stride;
    batch.images = array.shape[0];
    batch.pixels = array.shape[array.ndim - 1];
    if (offsets) {
      expect(offsets->dtype == DType::i64 && offsets->ndim == 1 && offsets->contiguous() &&
                 offsets->shape[0] >= 1 && array.shape[0] == 1,
             "offsets: expected a contiguous int64 vector of images + 1 elements");
      batch.images = offsets->shape[0] - 1;
      batch.offsets = offsets->as<const int64_t>();
      bool fits = batch.offsets[0] == 0 && batch.offsets[batch.images] == batch.pixels;
      for (int64_t b = 0; b < batch.images; ++b) {
        fits = fits && batch.offsets[b] <= batch.offsets[b + 1];
      }
      if (!fits) {
        throw std::invalid_argument(
            "offsets: expected to rise from 0 to the number of points, " +
            std::to_string(batch.pixels) + ", got values from " + std::to_string(batch.offsets[0]) +
            " to " + std::to_string(batch.offsets[batch.images]) + " or a step down");
      }
    }
    return batch;
  }
};

}  // namespace instembed
