// Instance pooling on CUDA.
//
// For N pixels of C channels of T bytes, labels of L bytes and slots of S = 2 bytes (4 above 8192
// instances an image), the bytes that must move are
//   forward   N (L + 3 S + C T)   labels to slots, once, and the features once
//   backward  N (L + 3 S + C T)   labels to slots again, and the gradient once; for max N C T and a
//                                 scattered write an instance and channel
// At (8, 64, 256, 256), float32, int64 labels: 142 MB, 43 us at 3.3 TB/s. Flops: an addition an
// element, in double: 34 M, nothing beside it.
//
// No channel needs another: a block takes up to 64 of them, and tiles of pixels one after the
// other. Of the threads of a channel each has a piece of the tile, and a table of its own in shared
// memory; where that has room for fewer tables than there are threads, several share a piece, each
// with every 2^k-th slot, and where it has room for none there is one table in global memory. A
// thread goes from run to run of its piece, adds up those that are its own, and adds each to the
// table. So sums, in double, have a fixed order, no float needs an atomic, and the cost depends on
// the labels by the number of runs and of instances. Tables are added in order. What is said of
// sums holds for maxima, whose tables have the pixel too.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/label_slots.cuh"
#include "common/tile.cuh"
#include "instance_pool/cuda.h"

namespace instembed::instance_pool {
namespace {

using namespace cuda;

constexpr int kChannels = 64;               // that a block takes, at most
constexpr int64_t kTableBytes = 34 * 1024;  // of a block's tables in shared memory: 3 blocks fit
constexpr int kLeast = 8;                   // pixels of a piece of a tile, at least
constexpr int64_t kTablesAPart = 64;        // instances for which every block has a table

// What becomes of some elements of one channel, in the order of their pixels.
struct Total {
  double sum = 0;

  template <class A>
  __device__ __forceinline__ void take(A value, int64_t) {
    sum += value;
  }
  __device__ __forceinline__ void add(const Total& later) { sum += later.sum; }
};

template <class A>
struct Largest {
  A value = 0;
  int64_t pixel = -1;  // the first of equals; a NaN is larger than anything

  __device__ __forceinline__ void take(A other, int64_t at) {
    const bool larger = pixel < 0 || other > value || (other != other && value == value);
    if (larger) {
      value = other;
      pixel = at;
    }
  }
  __device__ __forceinline__ void add(const Largest& later) {
    if (later.pixel >= 0) take(later.value, later.pixel);
  }
};

template <class T, class Cell>
__global__ void __launch_bounds__(kThreads, sizeof(Cell) > 8 ? 2 : 3)  // Largest needs registers
    pool_kernel(const T* features, Strides strides, Images images, TileShape shape, int channels,
                Codes codes, const int64_t* found, Cell* tables, int64_t rows, int64_t blocks,
                int table_cells) {
  using A = accumulator_t<T>;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp;
  const int chunks = (channels + shape.channels - 1) / shape.channels;
  const int first_channel = static_cast<int>(blockIdx.x % chunks) * shape.channels;
  const int64_t block = blockIdx.x / chunks;
  const int64_t image = block / blocks;
  const auto count = static_cast<int32_t>(found[image] < 0 ? 0 : found[image]);
  if (count == 0) return;
  const Share share = share_of(images, image, block % blocks, parts_of(blocks, rows, count), shape);
  if (share.part >= share.parts) return;

  DynamicShared shared;
  const auto tile = shared.take<A>(shape.channels * shape.row);
  const auto slots = shared.take<int32_t>(shape.pixels);
  const auto ends = shared.take<int32_t>(shape.pixels);  // of the runs, each in 32 pixels
  const auto near_tables = shared.take<Cell>(table_cells);

  shape.channels = min(shape.channels, channels - first_channel);
  const int columns = shape.channels;
  const int64_t cells = int64_t{count} * columns;  // of a table
  const bool fits = cells <= table_cells;
  Cell* far_table = tables + (image * rows + share.part * count) * channels + first_channel;
  const auto for_cells = [&](auto&& f) {  // f(cell of a near table, cell of the far one)
    for (int64_t k = tid; k < cells; k += kThreads) f(k, k / columns * channels + k % columns);
  };

  // Threads of a channel: `pieces` groups of `owners`.
  int pieces = 1, owners = 1;
  while (2 * owners * columns <= kThreads) owners *= 2;
  while (owners > 1 && 2 * pieces * cells <= table_cells && shape.pixels > kLeast * pieces) {
    owners /= 2;
    pieces *= 2;
  }
  const int column = tid % columns, group = tid / columns;
  const int piece = group / owners, own = group % owners;
  const bool works = piece < pieces;
  const auto table = near_tables + static_cast<int>(piece * cells);
  for_cells([&](int64_t near_cell, int64_t far_cell) {
    if (!fits) far_table[far_cell] = Cell();
    for (int k = 0; fits && k < pieces; ++k) near_tables[k * cells + near_cell] = Cell();
  });

  const int64_t start = images.start(image), pixels = images.count(image);
  const T* first = features + strides.at(images, image) + first_channel * strides.channel;
  const int64_t first_pixel = images.offsets ? start : 0;

  for (int64_t t = share.first; t < share.last; ++t) {
    const int64_t from = t * shape.pixels;
    const int n = static_cast<int>(pixels - from < shape.pixels ? pixels - from : shape.pixels);
    __syncthreads();  // the tile before has been added
    bool any = false;
    for (int p = tid; p - lane < n; p += kThreads) {
      const int32_t slot = p < n ? codes[start + from + p] : kIgnored;
      const int32_t before = __shfl_up_sync(kAllLanes, slot, 1);
      const unsigned heads = __ballot_sync(kAllLanes, slot != before) >> lane >> 1;
      if (p >= n) continue;
      slots[p] = slot;
      ends[p] = heads ? p + __ffs(static_cast<int>(heads)) : p - lane + kWarp;
      any = any || slot >= 0;
    }
    if (!__syncthreads_or(any)) continue;
    load_tile(first + from * strides.pixel, strides, n, shape, tile);
    __syncthreads();
    if (!works) continue;
    const auto add = [&](int32_t slot, const Cell& run) {
      if (slot < 0) return;
      if (fits) {
        const int32_t cell = slot * columns + column;
        Cell sum = table[cell];
        sum.add(run);
        table[cell] = sum;
      } else {
        far_table[int64_t{slot} * channels + column].add(run);
      }
    };
    const SharedPtr<A> row = tile + column * shape.row;
    int32_t slot = -1;
    Cell run;
    const int size = shape.pixels / pieces;
    const int stop = min((piece + 1) * size, n);
    for (int p = piece * size; p < stop;) {
      const int32_t here = slots[p];
      const int end = min(static_cast<int>(ends[p]), stop);
      if (here < 0 || (here & (owners - 1)) != own) {
        p = end;
        continue;
      }
      if (here != slot) {
        add(slot, run);
        slot = here;
        run = Cell();
      }
#pragma unroll 4
      for (; p < end; ++p) run.take(static_cast<A>(row[p]), first_pixel + from + p);
    }
    add(slot, run);
  }
  if (!fits) return;
  __syncthreads();
  for_cells([&](int64_t near_cell, int64_t far_cell) {
    Cell all = near_tables[near_cell];
    for (int k = 1; k < pieces; ++k) all.add(static_cast<Cell>(near_tables[k * cells + near_cell]));
    far_table[far_cell] = all;
  });
}

template <class A>
struct Rows {  // of the outputs
  A* pooled;
  uint8_t* valid;
  int64_t *ids, *counts;
  int64_t* argmax;  // null but for max
  int64_t* num_instances;
  int64_t capacity;
  bool mean;
};

template <class A>
__device__ __forceinline__ void write(const Rows<A>& rows, int64_t at, const Total& total,
                                      int64_t count) {
  rows.pooled[at] = static_cast<A>(rows.mean ? total.sum / static_cast<double>(count) : total.sum);
}

template <class A>
__device__ __forceinline__ void write(const Rows<A>& rows, int64_t at, const Largest<A>& largest,
                                      int64_t) {
  rows.pooled[at] = largest.value;
  rows.argmax[at] = largest.pixel;
}

// Adds up the blocks' tables: a thread takes a row and a channel. Rows of no instance become zero,
// in an image that is given up NaN.
template <class A, class Cell>
__global__ void __launch_bounds__(kThreads)
    write_kernel(const Cell* tables, int64_t table_rows, int64_t blocks, int channels,
                 const int64_t* found, const int64_t* invalid, int64_t images, Rows<A> rows) {
  const int64_t total = images * rows.capacity * channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total;
       at += step) {
    const int64_t row = at / channels, image = row / rows.capacity;
    const int channel = static_cast<int>(at % channels);
    const int64_t slot = row % rows.capacity, count = found[image];
    const bool bad = count < 0 || *invalid != 0, valid = !bad && slot < count;
    if (valid) {
      const int64_t parts = parts_of(blocks, table_rows, static_cast<int32_t>(count));
      const Cell* cell = tables + (image * table_rows + slot) * channels + channel;
      Cell result;
#pragma unroll 8
      for (int64_t part = 0; part < parts; ++part) result.add(cell[part * count * channels]);
      write(rows, at, result, rows.counts[row]);
    } else {
      rows.pooled[at] = bad ? static_cast<A>(NAN) : A(0);
      if (rows.argmax) rows.argmax[at] = -1;
    }
    if (channel > 0) continue;
    rows.valid[row] = valid ? 1 : 0;
    if (!valid) {
      rows.ids[row] = 0;
      rows.counts[row] = 0;
    }
    if (slot == 0) {
      rows.num_instances[image] = *invalid ? -1 : (count < 0 ? rows.capacity + 1 : count);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    spread_kernel(const accumulator_t<T>* grad, Images images, TileShape shape, int channels,
                  Codes codes, const int64_t* counts, int64_t capacity, bool mean, T* target,
                  Strides strides, int64_t blocks) {
  using A = accumulator_t<T>;
  const int tid = static_cast<int>(threadIdx.x);
  const int chunks = (channels + shape.channels - 1) / shape.channels;
  const int first_channel = static_cast<int>(blockIdx.x % chunks) * shape.channels;
  const int64_t block = blockIdx.x / chunks;
  const Share share = share_of(images, block / blocks, block % blocks, blocks, shape);
  DynamicShared shared;
  const auto slots = shared.take<int32_t>(shape.pixels);
  const auto factors = shared.take<A>(shape.pixels);
  shape.channels = min(shape.channels, channels - first_channel);

  const int64_t start = images.start(share.image), pixels = images.count(share.image);
  T* first = target + strides.at(images, share.image) + first_channel * strides.channel;
  const A* rows = grad + share.image * capacity * channels + first_channel;
  for (int64_t t = share.first; t < share.last; ++t) {
    const int64_t from = t * shape.pixels;
    const int n = static_cast<int>(pixels - from < shape.pixels ? pixels - from : shape.pixels);
    __syncthreads();  // the tile before has been written
    for (int p = tid; p < n; p += kThreads) {
      const int32_t slot = codes[start + from + p];
      slots[p] = slot;
      factors[p] =
          slot >= 0 && mean ? A(1) / static_cast<A>(counts[share.image * capacity + slot]) : A(1);
    }
    __syncthreads();
    store_tile(first + from * strides.pixel, strides, n, shape, [&](int d, int p) -> A {
      const int32_t slot = slots[p];
      return slot < 0 ? A(0) : rows[int64_t{slot} * channels + d] * factors[p];
    });
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    spread_max_kernel(const accumulator_t<T>* grad, const int64_t* argmax, int64_t images,
                      int64_t capacity, int64_t channels, int64_t pixels, bool ragged, T* target,
                      Strides strides) {
  const int64_t total = images * capacity * channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total;
       at += step) {
    const int64_t pixel = argmax[at];
    if (pixel < 0 || pixel >= pixels) continue;
    const int64_t image = ragged ? 0 : at / (capacity * channels);
    target[image * strides.image + at % channels * strides.channel + pixel * strides.pixel] =
        narrowed<T>(grad[at]);
  }
}

// ---------------------------------------------------------------------------------------------------------
// The host's side

// Tells as many blocks as keep the device busy, at most one a tile.
int64_t blocks_of(const Images& images, const TileShape& shape, int64_t chunks,
                  const DeviceInfo& device) {
  const int64_t count = std::max<int64_t>(images.images, 1);
  const int64_t largest = images.offsets ? images.total : images.pixels;
  const int64_t tiles = std::max<int64_t>((largest + shape.pixels - 1) / shape.pixels, 1);
  return std::clamp<int64_t>(device.processors * 8 / (count * chunks), 1, tiles);
}

TileShape shape_of(DType dtype, int64_t channels) {
  const int64_t own = std::min<int64_t>(channels, kChannels);
  return dtype == DType::f64 ? TileShape::of<double>(own) : TileShape::of<float>(own);
}

int64_t chunks_of(int64_t channels, const TileShape& shape) {
  return (channels + shape.channels - 1) / shape.channels;
}

struct PixelPlan {  // what finds the slots of all pixels
  LabelSlots slots;
  Codes codes{};
  int64_t *found = nullptr, *invalid = nullptr;

  PixelPlan(Workspace* workspace, const Images& images, int64_t capacity) {
    slots.take(workspace, images.images, capacity);
    codes.wide = slot_bytes(capacity) == 4;
    codes.data = workspace->take<char>(images.total * slot_bytes(capacity));
    found = workspace->take<int64_t>(images.images);
    invalid = workspace->take<int64_t>(1);
  }

  void find(const Images& images, const Array& labels, const LabelRules& rules, int64_t* ids,
            int64_t* counts, Stream stream) const {
    check_offsets(images, invalid, stream);
    find_slots(slots, labels, images, rules, codes, found, nullptr, ids, stream);
    number_pixels(slots, images, found, codes, counts, stream);
  }
};

template <class Cell>
struct PoolPlan {
  Workspace workspace;
  PixelPlan pixels;
  int64_t blocks, rows;  // of tables an image
  Cell* tables;

  PoolPlan(void* base, const Images& images, const TileShape& shape, int64_t channels,
           int64_t capacity, const DeviceInfo& device)
      : workspace(base), pixels(&workspace, images, capacity) {
    const int64_t average = images.total / std::max<int64_t>(images.images, 1);
    blocks = blocks_of(images, shape, chunks_of(channels, shape), device);
    rows = std::max(capacity, std::min(blocks * kTablesAPart, average / 16));
    tables = workspace.take<Cell>(images.images * rows * channels);
  }
};

struct SpreadPlan {
  Workspace workspace;
  PixelPlan pixels;
  int64_t* counts;

  SpreadPlan(void* base, const Images& images, int64_t capacity)
      : workspace(base), pixels(&workspace, images, capacity) {
    counts = workspace.take<int64_t>(images.images * capacity);
  }
};

void expect_workspace(const Array& workspace, int64_t bytes) {
  expect_contiguous(workspace, DType::u8, workspace.size(), "workspace");
  expect(workspace.size() >= bytes, "workspace: too small");
}

Images checked_images(const Array& features, const Array& labels, const Array* offsets) {
  expect(features.ndim == 3, "features: expected (images, channels, pixels)");
  expect(labels.ndim == 2 && labels.shape[0] == features.shape[0] &&
             labels.shape[1] == features.shape[2],
         "labels: expected one for each pixel of features");
  return Images::of(features, offsets, nullptr);
}

Strides strides_of(const Array& features) {
  return {features.strides[0], features.strides[1], features.strides[2]};
}

DType sums_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// f(type of an element, a cell) for what `reduce` keeps of features.
template <class F>
void dispatch_cell(DType dtype, Reduce reduce, F&& f) {
  dispatch_floating(dtype, "features", [&](auto element) {
    if (reduce == Reduce::max) {
      f(element, Largest<accumulator_t<decltype(element)>>());
    } else {
      f(element, Total());
    }
  });
}

}  // namespace

int64_t pool_workspace(const Array& features, const Array* offsets, Reduce reduce,
                       int64_t capacity) {
  expect(features.ndim == 3, "features: expected (images, channels, pixels)");
  const Images images = Images::of(features, offsets, nullptr);
  const TileShape shape = shape_of(features.dtype, features.shape[1]);
  int64_t bytes = 0;
  dispatch_cell(features.dtype, reduce, [&](auto, auto cell) {
    bytes =
        PoolPlan<decltype(cell)>(nullptr, images, shape, features.shape[1], capacity, device_info())
            .workspace.used();
  });
  return bytes;
}

int64_t spread_workspace(const Array& features, const Array* offsets, int64_t capacity) {
  expect(features.ndim == 3, "features: expected (images, channels, pixels)");
  return SpreadPlan(nullptr, Images::of(features, offsets, nullptr), capacity).workspace.used();
}

void pool_cuda(const Array& features, const Array& labels, const Array* offsets,
               const LabelRules& rules, Reduce reduce, const Outputs& outputs,
               const Array& num_instances, const Array& workspace, int64_t stream) {
  Images images = checked_images(features, labels, offsets);
  const int64_t channels = features.shape[1];
  expect(
      outputs.ids.ndim == 2 && outputs.ids.shape[0] == images.images && outputs.ids.shape[1] >= 1,
      "ids: expected (images, capacity)");
  const int64_t capacity = outputs.ids.shape[1], cells = images.images * capacity;
  expect_contiguous(outputs.pooled, sums_of(features.dtype), cells * channels, "pooled");
  expect_contiguous(outputs.valid, DType::u8, cells, "valid");
  expect_contiguous(outputs.ids, DType::i64, cells, "ids");
  expect_contiguous(outputs.counts, DType::i64, cells, "counts");
  expect((outputs.argmax != nullptr) == (reduce == Reduce::max), "argmax: wanted for max only");
  if (outputs.argmax) expect_contiguous(*outputs.argmax, DType::i64, cells * channels, "argmax");
  expect_contiguous(num_instances, DType::i64, images.images, "num_instances");
  if (images.images == 0) return;
  const DeviceInfo device = device_info();
  const Stream queue = as_stream(stream);
  const TileShape shape = shape_of(features.dtype, channels);
  const int64_t chunks = chunks_of(channels, shape);

  dispatch_cell(features.dtype, reduce, [&](auto element, auto cell) {
    using T = decltype(element);
    using A = accumulator_t<T>;
    using Cell = decltype(cell);
    const PoolPlan<Cell> plan(workspace.data, images, shape, channels, capacity, device);
    expect_workspace(workspace, plan.workspace.used());
    images.invalid = plan.pixels.invalid;
    auto* counts = outputs.counts.as<int64_t>();
    plan.pixels.find(images, labels, rules, outputs.ids.as<int64_t>(), counts, queue);

    // In pieces of 16 bytes, as padded_bytes() has them.
    const int64_t others =
        padded_bytes<A>(shape.channels * shape.row) + 2 * padded_bytes<int32_t>(shape.pixels) + 16;
    const int64_t room = std::clamp<int64_t>(device.shared - others, 0, kTableBytes);
    const int64_t table_cells =
        std::min(room / static_cast<int64_t>(sizeof(Cell)), capacity * kThreads);
    const int64_t shared = others + padded_bytes<Cell>(table_cells);
    launch(pool_kernel<T, Cell>, "instance_pool", images.images * plan.blocks * chunks, kThreads,
           shared, queue, features.as<const T>(), strides_of(features), images, shape,
           static_cast<int>(channels), plan.pixels.codes, plan.pixels.found, plan.tables, plan.rows,
           plan.blocks, static_cast<int>(table_cells));
    const Rows<A> rows{outputs.pooled.as<A>(),
                       outputs.valid.as<uint8_t>(),
                       outputs.ids.as<int64_t>(),
                       counts,
                       outputs.argmax ? outputs.argmax->as<int64_t>() : nullptr,
                       num_instances.as<int64_t>(),
                       capacity,
                       reduce == Reduce::mean};
    launch(write_kernel<A, Cell>, "instance_pool_write",
           std::min<int64_t>((cells * channels + kThreads - 1) / kThreads, device.processors * 16),
           kThreads, 0, queue, plan.tables, plan.rows, plan.blocks, static_cast<int>(channels),
           plan.pixels.found, plan.pixels.invalid, images.images, rows);
  });
}

void spread_cuda(const Array& grad, const Array& labels, const Array* offsets,
                 const LabelRules& rules, Reduce reduce, const Array& grad_features,
                 const Array& workspace, int64_t stream) {
  Images images = checked_images(grad_features, labels, offsets);
  const int64_t channels = grad_features.shape[1];
  expect(grad.ndim == 3 && grad.shape[0] == images.images && grad.shape[1] >= 1,
         "grad: expected (images, capacity, channels)");
  const int64_t capacity = grad.shape[1];
  expect_contiguous(grad, sums_of(grad_features.dtype), images.images * capacity * channels,
                    "grad");
  expect(reduce != Reduce::max, "reduce: expected mean or sum");
  if (images.images == 0 || images.total == 0) return;
  const Stream queue = as_stream(stream);
  const SpreadPlan plan(workspace.data, images, capacity);
  expect_workspace(workspace, plan.workspace.used());
  images.invalid = plan.pixels.invalid;
  if (images.offsets) {  // which may be none, and then no pixel is an image's
    expect_gapless(grad_features, "grad_features");
    fill_bytes(grad_features.data, 0, grad_features.size() * item_size(grad_features.dtype), queue);
  }
  plan.pixels.find(images, labels, rules, nullptr, plan.counts, queue);

  const TileShape shape = shape_of(grad_features.dtype, channels);
  const int64_t chunks = chunks_of(channels, shape);
  const int64_t blocks = blocks_of(images, shape, chunks, device_info());
  dispatch_floating(grad_features.dtype, "grad_features", [&](auto element) {
    using T = decltype(element);
    using A = accumulator_t<T>;
    launch(spread_kernel<T>, "instance_spread", images.images * blocks * chunks, kThreads,
           padded_bytes<int32_t>(shape.pixels) + padded_bytes<A>(shape.pixels), queue,
           grad.as<const A>(), images, shape, static_cast<int>(channels), plan.pixels.codes,
           plan.counts, capacity, reduce == Reduce::mean, grad_features.as<T>(),
           strides_of(grad_features), blocks);
  });
}

void spread_max_cuda(const Array& grad, const Array& argmax, const Array* offsets,
                     const Array& grad_features, int64_t stream) {
  expect(grad_features.ndim == 3, "grad_features: expected (images, channels, pixels)");
  const Images images = Images::of(grad_features, offsets, nullptr);
  const int64_t channels = grad_features.shape[1];
  expect(grad.ndim == 3 && grad.shape[0] == images.images && grad.shape[2] == channels,
         "grad: expected (images, capacity, channels)");
  expect_contiguous(grad, sums_of(grad_features.dtype), grad.size(), "grad");
  expect_contiguous(argmax, DType::i64, grad.size(), "argmax");
  expect_gapless(grad_features, "grad_features");
  const Stream queue = as_stream(stream);
  fill_bytes(grad_features.data, 0, grad_features.size() * item_size(grad_features.dtype), queue);
  const int64_t blocks = (grad.size() + kThreads - 1) / kThreads;
  dispatch_floating(grad_features.dtype, "grad_features", [&](auto element) {
    using T = decltype(element);
    launch(spread_max_kernel<T>, "instance_spread_max",
           std::min<int64_t>(blocks, device_info().processors * 16), kThreads, 0, queue,
           grad.as<const accumulator_t<T>>(), argmax.as<const int64_t>(), images.images,
           grad.shape[1], channels, grad_features.shape[2], offsets != nullptr,
           grad_features.as<T>(), strides_of(grad_features));
  });
}

}  // namespace instembed::instance_pool
