// Points of the unit sphere as kernels over pairs want them: in tiles of neighbours, by rows and
// channel by channel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/batch.h"
#include "common/parallel.h"
#include "common/points.h"
#include "common/tiles.h"
#include "sphere/order.h"

namespace instembed::sphere {

constexpr int64_t kChunk = 1024;  // points a task

// Images of at most so many points are done side by side, larger ones one after the other by all
// threads.
constexpr int64_t kSmallImage = 1024;

// Runs f(i) for i in [0, count), a chunk a task.
template <class F>
void for_each(int64_t count, int threads, F&& f) {
  parallel_for((count + kChunk - 1) / kChunk, threads, [&](int64_t chunk) {
    const int64_t end = std::min(count, (chunk + 1) * kChunk);
    for (int64_t i = chunk * kChunk; i < end; ++i) f(i);
  });
}

// Runs f(image, threads).
template <class F>
void for_images(const Batch& batch, int threads, F&& f) {
  int64_t most = 0;
  for (int64_t b = 0; b < batch.images; ++b) most = std::max(most, batch.count(b));
  const bool side_by_side = batch.images > 1 && most <= kSmallImage;
  parallel_for(batch.images, side_by_side ? threads : 1,
               [&](int64_t b) { f(b, side_by_side ? 1 : threads); });
}

template <class T>
T* at(const Image<T>& image, int64_t pixel) {
  return image.data + pixel * image.pixel_stride;
}

template <class A>
double dot(const Image<const A>& a, const Image<const A>& b, int64_t pixel) {
  double sum = 0;
  for (int64_t d = 0; d < a.channels; ++d) {
    sum += static_cast<double>(at(a, pixel)[d * a.channel_stride]) *
           static_cast<double>(at(b, pixel)[d * b.channel_stride]);
  }
  return sum;
}

// One image's share of arrays with a value a pixel.
struct Place {
  const Batch& batch;
  int64_t image;

  int64_t first() const { return batch.offsets ? batch.offsets[image] : image * batch.pixels; }

  // Element of `pixel` in an array (B, N) or (1, N).
  int64_t index(const Array& array, int64_t pixel) const {
    const int64_t start =
        batch.offsets ? batch.offsets[image] * array.strides[1] : image * array.strides[0];
    return start + pixel * array.strides[1];
  }

  bool masked_out(const Array* mask, int64_t pixel) const {
    return mask && reader(mask->dtype)(mask->data, index(*mask, pixel)) == 0;
  }
};

// A vector at every slot, twice: a row of whole vectors for each, and channel by channel for each
// tile.
template <class A>
struct Field {
  Lines<A> rows;    // slot s: rows + s * padded
  Lines<A> planar;  // channel d of tile t: planar + begin[t] * channels + d * width(t)

  Field() = default;
  Field(int64_t channels, int64_t padded, int64_t slots)
      : rows(slots * padded), planar(slots * channels) {}
};

template <class A>
struct Cloud {
  int64_t channels = 0, padded = 0;  // padded: whole vectors
  Tiles tiles;                       // tiles.point is the pixel of each slot
  Field<A> points;                   // zero where a slot holds no point

  int64_t width(int64_t tile) const { return tiles.begin[tile + 1] - tiles.begin[tile]; }
};

// The points of some pixels.
template <class A>
Cloud<A> build_cloud(const Image<const A>& points, const std::vector<int32_t>& pixels, int threads);

// Pixels in ascending order for which f(pixel) is true; f runs in any order.
template <class F>
std::vector<int32_t> choose_pixels(int64_t count, int threads, F&& f) {
  std::vector<char> taken(count);
  for_each(count, threads, [&](int64_t pixel) { taken[pixel] = f(pixel); });
  std::vector<int32_t> pixels;
  for (int64_t pixel = 0; pixel < count; ++pixel) {
    if (taken[pixel]) pixels.push_back(static_cast<int32_t>(pixel));
  }
  return pixels;
}

// Fills the planar half of a field from its rows.
template <class A>
void fill_planar(const Cloud<A>& cloud, Field<A>* field, int threads);

}  // namespace instembed::sphere
