// Tiles of embeddings in the accumulation type, in the order that a kernel wants, from any memory
// format.
#pragma once

#include <cstdint>

#include "common/batch.h"
#include "common/dtype.h"
#include "common/memory.h"
#include "common/simd.h"

namespace instembed {

// A planar tile: row(d)[i] is channel d of pixel i. A vector may be loaded from any pixel of the
// tile: rows go on for a vector's length, with whatever is there.
template <class A>
struct PlanarTile {
  const A* data;
  int64_t row_stride;
  int64_t ahead = 0;  // the next tile, where it lies along the rows and has not been asked for yet
  INSTEMBED_INLINE const A* row(int64_t d) const { return data + d * row_stride; }

  // Asks for the next tile's pixels that lie `ahead` of pixel i. Kernels do so as they go: asked
  // for at once, a whole tile takes all the buffers that cache misses have, and everything waits.
  INSTEMBED_INLINE void prefetch(int64_t i, int64_t channels) const {
    if (!ahead) return;
    for (int64_t d = 0; d < channels; ++d) __builtin_prefetch(row(d) + i + ahead, 0, 2);
  }
  INSTEMBED_INLINE void prefetch(int64_t i, int64_t length, int64_t channels) const {
    if (!ahead) return;
    constexpr int64_t kLine = 64 / sizeof(A);
    for (int64_t k = 0; k < length; k += kLine) prefetch(i + k, channels);
  }
};

// Channels of a pixel are padded with zeros to whole short vectors in pixel-major tiles and tables.
constexpr int kShortLanes = 8;
inline int64_t padded_channels(int64_t channels) {
  return (channels + kShortLanes - 1) / kShortLanes * kShortLanes;
}

// Pixels a tile: what two copies of a tile need fits the first-level cache, and a row fills whole
// lines.
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
    return std::is_same_v<std::remove_const_t<T>, A> && pixel_stride == 1 &&
           from + n + 16 <= pixels;
  }
};

// A square of kShortLanes x kShortLanes elements changes rows for columns: three rounds of
// interleaving.
template <class A>
INSTEMBED_INLINE void transpose_square(vector_t<A, kShortLanes>* rows) {
  using V = vector_t<A, kShortLanes>;
#pragma GCC unroll 3
  for (int round = 0; round < 3; ++round) {
    V next[kShortLanes];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      next[2 * k] = __builtin_shufflevector(rows[k], rows[k + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      next[2 * k + 1] = __builtin_shufflevector(rows[k], rows[k + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
#pragma GCC unroll 8
    for (int k = 0; k < kShortLanes; ++k) rows[k] = next[k];
  }
}

template <class To, class From>
INSTEMBED_INLINE To convert(From value) {
  if constexpr (std::is_same_v<From, To>) {
    return value;
  } else if constexpr (sizeof(From) < sizeof(To)) {
    return static_cast<To>(value);
  } else {
    return To::from(value);
  }
}

template <class A, class T>
INSTEMBED_INLINE vector_t<A, kShortLanes> load_short(const T* from) {
  if constexpr (std::is_same_v<T, A>) {
    return load<vector_t<A, kShortLanes>>(from);
  } else {
    A values[kShortLanes];
    for (int k = 0; k < kShortLanes; ++k) values[k] = convert<A>(from[k]);
    return load<vector_t<A, kShortLanes>>(values);
  }
}

template <class A, class T>
INSTEMBED_INLINE void store_short(T* to, const vector_t<A, kShortLanes>& v) {
  if constexpr (std::is_same_v<T, A>) {
    store(to, v);
  } else {
    for (int k = 0; k < kShortLanes; ++k) to[k] = convert<T>(static_cast<A>(v[k]));
  }
}

// Whether a matrix may be touched up to a whole number of short vectors past an end.
enum class Padded { none, rows, columns };

// target[c * target_stride + r] = source[r * source_stride + c] for r < rows, c < columns. Padded
// rows are room in the target, which gets zeros; padded columns are elements of the source that may
// be read.
template <Padded padded, class A, class From, class To>
INSTEMBED_INLINE void transpose(const From* source, int64_t source_stride, int64_t rows,
                                int64_t columns, To* target, int64_t target_stride) {
  using V = vector_t<A, kShortLanes>;
  const int64_t square_rows = padded == Padded::rows ? rows : rows / kShortLanes * kShortLanes;
  const int64_t square_columns =
      padded == Padded::columns ? columns : columns / kShortLanes * kShortLanes;
  for (int64_t r = 0; r < square_rows; r += kShortLanes) {
    for (int64_t c = 0; c < square_columns; c += kShortLanes) {
      V square[kShortLanes];
#pragma GCC unroll 8
      for (int k = 0; k < kShortLanes; ++k) {
        const bool inside = padded != Padded::rows || r + k < rows;
        square[k] = inside ? load_short<A>(source + (r + k) * source_stride + c) : V{};
      }
      transpose_square<A>(square);
#pragma GCC unroll 8
      for (int k = 0; k < kShortLanes; ++k) {
        if (padded == Padded::columns && c + k >= columns) break;
        store_short<A>(target + (c + k) * target_stride + r, square[k]);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < square_rows ? square_columns : 0; c < columns; ++c) {
      target[c * target_stride + r] = convert<To>(source[r * source_stride + c]);
    }
  }
  if constexpr (padded == Padded::rows) {
    const int64_t padded_rows = (rows + kShortLanes - 1) / kShortLanes * kShortLanes;
    for (int64_t c = square_columns; c < columns; ++c) {
      for (int64_t r = rows; r < padded_rows; ++r) target[c * target_stride + r] = To{};
    }
  }
}

// Pixels [from, from + n) as a planar tile: in place where they lie so already, else copied to
// `scratch`, which holds channels * planar_stride(tile) elements.
template <class A, class T>
INSTEMBED_INLINE PlanarTile<A> load_planar(const Image<const T>& image, int64_t from, int64_t n,
                                           A* scratch, int64_t stride) {
  const T* source = image.data + from * image.pixel_stride;
  if constexpr (std::is_same_v<T, A>) {
    if (image.template planar_in_place<A>(from, n)) return {source, image.channel_stride, n};
  }
  if (image.channel_stride == 1 && image.pixel_stride != 1) {
    transpose<Padded::rows, A>(source, image.pixel_stride, n, image.channels, scratch, stride);
    return {scratch, stride, 0};
  }
  for (int64_t d = 0; d < image.channels; ++d) {
    const T* row = source + d * image.channel_stride;
    if (image.pixel_stride == 1) {
      for (int64_t i = 0; i < n; ++i) scratch[d * stride + i] = convert<A>(row[i]);
    } else {
      for (int64_t i = 0; i < n; ++i)
        scratch[d * stride + i] = convert<A>(row[i * image.pixel_stride]);
    }
  }
  return {scratch, stride, 0};
}

// The reverse, for a tile that was written to `scratch`; past the caches if `stream`.
template <class A, class T>
INSTEMBED_INLINE void store_planar(const Image<T>& image, int64_t from, int64_t n, const A* scratch,
                                   int64_t stride, bool stream) {
  T* target = image.data + from * image.pixel_stride;
  if (image.channel_stride == 1 && image.pixel_stride != 1) {
    transpose<Padded::columns, A>(scratch, stride, image.channels, n, target, image.pixel_stride);
    return;
  }
  for (int64_t d = 0; d < image.channels; ++d) {
    T* row = target + d * image.channel_stride;
    if (std::is_same_v<T, A> && stream && image.pixel_stride == 1) {
      stream_copy(row, scratch + d * stride, n * sizeof(T));
    } else if (image.pixel_stride == 1) {
      for (int64_t i = 0; i < n; ++i) row[i] = convert<T>(scratch[d * stride + i]);
    } else {
      for (int64_t i = 0; i < n; ++i)
        row[i * image.pixel_stride] = convert<T>(scratch[d * stride + i]);
    }
  }
}

// Pixels [from, from + n), pixel-major: pixel i is at scratch + i * padded_channels, padded with
// zeros.
template <class A, class T>
INSTEMBED_INLINE void load_pixels(const Image<const T>& image, int64_t from, int64_t n,
                                  A* scratch) {
  const int64_t padded = padded_channels(image.channels);
  const T* source = image.data + from * image.pixel_stride;
  if (image.pixel_stride == 1) {
    transpose<Padded::rows, A>(source, image.channel_stride, image.channels, n, scratch, padded);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < image.channels; ++d) {
      scratch[i * padded + d] =
          convert<A>(source[i * image.pixel_stride + d * image.channel_stride]);
    }
    for (int64_t d = image.channels; d < padded; ++d) scratch[i * padded + d] = A(0);
  }
}

template <class A, class T>
INSTEMBED_INLINE void store_pixels(const Image<T>& image, int64_t from, int64_t n,
                                   const A* scratch) {
  const int64_t padded = padded_channels(image.channels);
  T* target = image.data + from * image.pixel_stride;
  if (image.pixel_stride == 1) {
    transpose<Padded::columns, A>(scratch, padded, n, image.channels, target, image.channel_stride);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < image.channels; ++d) {
      target[i * image.pixel_stride + d * image.channel_stride] =
          convert<T>(scratch[i * padded + d]);
    }
  }
}

}  // namespace instembed
