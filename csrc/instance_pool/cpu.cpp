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
#include "common/tiles.h"
#include "instance_pool/instance_pool.h"

namespace instembed::instance_pool {
namespace {

constexpr int kTile = 1024;  // pixels: what LabelRuns allows at most

// ---------------------------------------------------------------------------------------------------------
// Kernels. `slots` are those of a dense tile's pixels, null for a tile of runs. Tables have a slot
// an instance, and a last one for pixels of no instance; what lands there is dropped.

// f(start, end, slot) for each run of an instance.
template <class F>
INSTEMBED_INLINE void for_each_member_run(const TileCode& code, F&& f) {
  code.for_each_run([&](int start, int length, int32_t slot) __attribute__((always_inline)) {
    if (slot >= 0) f(start, start + length, slot);
  });
}

// f(pixel, slot) for each pixel of an instance.
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

template <class A>
INSTEMBED_INLINE void sum_line_body(const A* line, const TileCode& code, const int32_t* slots,
                                    int n, double* sums) {
  if (slots) {
    for (int i = 0; i < n; ++i) sums[slots[i]] += line[i];
    return;
  }
  for_each_member_run(code, [&](int start, int end, int32_t slot) __attribute__((always_inline)) {
    Vec<A> total{};
    int i = start;
    for (; i + kLanes<A> <= end; i += kLanes<A>) total += load<Vec<A>>(line + i);
    if (i < end) total += keep(load<Vec<A>>(line + i), first_lanes<A>(end - i));
    sums[slot] += sum_lanes(total);
  });
}

// The maximum of an instance so far, and its pixel: the first of equals. A NaN is larger than
// anything, so that it shows. `best` starts as NaN and `at` as -1.
template <class A>
INSTEMBED_INLINE void offer(A value, int64_t pixel, A* best, int64_t* at) {
  const bool both_numbers = value == value && *best == *best;
  if (*at < 0 || value > *best || (!both_numbers && *best == *best)) {
    *best = value;
    *at = pixel;
  }
}

template <class A>
struct Maxima {
  A* best;
  int64_t* at;

  INSTEMBED_INLINE Maxima operator+(int64_t offset) const { return {best + offset, at + offset}; }
};

// A maximum is seldom beaten: a line is first compared, and looked at closely where something is
// not below the maximum so far.
template <class A>
INSTEMBED_INLINE void max_line_body(const A* line, const TileCode& code, const int32_t* slots,
                                    int n, int64_t first, const Maxima<A>& maxima) {
  if (slots) {
    for (int i = 0; i < n; ++i) {
      const int32_t slot = slots[i];
      if (!(line[i] <= maxima.best[slot])) {
        offer(line[i], first + i, maxima.best + slot, maxima.at + slot);
      }
    }
    return;
  }
  for_each_member_run(code, [&](int start, int end, int32_t slot) __attribute__((always_inline)) {
    const Vec<A> best = splat(maxima.best[slot]);
    Vec<MaskLane<A>> above{};
    int i = start;
    for (; i + kLanes<A> <= end; i += kLanes<A>) above |= ~(load<Vec<A>>(line + i) <= best);
    if (i < end) above |= ~(load<Vec<A>>(line + i) <= best) & first_lanes<A>(end - i);
    if (!any_lane(above)) return;
    for (i = start; i < end; ++i) offer(line[i], first + i, maxima.best + slot, maxima.at + slot);
  });
}

template <class A>
using Short = vector_t<A, kShortLanes>;

template <class A, class T>
INSTEMBED_INLINE void sum_rows_body(const T* pixels, int64_t stride, int64_t channels,
                                    const TileCode& code, const int32_t* slots, int n,
                                    double* table) {
  for_each_member(code, slots, n, [&](int i, int32_t slot) __attribute__((always_inline)) {
    const T* row = pixels + i * stride;
    double* sums = table + slot * channels;
    int64_t d = 0;
    for (; d + kShortLanes <= channels; d += kShortLanes) {
      const auto values = __builtin_convertvector(load_short<A>(row + d), Short<double>);
      store(sums + d, load<Short<double>>(sums + d) + values);
    }
    for (; d < channels; ++d) sums[d] += convert<A>(row[d]);
  });
}

template <class A, class T>
INSTEMBED_INLINE void max_rows_body(const T* pixels, int64_t stride, int64_t channels,
                                    const TileCode& code, const int32_t* slots, int n,
                                    int64_t first, const Maxima<A>& table) {
  for_each_member(code, slots, n, [&](int i, int32_t slot) __attribute__((always_inline)) {
    const T* row = pixels + i * stride;
    const Maxima<A> maxima = table + slot * channels;
    const auto look = [&](int64_t d) __attribute__((always_inline)) {
      offer(convert<A>(row[d]), first + i, maxima.best + d, maxima.at + d);
    };
    int64_t d = 0;
    for (; d + kShortLanes <= channels; d += kShortLanes) {
      if (!any_lane(~(load_short<A>(row + d) <= load<Short<A>>(maxima.best + d)))) continue;
      for (int k = 0; k < kShortLanes; ++k) look(d + k);
    }
    for (; d < channels; ++d) look(d);
  });
}

// values[slot] to each pixel of a line; `none` is the slot of pixels of no instance.
template <class U>
INSTEMBED_INLINE void fill_line_body(U* line, const TileCode& code, const int32_t* slots, int n,
                                     const U* values, int64_t none) {
  if (slots) {
    for (int i = 0; i < n; ++i) line[i] = values[slots[i]];
    return;
  }
  code.for_each_run([&](int start, int length, int32_t slot) __attribute__((always_inline)) {
    const U value = values[slot < 0 ? none : slot];
    const Vec<U> vector = splat(value);
    // Whole vectors are stored while they stay in the tile: what runs over into the next run is
    // overwritten by it.
    int i = start;
    for (; i < start + length && i + kLanes<U> <= n; i += kLanes<U>) store(line + i, vector);
    for (; i < start + length; ++i) line[i] = value;
  });
}

// The kernels as functions of their own, one a target (common/simd.h).
#define INSTEMBED_LINE_KERNELS(A)                                                                \
  INSTEMBED_SIMD void sum_line(const A* line, const TileCode& code, const int32_t* slots, int n, \
                               double* sums) {                                                   \
    sum_line_body(line, code, slots, n, sums);                                                   \
  }                                                                                              \
  INSTEMBED_SIMD void max_line(const A* line, const TileCode& code, const int32_t* slots, int n, \
                               int64_t first, const Maxima<A>& maxima) {                         \
    max_line_body(line, code, slots, n, first, maxima);                                          \
  }

INSTEMBED_LINE_KERNELS(float)
INSTEMBED_LINE_KERNELS(double)

#define INSTEMBED_ROW_KERNELS(T)                                                                   \
  INSTEMBED_SIMD void sum_rows(const T* pixels, int64_t stride, int64_t channels,                  \
                               const TileCode& code, const int32_t* slots, int n, double* table) { \
    sum_rows_body<accumulator_t<T>>(pixels, stride, channels, code, slots, n, table);              \
  }                                                                                                \
  INSTEMBED_SIMD void max_rows(const T* pixels, int64_t stride, int64_t channels,                  \
                               const TileCode& code, const int32_t* slots, int n, int64_t first,   \
                               const Maxima<accumulator_t<T>>& table) {                            \
    max_rows_body(pixels, stride, channels, code, slots, n, first, table);                         \
  }                                                                                                \
  INSTEMBED_SIMD void copy_line(const T* from, int64_t stride, int64_t n, accumulator_t<T>* to) {  \
    if (stride == 1) {                                                                             \
      for (int64_t i = 0; i < n; ++i) to[i] = convert<accumulator_t<T>>(from[i]);                  \
    } else {                                                                                       \
      for (int64_t i = 0; i < n; ++i) to[i] = convert<accumulator_t<T>>(from[i * stride]);         \
    }                                                                                              \
  }

INSTEMBED_ROW_KERNELS(Half)
INSTEMBED_ROW_KERNELS(BFloat16)
INSTEMBED_ROW_KERNELS(float)
INSTEMBED_ROW_KERNELS(double)

#define INSTEMBED_FILL_KERNEL(U)                                                            \
  INSTEMBED_SIMD void fill_line(U* line, const TileCode& code, const int32_t* slots, int n, \
                                const U* values, int64_t none) {                            \
    fill_line_body(line, code, slots, n, values, none);                                     \
  }

INSTEMBED_FILL_KERNEL(uint16_t)
INSTEMBED_FILL_KERNEL(uint32_t)
INSTEMBED_FILL_KERNEL(uint64_t)

// ---------------------------------------------------------------------------------------------------------
// Tables: what a task gathers. In lines slots lie side by side, in rows channels do.

struct Layout {
  bool rows;
  int64_t slots, channels;

  int64_t size() const { return slots * channels; }
  int64_t operator()(int64_t slot, int64_t channel) const {
    return rows ? slot * channels + channel : channel * slots + slot;
  }
};

template <class T>
class SumTable {
 public:
  using A = accumulator_t<T>;

  void reset(int64_t size) { sums_.assign(size, 0.0); }
  void line(const A* line, const TileCode& code, const int32_t* slots, int n, int64_t,
            int64_t offset) {
    sum_line(line, code, slots, n, sums_.data() + offset);
  }
  void rows(const T* pixels, int64_t stride, int64_t channels, const TileCode& code,
            const int32_t* slots, int n, int64_t) {
    sum_rows(pixels, stride, channels, code, slots, n, sums_.data());
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
  void line(const A* line, const TileCode& code, const int32_t* slots, int n, int64_t first,
            int64_t offset) {
    max_line(line, code, slots, n, first, maxima() + offset);
  }
  void rows(const T* pixels, int64_t stride, int64_t channels, const TileCode& code,
            const int32_t* slots, int n, int64_t first) {
    max_rows(pixels, stride, channels, code, slots, n, first, maxima());
  }
  void merge(const MaxTable& other) {
    for (size_t k = 0; k < at_.size(); ++k) {
      if (other.at_[k] >= 0) offer(other.best_[k], other.at_[k], &best_[k], &at_[k]);
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

// Tasks of all images, the bands of the same channels one after another: enough for the threads of
// a large machine, few enough that their tables stay a small part of the features. An image's are
// decided by the image alone.
template <class Slots>
std::vector<Task> cut_into_tasks(const Batch& batch, const TileGrid& grid, bool rows,
                                 Slots&& slots) {
  constexpr int64_t kChannels = 16, kMinTiles = 16, kMaxTasks = 64, kPixelsPerSlot = 32;
  const int64_t group = rows ? std::max<int64_t>(1, batch.channels) : kChannels;
  const int64_t groups = (batch.channels + group - 1) / group;
  std::vector<Task> tasks;
  for (int64_t b = 0; b < batch.images; ++b) {
    const int64_t tiles = grid.first[b + 1] - grid.first[b];
    const int64_t bands =
        std::max<int64_t>(1, std::min({kMaxTasks / std::max<int64_t>(1, groups), tiles / kMinTiles,
                                       batch.count(b) / (kPixelsPerSlot * slots(b))}));
    for (int64_t c = 0; c < batch.channels; c += group) {
      for (int64_t k = 0; k < bands; ++k) {
        tasks.push_back({b, tiles * k / bands, tiles * (k + 1) / bands, c,
                         std::min(group, batch.channels - c)});
      }
    }
  }
  return tasks;
}

// Slots of a dense tile's pixels, `none` for those of no instance; null for a tile of runs.
const int32_t* dense_slots(const TileCode& code, int n, int64_t none, std::vector<int32_t>* room) {
  if (code.is_runs()) return nullptr;
  room->resize(kTile);
  code.unpack(n, room->data());
  for (int i = 0; i < n; ++i) {
    if ((*room)[i] < 0) (*room)[i] = static_cast<int32_t>(none);
  }
  return room->data();
}

bool any_member(const TileCode& code) {
  bool any = false;
  code.for_each_run([&](int, int, int32_t slot) { any = any || slot >= 0; });
  return any;
}

// f(tile's code, slots, first pixel, pixels) for each tile of a task.
template <class F>
void for_each_tile(const Task& task, const TileGrid& grid, const RunsView& runs, int64_t pixels,
                   int64_t none, F&& f) {
  std::vector<int32_t> room;
  for (int64_t t = task.first; t < task.last; ++t) {
    const TileCode code = runs[grid.first[task.image] + t];
    const int64_t from = t * kTile;
    const int n = static_cast<int>(std::min<int64_t>(kTile, pixels - from));
    f(code, dense_slots(code, n, none, &room), from, n);
  }
}

template <class T, class Table>
void gather(const Image<const T>& image, const Task& task, const TileGrid& grid,
            const RunsView& runs, const Layout& layout, Table* table) {
  using A = accumulator_t<T>;
  std::vector<A> scratch(kTile + kLanes<A>);
  for_each_tile(task, grid, runs, image.pixels, layout.slots - 1,
                [&](const TileCode& code, const int32_t* slots, int64_t from, int n) {
                  if (!slots && !any_member(code)) return;
                  const T* source =
                      image.data + task.channel * image.channel_stride + from * image.pixel_stride;
                  if (layout.rows) {
                    table->rows(source, image.pixel_stride, task.channels, code, slots, n, from);
                    return;
                  }
                  bool in_place = false;
                  if constexpr (std::is_same_v<T, A>)
                    in_place = image.template planar_in_place<A>(from, n);
                  for (int64_t d = 0; d < task.channels; ++d, source += image.channel_stride) {
                    const A* line = scratch.data();
                    if constexpr (std::is_same_v<T, A>) line = in_place ? source : line;
                    if (!in_place) copy_line(source, image.pixel_stride, n, scratch.data());
                    table->line(line, code, slots, n, from, layout(0, d));
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
      runs_(labels, Batch::of_labels(labels, offsets), grid_, rules, threads) {
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
  const bool in_rows = lies_in_rows(batch);
  const auto slots = [&](int64_t b) { return runs_.instances(b) + int64_t{1}; };
  const std::vector<Task> tasks = cut_into_tasks(batch, grid_, in_rows, slots);
  std::vector<Table> tables(tasks.size());
  parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t k) {
    const Task& task = tasks[k];
    const Layout layout{in_rows, slots(task.image), task.channels};
    tables[k].reset(layout.size());
    gather(Image<const T>(features, batch, task.image), task, grid_, runs_.view(), layout,
           &tables[k]);
  });

  const int64_t capacity = outputs.pooled.shape[1], channels = batch.channels;
  auto* const pooled = outputs.pooled.as<A>();
  auto* const argmax = outputs.argmax ? outputs.argmax->as<int64_t>() : nullptr;
  std::vector<int64_t> heads;  // first bands
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
    const int64_t b = task.image, instances = runs_.instances(b);
    const Layout layout{in_rows, slots(b), task.channels};
    const auto place = [&](int64_t row) { return (b * capacity + row) * channels + task.channel; };
    for (int64_t slot = 0; slot < instances; ++slot) {
      const int64_t to = place(rows_[b][slot]);
      const auto divisor = reduce == Reduce::mean ? runs_.counts[b][slot] : 1;
      for (int64_t d = 0; d < task.channels; ++d) {
        const int64_t from = layout(slot, d);
        pooled[to + d] = static_cast<A>(table.value(from) / divisor);
        if (argmax) argmax[to + d] = first_pixel(batch, b) + table.at(from);
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
  const auto slots = [&](int64_t b) { return runs_.instances(b) + int64_t{1}; };
  const std::vector<Task> tasks = cut_into_tasks(batch, grid_, in_rows, slots);
  dispatch_floating(grad_features.dtype, "grad_features", [&](auto type) {
    using T = decltype(type);
    using A = accumulator_t<T>;
    using U = typename BitsOf<sizeof(T)>::type;
    prefer_huge_pages(grad_features.data, grad_features.size() * sizeof(T));
    parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t k) {
      const Task& task = tasks[k];
      const int64_t b = task.image;
      const Layout layout{in_rows, slots(b), task.channels};
      std::vector<U> values(layout.size(), U{0});  // zero where there is no instance
      for (int64_t slot = 0; slot < layout.slots - 1; ++slot) {
        const A* row =
            grad.as<const A>() + (b * capacity + rows_[b][slot]) * batch.channels + task.channel;
        const auto divisor = reduce == Reduce::mean ? static_cast<A>(runs_.counts[b][slot]) : A(1);
        for (int64_t d = 0; d < task.channels; ++d) {
          values[layout(slot, d)] = bit_cast<U>(convert<T>(row[d] / divisor));
        }
      }
      const Image<U> image(grad_features, batch, b);
      const int64_t none = layout.slots - 1;
      for_each_tile(task, grid_, runs_.view(), image.pixels, none,
                    [&](const TileCode& code, const int32_t* dense, int64_t from, int n) {
                      U* target = image.data + task.channel * image.channel_stride +
                                  from * image.pixel_stride;
                      const auto fill_row = [&](int i, int64_t slot) {
                        std::copy_n(values.data() + slot * task.channels, task.channels,
                                    target + i * image.pixel_stride);
                      };
                      if (!in_rows) {
                        for (int64_t d = 0; d < task.channels; ++d) {
                          fill_line(target + d * image.channel_stride, code, dense, n,
                                    values.data() + layout(0, d), none);
                        }
                      } else if (dense) {
                        for (int i = 0; i < n; ++i) fill_row(i, dense[i]);
                      } else {
                        code.for_each_run([&](int start, int length, int32_t slot) {
                          for (int i = start; i < start + length; ++i) {
                            fill_row(i, slot < 0 ? none : slot);
                          }
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
  const TileGrid grid(batch, kTile);
  const std::vector<Task> tasks =
      cut_into_tasks(batch, grid, in_rows, [](int64_t) { return int64_t{1}; });
  const int64_t per_image = grad.shape[1] * batch.channels;
  dispatch_floating(grad_features.dtype, "grad_features", [&](auto type) {
    using T = decltype(type);
    using A = accumulator_t<T>;
    prefer_huge_pages(grad_features.data, grad_features.size() * sizeof(T));
    parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t k) {
      const Task& task = tasks[k];
      const Image<T> image(grad_features, batch, task.image);
      const int64_t from = task.first * kTile, to = std::min(image.pixels, task.last * kTile);
      T* target = image.data + task.channel * image.channel_stride + from * image.pixel_stride;
      if (in_rows) {
        for (int64_t i = from; i < to; ++i, target += image.pixel_stride) {
          std::fill_n(target, task.channels, T{});
        }
      } else {
        for (int64_t d = 0; d < task.channels; ++d, target += image.channel_stride) {
          std::fill_n(target, to - from, T{});
        }
      }
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
