// Instance pooling on the CPU.
//
// No channel needs another, so features that lie channel after channel are read line by line: a
// tile's pixels of one channel, run after run of one instance, side by side in memory. Features
// that lie pixel after pixel are read row by row. Either way they are read once, and the gradient
// is written once, from the labels alone.
//
// Tasks are bands of tiles of some of the channels. Each has a table of its own, sums in double or
// maxima with their pixels, and the bands' tables are merged in band order.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "common/dtype.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/simd_widths.h"
#include "common/tiles.h"
#include "instance_pool/instance_pool.h"

namespace instembed::instance_pool {
namespace {

constexpr int kTile = kMaxTile;

// ---------------------------------------------------------------------------------------------------------
// Kernels. Tables have a row of `width` elements an instance, and a last row for pixels of no
// instance; what lands there is dropped.

constexpr int kWidth = kShortLanes;  // lines that are taken side by side

template <class A>
using Short = vector_t<A, kShortLanes>;

// f(first, constant width) for groups of lines that cover all: whole ones, then one line at a time.
template <class F>
INSTEMBED_INLINE void for_each_group(int lines, F&& f) {
  if (lines == kWidth) return f(0, std::integral_constant<int, kWidth>());
  for (int d = 0; d < lines; ++d) f(d, std::integral_constant<int, 1>());
}

template <class A>
INSTEMBED_INLINE PlanarTile<A> lines_from(const PlanarTile<A>& tile, int d) {
  return {tile.row(d), tile.row_stride, tile.ahead};
}

// f(start, end, slot) for each run of an instance.
template <class F>
INSTEMBED_INLINE void for_each_member_run(const TileCode& code, F&& f) {
  code.for_each_run([&](int start, int length, int32_t slot) __attribute__((always_inline)) {
    if (slot >= 0) f(start, start + length, slot);
  });
}

// f(pixel, slot) for the pixels of a tile: those of instances, or with `slots` all.
template <class F>
INSTEMBED_INLINE void for_each_member(const TileCode& code, const int32_t* slots, int n, F&& f) {
  if (slots) {
    for (int i = 0; i < n; ++i) f(i, slots[i]);
    return;
  }
  for_each_member_run(code, [&](int start, int end, int32_t slot) __attribute__((always_inline)) {
    for (int i = start; i < end; ++i) f(i, slot);
  });
}

template <int lines, int kBytes, class A>
INSTEMBED_INLINE void sum_lines_body(const PlanarTile<A>& tile, const TileCode& code,
                                     double* sums) {
  using V = Register<A, kBytes>;
  constexpr int W = kLanesOf<V>;
  for_each_member_run(code, [&](int start, int end, int32_t slot) __attribute__((always_inline)) {
    V totals[lines] = {};
    int i = start;
    for (; i + W <= end; i += W) {
      for (int d = 0; d < lines; ++d) totals[d] += load<V>(tile.row(d) + i);
    }
    if (i < end) {
      const auto rest = first_of<V>(end - i);
      for (int d = 0; d < lines; ++d) totals[d] += keep(load<V>(tile.row(d) + i), rest);
    }
    if constexpr (lines == 1) {
      sums[slot * kWidth] += sum_lanes(totals[0]);
    } else {
      add_lane_sums<A, lines, W>(totals, sums + slot * kWidth);
    }
  });
}

// Maxima so far, and their pixels: the first of equals. A NaN is larger than anything, so that it
// shows. `best` starts as NaN and `at` as -1.
template <class A>
struct Maxima {
  A* best;
  int64_t* at;

  INSTEMBED_INLINE Maxima operator+(int64_t offset) const { return {best + offset, at + offset}; }
};

template <class A>
INSTEMBED_INLINE bool beats(A value, A best, int64_t at) {
  return at < 0 || value > best || (value != value && best == best);
}

template <class A>
INSTEMBED_INLINE void offer(A value, int64_t pixel, const Maxima<A>& maxima) {
  if (!beats(value, *maxima.best, *maxima.at)) return;
  *maxima.best = value;
  *maxima.at = pixel;
}

template <class A>
INSTEMBED_INLINE void offer_run(const A* line, int start, int end, int64_t first,
                                const Maxima<A>& maxima) {
  const bool none_yet = *maxima.at < 0;
  A best = none_yet ? line[start] : *maxima.best;
  int at = none_yet ? start : -1;
  for (int i = start; i < end && best == best; ++i) {
    if (!(line[i] <= best)) {
      best = line[i];
      at = i;
    }
  }
  if (at < 0) return;
  *maxima.best = best;
  *maxima.at = first + at;
}

// The sign bit of a lane is set where a value may beat the maximum so far: where best - value is
// negative or NaN. In integers, because GCC takes comparisons of vectors that are wider than the
// target's apart.
template <class A>
using Bits = std::make_unsigned_t<MaskLane<A>>;
template <class A>
constexpr Bits<A> kSign = Bits<A>{1} << (8 * sizeof(A) - 1);

template <class A, class V>
INSTEMBED_INLINE auto may_beat(const V& values, const V& best) {
  constexpr Bits<A> to_sign = sizeof(A) == 4 ? 0x7fffff : 0xfffffffffffff;  // carries a NaN there
  const auto bits =
      reinterpret_cast<vector_t<Bits<A>, sizeof(V) / sizeof(A)>>(static_cast<V>(best - values));
  return bits | (bits + to_sign);
}

// Lines whose maxima registers hold.
constexpr int kSide = 4;

// A maximum is seldom beaten: only where it may be, a line's run is looked at closely.
template <int side, int kBytes, class A>
INSTEMBED_INLINE void max_run(const PlanarTile<A>& tile, int start, int end, int64_t first,
                              const Maxima<A>& maxima) {
  using V = Register<A, kBytes>;
  constexpr int W = kLanesOf<V>;
  V best[side];
  vector_t<Bits<A>, W> signs[side] = {};
  for (int d = 0; d < side; ++d) best[d] = maxima.best[d] - V{};
  int i = start;
  for (; i + W <= end; i += W) {
    for (int d = 0; d < side; ++d) signs[d] |= may_beat<A>(load<V>(tile.row(d) + i), best[d]);
  }
  const auto rest = first_of<V>(end - i);
  for (int d = 0; d < side; ++d) {
    if (i < end) signs[d] |= keep(may_beat<A>(load<V>(tile.row(d) + i), best[d]), rest);
    if (any_lane(signs[d] & kSign<A>)) offer_run(tile.row(d), start, end, first, maxima + d);
  }
}

template <int lines, int kBytes, class A>
INSTEMBED_INLINE void max_lines_body(const PlanarTile<A>& tile, const TileCode& code, int64_t first,
                                     const Maxima<A>& table) {
  constexpr int side = std::min(lines, kSide);
  for_each_member_run(code, [&](int start, int end, int32_t slot) __attribute__((always_inline)) {
    for (int d = 0; d < lines; d += side) {
      max_run<side, kBytes>(lines_from(tile, d), start, end, first, table + slot * kWidth + d);
    }
  });
}

template <class A, class T>
INSTEMBED_INLINE void sum_rows_body(const T* pixels, int64_t stride, int64_t width,
                                    const TileCode& code, const int32_t* slots, int n,
                                    double* table) {
  for_each_member(code, slots, n, [&](int i, int32_t slot) __attribute__((always_inline)) {
    const T* row = pixels + i * stride;
    double* sums = table + slot * width;
    int64_t d = 0;
    for (; d + kShortLanes <= width; d += kShortLanes) {
      const auto values = __builtin_convertvector(load_short<A>(row + d), Short<double>);
      store(sums + d, load<Short<double>>(sums + d) + values);
    }
    for (; d < width; ++d) sums[d] += convert<A>(row[d]);
  });
}

template <class A, class T>
INSTEMBED_INLINE void max_rows_body(const T* pixels, int64_t stride, int64_t width,
                                    const TileCode& code, const int32_t* slots, int n,
                                    int64_t first, const Maxima<A>& table) {
  for_each_member(code, slots, n, [&](int i, int32_t slot) __attribute__((always_inline)) {
    const T* row = pixels + i * stride;
    const Maxima<A> maxima = table + slot * width;
    int64_t d = 0;
    for (; d + kShortLanes <= width; d += kShortLanes) {
      const auto signs = may_beat<A>(load_short<A>(row + d), load<Short<A>>(maxima.best + d));
      if (!any_lane(signs & kSign<A>)) continue;
      for (int k = 0; k < kShortLanes; ++k)
        offer(convert<A>(row[d + k]), first + i, maxima + d + k);
    }
    for (; d < width; ++d) offer(convert<A>(row[d]), first + i, maxima + d);
  });
}

// The row of a pixel's instance to each of the lines; `none` is the slot of pixels of no instance.
template <int lines, int kBytes, class U>
INSTEMBED_INLINE void fill_lines_body(U* tile, int64_t stride, const TileCode& code,
                                      const int32_t* slots, int n, const U* table, int64_t none) {
  if (slots) {
    for (int d = 0; d < lines; ++d) {
      for (int i = 0; i < n; ++i) tile[d * stride + i] = table[slots[i] * kWidth + d];
    }
    return;
  }
  code.for_each_run([&](int start, int length, int32_t slot) __attribute__((always_inline)) {
    const U* row = table + (slot < 0 ? none : slot) * kWidth;
    using V = Register<U, kBytes>;
    V values[lines];
    for (int d = 0; d < lines; ++d) values[d] = row[d] - V{};
    // Whole vectors are stored while they stay in the tile: what runs over into the next run is
    // overwritten by it.
    int i = start;
    for (; i < start + length && i + kLanesOf<V> <= n; i += kLanesOf<V>) {
      for (int d = 0; d < lines; ++d) store(tile + d * stride + i, values[d]);
    }
    for (; i < start + length; ++i) {
      for (int d = 0; d < lines; ++d) tile[d * stride + i] = row[d];
    }
  });
}

// The kernels as functions of their own, one a target (common/simd.h).
#define INSTEMBED_LINE_KERNELS(A)                                                                \
  INSTEMBED_SIMD_WIDTHS(                                                                         \
      void sum_lines(const PlanarTile<A>& tile, int lines, const TileCode& code, double* table), \
      for_each_group(lines, [&](int d, auto width) __attribute__((always_inline)) {              \
        sum_lines_body<width, kBytes>(lines_from(tile, d), code, table + d);                     \
      }))                                                                                        \
  INSTEMBED_SIMD_WIDTHS(                                                                         \
      void max_lines(const PlanarTile<A>& tile, int lines, const TileCode& code, int64_t first,  \
                     const Maxima<A>& table),                                                    \
      for_each_group(lines, [&](int d, auto width) __attribute__((always_inline)) {              \
        max_lines_body<width, kBytes>(lines_from(tile, d), code, first, table + d);              \
      }))

INSTEMBED_LINE_KERNELS(float)
INSTEMBED_LINE_KERNELS(double)

#define INSTEMBED_ROW_KERNELS(T)                                                                   \
  INSTEMBED_SIMD void sum_rows(const T* pixels, int64_t stride, int64_t width,                     \
                               const TileCode& code, const int32_t* slots, int n, double* table) { \
    sum_rows_body<accumulator_t<T>>(pixels, stride, width, code, slots, n, table);                 \
  }                                                                                                \
  INSTEMBED_SIMD void max_rows(const T* pixels, int64_t stride, int64_t width,                     \
                               const TileCode& code, const int32_t* slots, int n, int64_t first,   \
                               const Maxima<accumulator_t<T>>& table) {                            \
    max_rows_body(pixels, stride, width, code, slots, n, first, table);                            \
  }                                                                                                \
  INSTEMBED_SIMD PlanarTile<accumulator_t<T>> planar_tile(                                         \
      const Image<const T>& image, int64_t from, int64_t n, accumulator_t<T>* scratch) {           \
    return load_planar<accumulator_t<T>>(image, from, n, scratch, planar_stride(kTile));           \
  }                                                                                                \
  INSTEMBED_SIMD void pixel_tile(const Image<const T>& image, int64_t from, int64_t n,             \
                                 accumulator_t<T>* scratch) {                                      \
    load_pixels(image, from, n, scratch);                                                          \
  }

INSTEMBED_ROW_KERNELS(Half)
INSTEMBED_ROW_KERNELS(BFloat16)
INSTEMBED_ROW_KERNELS(float)
INSTEMBED_ROW_KERNELS(double)

#define INSTEMBED_FILL_KERNEL(U)                                                             \
  INSTEMBED_SIMD_WIDTHS(                                                                     \
      void fill_lines(U* tile, int64_t stride, int lines, const TileCode& code,              \
                      const int32_t* slots, int n, const U* table, int64_t none),            \
      for_each_group(lines, [&](int d, auto width) __attribute__((always_inline)) {          \
        fill_lines_body<width, kBytes>(tile + d * stride, stride, code, slots, n, table + d, \
                                       none);                                                \
      }))

INSTEMBED_FILL_KERNEL(uint16_t)
INSTEMBED_FILL_KERNEL(uint32_t)
INSTEMBED_FILL_KERNEL(uint64_t)

// ---------------------------------------------------------------------------------------------------------
// Tables: what a task gathers, in rows of `width`.

template <class T>
class SumTable {
 public:
  using A = accumulator_t<T>;

  void reset(int64_t size) { sums_.assign(size, 0.0); }
  void lines(const PlanarTile<A>& tile, int lines, const TileCode& code, int64_t) {
    sum_lines(tile, lines, code, sums_.data());
  }
  template <class E>
  void rows(const E* pixels, int64_t stride, int64_t width, const TileCode& code,
            const int32_t* slots, int n, int64_t) {
    sum_rows(pixels, stride, width, code, slots, n, sums_.data());
  }
  void merge(const SumTable& other) {
    for (size_t k = 0; k < sums_.size(); ++k) sums_[k] += other.sums_[k];
  }
  double value(int64_t k) const { return sums_[k]; }
  int64_t at(int64_t) const { return -1; }

 private:
  std::vector<double> sums_;
};

template <class T>
class MaxTable {
 public:
  using A = accumulator_t<T>;

  void reset(int64_t size) {
    best_.assign(size, std::numeric_limits<A>::quiet_NaN());
    at_.assign(size, -1);
  }
  void lines(const PlanarTile<A>& tile, int lines, const TileCode& code, int64_t first) {
    max_lines(tile, lines, code, first, maxima());
  }
  template <class E>
  void rows(const E* pixels, int64_t stride, int64_t width, const TileCode& code,
            const int32_t* slots, int n, int64_t first) {
    max_rows(pixels, stride, width, code, slots, n, first, maxima());
  }
  void merge(const MaxTable& other) {
    for (size_t k = 0; k < at_.size(); ++k) {
      if (other.at_[k] >= 0) offer(other.best_[k], other.at_[k], maxima() + k);
    }
  }
  A value(int64_t k) const { return best_[k]; }
  int64_t at(int64_t k) const { return at_[k]; }

 private:
  Maxima<A> maxima() { return {best_.data(), at_.data()}; }

  std::vector<A> best_;
  std::vector<int64_t> at_;
};

// ---------------------------------------------------------------------------------------------------------
// Passes over the batch.

// Channels [channel, channel + channels) of tiles [first, last) of an image.
struct Task {
  int64_t image, first, last, channel, channels;
};

// Tasks of all images: bands(image, pixels, groups of channels) for each group, one after another.
// An image's are decided by the image alone.
template <class Bands>
std::vector<Task> cut_into_tasks(const Batch& batch, const TileGrid& grid, bool rows,
                                 Bands&& bands) {
  const int64_t group = rows ? std::max<int64_t>(1, batch.channels) : kWidth;
  const int64_t groups = (batch.channels + group - 1) / group;
  std::vector<Task> tasks;
  for (int64_t b = 0; b < batch.images; ++b) {
    const int64_t tiles = grid.first[b + 1] - grid.first[b];
    const int64_t count = std::max<int64_t>(1, std::min(tiles, bands(b, batch.count(b), groups)));
    for (int64_t c = 0; c < batch.channels; c += group) {
      const int64_t channels = std::min(group, batch.channels - c);
      for (int64_t k = 0; k < count; ++k) {
        tasks.push_back({b, tiles * k / count, tiles * (k + 1) / count, c, channels});
      }
    }
  }
  return tasks;
}

// Tasks that write the gradient: about a huge page each, which is written as soon as the system
// has cleared it.
std::vector<Task> cut_for_writing(const Batch& batch, const TileGrid& grid, bool rows,
                                  int64_t element) {
  constexpr int64_t kBytes = 2 << 20;
  return cut_into_tasks(batch, grid, rows, [&](int64_t, int64_t pixels, int64_t groups) {
    return pixels * batch.channels * element / (groups * kBytes);
  });
}

int64_t table_width(const Task& task, bool rows) { return rows ? task.channels : kWidth; }

template <class T>
Image<T> image_of(const Task& task, const Array& array, const Batch& batch) {
  Image<T> image(array, batch, task.image);
  image.data += task.channel * image.channel_stride;
  image.channels = task.channels;
  return image;
}

// Slots of a dense tile's pixels, `none` for those of no instance; null for a tile of runs.
const int32_t* dense_slots(const TileCode& code, int n, int32_t none, std::vector<int32_t>* room) {
  if (code.is_runs()) return nullptr;
  room->resize(kTile);
  code.unpack_rows(n, none, room->data());
  return room->data();
}

// f(code, slots, first pixel, pixels) for each tile of a task.
template <class F>
void for_each_tile(const Task& task, const TileGrid& grid, const RunsView& runs, int64_t pixels,
                   int32_t none, F&& f) {
  std::vector<int32_t> room;
  for (int64_t t = task.first; t < task.last; ++t) {
    const TileCode code = runs[grid.first[task.image] + t];
    const int64_t from = t * kTile;
    const int n = static_cast<int>(std::min<int64_t>(kTile, pixels - from));
    f(code, dense_slots(code, n, none, &room), from, n);
  }
}

// Asks for the tile after the current one: runs make the kernels jump from line to line, where the
// hardware's prefetcher loses the thread.
template <class T>
void prefetch_tile(const Image<const T>& image, int64_t from) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t end = std::min(image.pixels, from + kTile);
  for (int64_t d = 0; d < image.channels; ++d) {
    const T* line = image.data + d * image.channel_stride;
    for (int64_t i = from; i < end; i += kLine) __builtin_prefetch(line + i, 0, 2);
  }
}

// What a task's tiles add to its table.
template <class T, class Table>
void gather(const Image<const T>& image, const Task& task, const TileGrid& grid,
            const RunsView& runs, int32_t instances, bool rows, Table* table) {
  using A = accumulator_t<T>;
  std::vector<A> scratch(rows ? 0 : kWidth * planar_stride(kTile));
  for_each_tile(task, grid, runs, image.pixels, instances,
                [&](const TileCode& code, const int32_t* slots, int64_t from, int n) {
                  if (rows) {
                    table->rows(image.data + from * image.pixel_stride, image.pixel_stride,
                                task.channels, code, slots, n, from);
                    return;
                  }
                  if (image.pixel_stride == 1) prefetch_tile(image, from + kTile);
                  if (slots) {
                    pixel_tile(image, from, n, scratch.data());
                    table->rows(scratch.data(), kWidth, kWidth, code, slots, n, from);
                  } else if (code.any_instance()) {
                    table->lines(planar_tile(image, from, n, scratch.data()),
                                 static_cast<int>(task.channels), code, from);
                  }
                });
}

// Where argmax counts an image's pixels from.
int64_t first_pixel(const Batch& batch, int64_t b) { return batch.offsets ? batch.offsets[b] : 0; }

bool lies_in_rows(const Batch& batch) {
  return batch.channel_stride == 1 && batch.pixel_stride != 1;
}

DType accumulation_type(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

void check_pooled(const Array& array, const Batch& batch, DType features, const char* what) {
  expect(array.ndim == 3 && array.shape[0] == batch.images && array.shape[2] == batch.channels,
         std::string(what) + ": expected (images, capacity, channels)");
  expect_contiguous(array, accumulation_type(features), array.size(), what);
}

Batch batch_of_features(const Array& features, const Array* offsets, const char* what) {
  expect(features.ndim == 3, std::string(what) + ": expected (images, channels, pixels)");
  return Batch::of_embeddings(features, offsets);
}

Batch batch_of_gradient(const Array& gradient, const Array* offsets) {
  const Batch batch = batch_of_features(gradient, offsets, "grad_features");
  expect(gradient.size() == 0 || batch.pixel_stride == 1 || batch.channel_stride == 1,
         "grad_features: expected pixels or channels side by side");
  return batch;
}

}  // namespace

Instances::Instances(const Array& labels, const Array* offsets, const LabelRules& rules,
                     int threads)
    : grid_(Batch::of_labels(labels, offsets), kTile),
      runs_(labels, Batch::of_labels(labels, offsets), grid_, rules, threads, {}) {
  const Batch batch = Batch::of_labels(labels, offsets);
  rows_.resize(batch.images);
  for (int64_t b = 0; b < batch.images; ++b) pixels_.push_back(batch.count(b));
  parallel_for(batch.images, threads, [&](int64_t b) {
    const std::vector<int64_t>& ids = runs_.ids[b];
    std::vector<int32_t> order(ids.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return ids[i] < ids[j]; });
    rows_[b].resize(ids.size());
    for (size_t row = 0; row < order.size(); ++row)
      rows_[b][order[row]] = static_cast<int32_t>(row);
  });
}

int64_t Instances::largest() const {
  size_t most = 0;
  for (const auto& ids : runs_.ids) most = std::max(most, ids.size());
  return static_cast<int64_t>(most);
}

void Instances::expect_same_pixels(const Batch& batch, const char* what) const {
  bool same = batch.images == static_cast<int64_t>(pixels_.size());
  for (int64_t b = 0; same && b < batch.images; ++b) same = batch.count(b) == pixels_[b];
  expect(same, std::string(what) + ": expected the pixels of the labels");
}

void Instances::describe(const Outputs& outputs) const {
  const auto images = static_cast<int64_t>(pixels_.size());
  const int64_t capacity = outputs.pooled.shape[1];
  expect(capacity >= largest(), "pooled: expected room for every instance");
  expect_contiguous(outputs.valid, DType::u8, images * capacity, "valid");
  expect_contiguous(outputs.ids, DType::i64, images * capacity, "ids");
  expect_contiguous(outputs.counts, DType::i64, images * capacity, "counts");
  std::fill_n(outputs.valid.as<uint8_t>(), images * capacity, uint8_t{0});
  std::fill_n(outputs.ids.as<int64_t>(), images * capacity, int64_t{0});
  std::fill_n(outputs.counts.as<int64_t>(), images * capacity, int64_t{0});
  for (int64_t b = 0; b < images; ++b) {
    for (size_t slot = 0; slot < rows_[b].size(); ++slot) {
      const int64_t row = b * capacity + rows_[b][slot];
      outputs.valid.as<uint8_t>()[row] = 1;
      outputs.ids.as<int64_t>()[row] = runs_.ids[b][slot];
      outputs.counts.as<int64_t>()[row] = runs_.counts[b][slot];
    }
  }
}

template <class T, class Table>
void Instances::pool_into(const Array& features, const Batch& batch, Reduce reduce,
                          const Outputs& outputs, int threads) const {
  using A = accumulator_t<T>;
  constexpr int64_t kMaxTasks = 64, kMinPixels = 1 << 15, kPixelsPerSlot = 32;
  const bool in_rows = lies_in_rows(batch);
  // Enough for the threads of a large machine, few enough that tables stay a small part of the
  // features.
  const std::vector<Task> tasks =
      cut_into_tasks(batch, grid_, in_rows, [&](int64_t b, int64_t pixels, int64_t groups) {
        return std::min({kMaxTasks / std::max<int64_t>(1, groups), pixels / kMinPixels,
                         pixels / (kPixelsPerSlot * (runs_.instances(b) + int64_t{1}))});
      });
  std::vector<Table> tables(tasks.size());
  parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t k) {
    const Task& task = tasks[k];
    const int32_t instances = runs_.instances(task.image);
    tables[k].reset((instances + int64_t{1}) * table_width(task, in_rows));
    gather(image_of<const T>(task, features, batch), task, grid_, runs_.view(), instances, in_rows,
           &tables[k]);
  });

  const int64_t capacity = outputs.pooled.shape[1], channels = batch.channels;
  auto* const pooled = outputs.pooled.as<A>();
  auto* const argmax = outputs.argmax ? outputs.argmax->as<int64_t>() : nullptr;
  std::vector<int64_t> heads;  // the first band of each image and channels
  for (size_t k = 0; k < tasks.size(); ++k) {
    const bool first =
        k == 0 || tasks[k].image != tasks[k - 1].image || tasks[k].channel != tasks[k - 1].channel;
    if (first) heads.push_back(static_cast<int64_t>(k));
  }
  heads.push_back(static_cast<int64_t>(tasks.size()));
  parallel_for(static_cast<int64_t>(heads.size()) - 1, threads, [&](int64_t h) {
    Table& table = tables[heads[h]];
    for (int64_t k = heads[h] + 1; k < heads[h + 1]; ++k) table.merge(tables[k]);
    const Task& task = tasks[heads[h]];
    const int64_t b = task.image, instances = runs_.instances(b),
                  width = table_width(task, in_rows);
    const auto place = [&](int64_t row) { return (b * capacity + row) * channels + task.channel; };
    for (int64_t slot = 0; slot < instances; ++slot) {
      const int64_t to = place(rows_[b][slot]);
      const auto divisor = reduce == Reduce::mean ? runs_.counts[b][slot] : 1;
      for (int64_t d = 0; d < task.channels; ++d) {
        pooled[to + d] = static_cast<A>(table.value(slot * width + d) / divisor);
        if (argmax) argmax[to + d] = first_pixel(batch, b) + table.at(slot * width + d);
      }
    }
    for (int64_t row = instances; row < capacity; ++row) {
      std::fill_n(pooled + place(row), task.channels, A(0));
      if (argmax) std::fill_n(argmax + place(row), task.channels, int64_t{-1});
    }
  });
}

void Instances::pool(const Array& features, const Array* offsets, Reduce reduce,
                     const Outputs& outputs, int threads) const {
  const Batch batch = batch_of_features(features, offsets, "features");
  expect_same_pixels(batch, "features");
  check_pooled(outputs.pooled, batch, features.dtype, "pooled");
  expect((reduce == Reduce::max) == (outputs.argmax != nullptr), "argmax: expected for max only");
  if (outputs.argmax) {
    expect_contiguous(*outputs.argmax, DType::i64, outputs.pooled.size(), "argmax");
  }
  describe(outputs);
  dispatch_floating(features.dtype, "features", [&](auto type) {
    using T = decltype(type);
    if (reduce == Reduce::max) {
      pool_into<T, MaxTable<T>>(features, batch, reduce, outputs, threads);
    } else {
      pool_into<T, SumTable<T>>(features, batch, reduce, outputs, threads);
    }
  });
}

namespace {

template <size_t bytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = uint16_t;
};
template <>
struct BitsOf<4> {
  using type = uint32_t;
};
template <>
struct BitsOf<8> {
  using type = uint64_t;
};

}  // namespace

void Instances::spread(const Array& grad, const Array* offsets, Reduce reduce,
                       const Array& grad_features, int threads) const {
  const Batch batch = batch_of_gradient(grad_features, offsets);
  expect_same_pixels(batch, "grad_features");
  check_pooled(grad, batch, grad_features.dtype, "grad");
  expect(grad.shape[1] >= largest(), "grad: expected a row for every instance");
  expect(reduce != Reduce::max, "reduce: the gradient of max needs argmax");
  const int64_t capacity = grad.shape[1];
  const bool in_rows = lies_in_rows(batch);
  dispatch_floating(grad_features.dtype, "grad_features", [&](auto type) {
    using T = decltype(type);
    using A = accumulator_t<T>;
    using U = typename BitsOf<sizeof(T)>::type;
    prefer_huge_pages(grad_features.data, grad_features.size() * sizeof(T));
    const std::vector<Task> tasks = cut_for_writing(batch, grid_, in_rows, sizeof(T));
    parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t k) {
      const Task& task = tasks[k];
      const int64_t b = task.image, width = table_width(task, in_rows);
      const int32_t none = runs_.instances(b);
      std::vector<U> table((none + int64_t{1}) * width, U{0});
      for (int64_t slot = 0; slot < none; ++slot) {
        const A* row =
            grad.as<const A>() + (b * capacity + rows_[b][slot]) * batch.channels + task.channel;
        const auto divisor = reduce == Reduce::mean ? static_cast<A>(runs_.counts[b][slot]) : A(1);
        for (int64_t d = 0; d < task.channels; ++d) {
          table[slot * width + d] = bit_cast<U>(convert<T>(row[d] / divisor));
        }
      }
      const auto image = image_of<U>(task, grad_features, batch);
      for_each_tile(task, grid_, runs_.view(), image.pixels, none,
                    [&](const TileCode& code, const int32_t* slots, int64_t from, int n) {
                      U* target = image.data + from * image.pixel_stride;
                      const auto fill_row = [&](int i, int64_t slot) {
                        std::copy_n(table.data() + slot * width, width,
                                    target + i * image.pixel_stride);
                      };
                      if (!in_rows) {
                        fill_lines(target, image.channel_stride, static_cast<int>(task.channels),
                                   code, slots, n, table.data(), none);
                      } else if (slots) {
                        for (int i = 0; i < n; ++i) fill_row(i, slots[i]);
                      } else {
                        code.for_each_run([&](int start, int length, int32_t slot) {
                          for (int i = start; i < start + length; ++i)
                            fill_row(i, slot < 0 ? none : slot);
                        });
                      }
                    });
    });
  });
}

void spread_max(const Array& grad, const Array& argmax, const Array* offsets,
                const Array& grad_features, int threads) {
  const Batch batch = batch_of_gradient(grad_features, offsets);
  check_pooled(grad, batch, grad_features.dtype, "grad");
  expect_contiguous(argmax, DType::i64, grad.size(), "argmax");
  const bool in_rows = lies_in_rows(batch);
  const int64_t per_image = grad.shape[1] * batch.channels;
  dispatch_floating(grad_features.dtype, "grad_features", [&](auto type) {
    using T = decltype(type);
    using A = accumulator_t<T>;
    prefer_huge_pages(grad_features.data, grad_features.size() * sizeof(T));
    const std::vector<Task> tasks =
        cut_for_writing(batch, TileGrid(batch, kTile), in_rows, sizeof(T));
    parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t k) {
      const auto image = image_of<T>(tasks[k], grad_features, batch);
      const int64_t from = tasks[k].first * kTile;
      const int64_t n = std::min(image.pixels, tasks[k].last * kTile) - from;
      T* target = image.data + from * image.pixel_stride;
      // A line a channel, or a row a pixel.
      const int64_t length = in_rows ? image.channels : n;
      const int64_t count = in_rows ? n : image.channels;
      const int64_t stride = in_rows ? image.pixel_stride : image.channel_stride;
      for (int64_t i = 0; i < count; ++i) std::fill_n(target + i * stride, length, T{});
    });
    parallel_for(batch.images, threads, [&](int64_t b) {
      const Image<T> image(grad_features, batch, b);
      const A* values = grad.as<const A>() + b * per_image;
      const int64_t* pixels = argmax.as<const int64_t>() + b * per_image;
      for (int64_t k = 0; k < per_image; ++k) {
        if (pixels[k] < 0) continue;
        const int64_t pixel = pixels[k] - first_pixel(batch, b);
        expect(pixel >= 0 && pixel < image.pixels, "argmax: expected pixels of the image");
        image.data[pixel * image.pixel_stride + k % batch.channels * image.channel_stride] =
            convert<T>(values[k]);
      }
    });
  });
}

}  // namespace instembed::instance_pool
