// Label statistics on CUDA.
//
// Bytes: the labels are read once; tables of 72 bytes a hash place and the outputs are small beside
// them. Floor: 8 N bytes for int64 labels over the memory's speed, 5 us for 1024 x 2048 at 3.3
// TB/s. Flops: none to speak of.
//
// A warp walks over 512 consecutive pixels, 32 at a time, of which four times 32 are read at once:
// 31 warps a multiprocessor for 1024 x 2048, each with 1 KB on its way, twice what hides the
// memory's 600 ns. A run of one id in one row is added when the lane that sees its end comes by,
// however many steps it lasted, so that atomics cost by the run and not by the pixel. Integers
// only: their order does not matter. Reasoned, not measured: the kernels have never run on a GPU.
#pragma once

#include "common/id_table.cuh"
#include "common/label_rows.h"
#include "label_statistics/cuda.h"

namespace instembed::label_statistics {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int64_t kSegment = 512;  // pixels that one warp walks over

struct Grid {  // LabelGrid, as a kernel takes it
  int64_t depth, height, width, image_stride, z_stride, y_stride, x_stride, pixels, segments;
};

struct Input {
  const void* labels;
  DType type;
  Grid grid;
  DeviceRules rules;
  int64_t images;
};

struct Point {
  int64_t x, y, z;
};

__device__ __forceinline__ void add(int64_t* address, int64_t value) {
  if (value != 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(address),
              static_cast<unsigned long long>(value));
  }
}

// The run of `length` pixels of `id` whose last one is `last`.
__device__ __forceinline__ void add_run(const Input& input, const IdTables& tables, Extent* extents,
                                        int64_t image, int64_t id, const Point& last,
                                        int64_t length) {
  if (input.rules.is_background(id) || input.rules.is_ignored(id)) return;
  const int32_t place = insert(tables, image, id);
  if (place < 0) return;
  Extent* extent = extents + image * tables.places() + place;
  const int64_t first = last.x - length + 1;
  const int32_t low[3] = {static_cast<int32_t>(first), static_cast<int32_t>(last.y),
                          static_cast<int32_t>(last.z)};
  const int32_t high[3] = {static_cast<int32_t>(last.x), low[1], low[2]};
  // Lows only fall and highs only rise: a stale one costs an atomic, never a wrong result. All are
  // read before any is needed.
  int32_t lowest[3], highest[3];
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    lowest[axis] = static_cast<volatile int32_t*>(extent->low)[axis];
    highest[axis] = static_cast<volatile int32_t*>(extent->high)[axis];
  }
  add(&extent->area, length);
  add(&extent->sum[0], (first + last.x) * length / 2);
  add(&extent->sum[1], last.y * length);
  add(&extent->sum[2], last.z * length);
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    if (low[axis] < lowest[axis]) atomicMin(&extent->low[axis], low[axis]);
    if (high[axis] > highest[axis]) atomicMax(&extent->high[axis], high[axis]);
  }
}

__device__ __forceinline__ Point before(const Grid& grid, Point p) {
  if (--p.x < 0) {
    p.x = grid.width - 1;
    if (--p.y < 0) {
      p.y = grid.height - 1;
      --p.z;
    }
  }
  return p;
}

__device__ __forceinline__ Point at(const Grid& grid, int64_t i) {
  const int64_t row = i / grid.width;
  return {i - row * grid.width, row % grid.height, row / grid.height};
}

__device__ __forceinline__ void advance(const Grid& grid, Point* p, int64_t by) {
  p->x += by;
  while (p->x >= grid.width) {
    p->x -= grid.width;
    if (++p->y == grid.height) {
      p->y = 0;
      ++p->z;
    }
  }
}

__global__ void __launch_bounds__(kThreads) clear_extents_kernel(Extent* extents, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    Extent empty{};
    for (int axis = 0; axis < 3; ++axis) {
      empty.low[axis] = INT32_MAX;
      empty.high[axis] = -1;
    }
    extents[i] = empty;
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    add_runs_kernel(Input input, IdTables tables, Extent* extents) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t image = warp / input.grid.segments;
  if (image >= input.images) return;
  const Grid& grid = input.grid;
  const int64_t from = warp % grid.segments * kSegment;
  const int64_t to = from + kSegment < grid.pixels ? from + kSegment : grid.pixels;

  Point p = at(grid, from + lane), ahead = p;
  int64_t pending_id = 0, pending_start = from;  // of the run that the step before left open
  int64_t ids[kAhead];
  int loaded = 0;
#pragma unroll 1
  for (int64_t i = from + lane; i - lane < to; i += kWarp) {
    if (loaded == 0) {
      int64_t offsets[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        offsets[k] = image * grid.image_stride + ahead.z * grid.z_stride + ahead.y * grid.y_stride +
                     ahead.x * grid.x_stride;
        advance(grid, &ahead, kWarp);
      }
      load_ids(input.labels, input.type, offsets, to - i, ids);
      loaded = kAhead;
    }
    --loaded;
    const int64_t id = ids[0];
#pragma unroll
    for (int k = 1; k < kAhead; ++k) ids[k - 1] = ids[k];
    const bool inside = i < to;
    int64_t previous = __shfl_up_sync(kAllLanes, id, 1);
    if (lane == 0) previous = pending_id;
    const bool starts = inside && i > from && (id != previous || p.x == 0);
    const unsigned heads = __ballot_sync(kAllLanes, starts);
    if (starts) {
      const unsigned lower_heads = heads & ((1u << lane) - 1);
      const int64_t start = lower_heads
                                ? i - lane + (kWarp - 1 - __clz(static_cast<int>(lower_heads)))
                                : pending_start;
      add_run(input, tables, extents, image, previous, before(grid, p), i - start);
    }
    const int64_t step_end = i - lane + kWarp < to ? i - lane + kWarp : to;
    pending_id = __shfl_sync(kAllLanes, id, static_cast<int>(step_end - 1 - (i - lane)));
    if (heads) pending_start = i - lane + (kWarp - 1 - __clz(static_cast<int>(heads)));
    advance(grid, &p, kWarp);
  }
  if (lane == 0 && to > from) {
    add_run(input, tables, extents, image, pending_id, at(grid, to - 1), to - pending_start);
  }
}

struct Output {
  int64_t* ids;
  float* boxes;
  int64_t* areas;
  float* centroids;
  int64_t* num_instances;
  int axes;
};

__global__ void __launch_bounds__(kThreads)
    write_kernel(IdTables tables, const Extent* extents, Output out, int parts) {
  const int64_t image = blockIdx.x / parts;
  const int part = static_cast<int>(blockIdx.x % parts);
  const int64_t capacity = tables.capacity, first = image * capacity;
  const int axes = out.axes;
  const int32_t n = instances_of(tables, image);
  rank_ids(tables, image, part, parts, [&](int32_t place, int32_t rank, int64_t id) {
    const Extent extent = extents[image * tables.places() + place];
    const int64_t row = first + rank;
    out.ids[row] = id;
    out.areas[row] = extent.area;
    for (int axis = 0; axis < 3; ++axis) {
      if (axis >= axes) break;
      out.boxes[row * 2 * axes + axis] = static_cast<float>(extent.low[axis]);
      out.boxes[row * 2 * axes + axes + axis] =
          static_cast<float>(static_cast<int64_t>(extent.high[axis]) + 1);
      out.centroids[row * axes + axis] = static_cast<float>(static_cast<double>(extent.sum[axis]) /
                                                            static_cast<double>(extent.area));
    }
  });
  for (int64_t k = n + part * kThreads + threadIdx.x; k < capacity; k += parts * kThreads) {
    const int64_t row = first + k;
    out.ids[row] = 0;
    out.areas[row] = 0;
    for (int j = 0; j < 2 * axes; ++j) out.boxes[row * 2 * axes + j] = 0;
    for (int j = 0; j < axes; ++j) out.centroids[row * axes + j] = 0;
  }
  if (part == 0 && threadIdx.x == 0) {
    const int32_t count = tables.counts[image];
    out.num_instances[image] = count > capacity ? capacity + 1 : count;
  }
}

struct Plan {
  IdTables tables;
  Extent* extents = nullptr;
  int64_t bytes = 0;

  Plan(void* base, int64_t images, int64_t capacity) {
    Workspace workspace(base);
    tables.take(&workspace, images, capacity);
    extents = workspace.take<Extent>(images * tables.places());
    bytes = workspace.used();
  }
};

}  // namespace

int64_t cuda_workspace(const Array& labels, int64_t capacity) {
  return Plan(nullptr, labels.shape[0], capacity).bytes;
}

void measure_cuda(const Array& labels, const LabelRules& rules, const Array& ids,
                  const Array& boxes, const Array& areas, const Array& centroids,
                  const Array& num_instances, const Array& workspace, int64_t stream) {
  const LabelGrid grid(labels);
  expect(ids.ndim == 2 && ids.shape[0] == grid.images && ids.shape[1] >= 1,
         "ids: expected (images, capacity)");
  const int64_t images = grid.images, capacity = ids.shape[1], axes = labels.ndim - 1;
  expect_contiguous(ids, DType::i64, images * capacity, "ids");
  expect_contiguous(boxes, DType::f32, images * capacity * 2 * axes, "boxes");
  expect_contiguous(areas, DType::i64, images * capacity, "areas");
  expect_contiguous(centroids, DType::f32, images * capacity * axes, "centroids");
  expect_contiguous(num_instances, DType::i64, images, "num_instances");
  const Plan plan(workspace.data, images, capacity);
  expect_contiguous(workspace, DType::u8, workspace.size(), "workspace");
  expect(workspace.size() >= plan.bytes, "workspace: too small");
  if (images == 0) return;

  const Stream queue = as_stream(stream);
  const int64_t segments = (grid.pixels() + kSegment - 1) / kSegment;
  const Input input{labels.data,
                    labels.dtype,
                    {grid.depth, grid.height, grid.width, grid.image_stride, grid.z_stride,
                     grid.y_stride, grid.x_stride, grid.pixels(), segments},
                    DeviceRules::of(rules),
                    images};
  clear_tables(plan.tables, images, queue);
  const int64_t places = images * plan.tables.places();
  launch(clear_extents_kernel, "clear_extents", (places + 1023) / 1024, kThreads, 0, queue,
         plan.extents, places);
  launch(add_runs_kernel, "label_statistics", (images * segments * kWarp + kThreads - 1) / kThreads,
         kThreads, 0, queue, input, plan.tables, plan.extents);
  const auto parts = static_cast<int>(rank_blocks(capacity));
  launch(write_kernel, "label_statistics_write", images * parts, kThreads, 0, queue, plan.tables,
         plan.extents,
         Output{ids.as<int64_t>(), boxes.as<float>(), areas.as<int64_t>(), centroids.as<float>(),
                num_instances.as<int64_t>(), static_cast<int>(axes)},
         parts);
}

}  // namespace instembed::label_statistics
