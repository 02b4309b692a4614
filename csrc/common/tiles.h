// Tiles of embeddings in the accumulation type, in the order that a kernel wants, from any memory format.
#pragma once

#include <cstdint>

#include "common/batch.h"
#include "common/dtype.h"
#include "common/simd.h"

namespace instembed {

// A planar tile: row(d)[i] is channel d of pixel i. A vector may be loaded from any pixel of the tile: rows
// go on for a vector's length, with whatever is there.
template <class A>
struct PlanarTile {
  const A* data;
  int64_t row_stride;
  INSTEMBED_INLINE const A* row(int64_t d) const { return data + d * row_stride; }
};

// Channels of a pixel are padded with zeros to whole short vectors in pixel-major tiles and tables.
constexpr int kShortLanes = 8;
inline int64_t padded_channels(int64_t channels) {
  return (channels + kShortLanes - 1) / kShortLanes * kShortLanes;
}

// Pixels a tile: what two copies of a tile need fits the first-level cache, and a row fills whole lines.
inline int tile_pixels(int64_t channels) {
  int tile = 1024;
  while (tile > 64 && tile * channels > 4096) tile /= 2;
  return tile;
}

// Rows are padded by a vector: room to read on, and no power of two between rows of one cache set.
inline int64_t planar_stride(int tile) { return tile + 16; }

template <class T>
struct Image {
  T* data;
  int64_t channels, pixels, channel_stride, pixel_stride;

  Image(const Array& array, const Batch& batch, int64_t b)
      : data(array.as<T>() + batch.first(b)),
        channels(batch.channels),
        pixels(batch.count(b)),
        channel_stride(batch.channel_stride),
        pixel_stride(batch.pixel_stride) {}

  // Whether kernels may work on pixels [from, from + n) where they lie.
  template <class A>
  INSTEMBED_INLINE bool planar_in_place(int64_t from, int64_t n) const {
    return std::is_same_v<std::remove_const_t<T>, A> && pixel_stride == 1 && from + n + 16 <= pixels;
  }
};

// Pixels [from, from + n) as a planar tile: in place where they lie so already, else copied to `scratch`,
// which holds channels * planar_stride(tile) elements.
template <class A, class T>
INSTEMBED_INLINE PlanarTile<A> load_planar(const Image<const T>& image, int64_t from, int64_t n,
                                           A* scratch, int64_t stride) {
  const T* source = image.data + from * image.pixel_stride;
  if constexpr (std::is_same_v<T, A>) {
    if (image.template planar_in_place<A>(from, n)) return {source, image.channel_stride};
  }
  if (image.channel_stride == 1) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t d = 0; d < image.channels; ++d) {
        scratch[d * stride + i] = static_cast<A>(source[i * image.pixel_stride + d]);
      }
    }
  } else {
    for (int64_t d = 0; d < image.channels; ++d) {
      const T* row = source + d * image.channel_stride;
      if (image.pixel_stride == 1) {
        for (int64_t i = 0; i < n; ++i) scratch[d * stride + i] = static_cast<A>(row[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) scratch[d * stride + i] = static_cast<A>(row[i * image.pixel_stride]);
      }
    }
  }
  return {scratch, stride};
}

// The reverse, for a tile that was written to `scratch`.
template <class A, class T>
INSTEMBED_INLINE void store_planar(const Image<T>& image, int64_t from, int64_t n, const A* scratch,
                                   int64_t stride) {
  T* target = image.data + from * image.pixel_stride;
  if (image.channel_stride == 1) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t d = 0; d < image.channels; ++d) {
        target[i * image.pixel_stride + d] = from_accumulator<T>(scratch[d * stride + i]);
      }
    }
  } else {
    for (int64_t d = 0; d < image.channels; ++d) {
      T* row = target + d * image.channel_stride;
      if (image.pixel_stride == 1) {
        for (int64_t i = 0; i < n; ++i) row[i] = from_accumulator<T>(scratch[d * stride + i]);
      } else {
        for (int64_t i = 0; i < n; ++i) row[i * image.pixel_stride] = from_accumulator<T>(scratch[d * stride + i]);
      }
    }
  }
}

// Pixels [from, from + n), pixel-major: pixel i is at scratch + i * padded_channels, padding untouched.
template <class A, class T>
INSTEMBED_INLINE void load_pixels(const Image<const T>& image, int64_t from, int64_t n, A* scratch) {
  const int64_t padded = padded_channels(image.channels);
  const T* source = image.data + from * image.pixel_stride;
  if (image.pixel_stride == 1) {
    for (int64_t d = 0; d < image.channels; ++d) {
      for (int64_t i = 0; i < n; ++i) {
        scratch[i * padded + d] = static_cast<A>(source[d * image.channel_stride + i]);
      }
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < image.channels; ++d) {
      scratch[i * padded + d] = static_cast<A>(source[i * image.pixel_stride + d * image.channel_stride]);
    }
  }
}

template <class A, class T>
INSTEMBED_INLINE void store_pixels(const Image<T>& image, int64_t from, int64_t n, const A* scratch) {
  const int64_t padded = padded_channels(image.channels);
  T* target = image.data + from * image.pixel_stride;
  if (image.pixel_stride == 1) {
    for (int64_t d = 0; d < image.channels; ++d) {
      for (int64_t i = 0; i < n; ++i) {
        target[d * image.channel_stride + i] = from_accumulator<T>(scratch[i * padded + d]);
      }
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < image.channels; ++d) {
      target[i * image.pixel_stride + d * image.channel_stride] = from_accumulator<T>(scratch[i * padded + d]);
    }
  }
}

}  // namespace instembed
