// Connected components of points on the unit sphere, on CUDA.
//
// Points that take part are packed into tiles in the order of their pixels. A block owns a tile and
// multiplies it with itself and the half of the others that come next, in a circle: each pair of
// tiles once, and no block has more than one pair more than another. Pairs above the threshold are
// united in a forest (forest.cuh) as they are found, so one launch does it all: no N x N, no
// rounds, and nobody waits for anybody. Then components are numbered by their first points, and
// their points put side by side for sums in a fixed order (sphere/segments.cuh).
//
// For N points of D channels, float32:
//   bytes   N (2 D S + 240), N^2 / 128 (2 D) S of the L2 (S = 4 bytes), labels 8 N
//   flops   N^2 D, 4.3 GFLOP at N = 16384 and D = 16, 0.13 ms at 33 TFLOP/s (see
//           sphere/products.cuh);
//           eight reads of the L2 each 4 x 4 pairs of which some are connected, and two each
//           connected pair that has no common parent yet. Converged points make many connected
//           pairs, N^2 / (2 C) in C instances, 4.5 M at C = 30.
// Unlike the CPU kernel this skips no tiles and joins none at once. Reasoned, not measured: the
// kernels have never run on a GPU.
#pragma once

#include <cmath>
#include <limits>

#include "group_on_sphere/cuda.h"
#include "group_on_sphere/forest.cuh"
#include "sphere/products.cuh"
#include "sphere/segments.cuh"

namespace instembed::group_on_sphere {
namespace {

using namespace sphere::device;

static __global__ void __launch_bounds__(kThreads) plant_kernel(Slots entries, int32_t* parents) {
  const Seat seat(entries);
  if (seat.empty()) return;
  parents[seat.slot] = static_cast<int32_t>(seat.slot - entries.first_slot(seat.image));
}

static __global__ void __launch_bounds__(kThreads)
    find_roots_kernel(Slots entries, int32_t* parents) {
  const Seat seat(entries);
  if (seat.empty()) return;
  const int64_t first = entries.first_slot(seat.image);
  parents[seat.slot] = Forest(parents + first).find(static_cast<int32_t>(seat.slot - first));
}

// The cosine of two points, in double.
template <class A>
__device__ __forceinline__ double cosine(const Slots& entries, const A* points, int64_t a,
                                         int64_t b) {
  double sum = 0;
#pragma unroll 1  // this is rare where registers are dear
  for (int d = 0; d < entries.channels; ++d) {
    sum += static_cast<double>(points[entries.at(a, d)]) *
           static_cast<double>(points[entries.at(b, d)]);
  }
  return sum;
}

// Unites connected points of a tile, and of it and the tiles that come next. `slack` is what
// rounding may do to a cosine in A.
template <class A>
__global__ void __launch_bounds__(kThreads, 2)
    connect_kernel(Slots entries, const A* points, double threshold, double slack,
                   int32_t* parents) {
  INSTEMBED_SHARED_VECTORS(A, stage, kStage<A>);
  const Place place(entries, blockIdx.x);
  if (!place.used()) return;
  const Forest forest(parents + place.first);
  const auto least = static_cast<A>(threshold - slack), certain = static_cast<A>(threshold + slack);
  const int64_t tile_elements = int64_t{entries.channels} * kTile;
  const int64_t begin = entries.first_tile(place.image), tiles = entries.tiles_taken(place.image);
  // Itself and (tiles - 1) / 2 more. The one that lies opposite, if tiles are even, is left to the
  // first of the two.
  const int64_t own = place.tile - begin, others = (tiles - (2 * own < tiles ? 0 : 1)) / 2;
  for (int64_t step = 0; step <= others; ++step) {
    const int64_t next = own + step;
    const int64_t other = begin + (next < tiles ? next : next - tiles);
    A cosines[kEach][kEach] = {};
    add_dots(points + place.tile * tile_elements, points + other * tile_elements, entries.channels,
             stage, cosines);
    unsigned near = 0, sure = 0;  // a bit a pair
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
#pragma unroll
      for (int l = 0; l < kEach; ++l) {
        near |= (cosines[k][l] >= least ? 1u : 0u) << (k * kEach + l);
        sure |= (cosines[k][l] >= certain ? 1u : 0u) << (k * kEach + l);
      }
    }
    if (near) {  // those with one parent are together already, the most of what has converged
      const int64_t row = place.tile * kTile + row_of_thread() - place.first;
      const int64_t column = other * kTile + column_of_thread() - place.first;
      int32_t above[kEach], above_other[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        above[k] = forest.parent(static_cast<int32_t>(row) + k);
        above_other[k] = forest.parent(static_cast<int32_t>(column) + k);
      }
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
#pragma unroll
        for (int l = 0; l < kEach; ++l) {
          if (above[k] == above_other[l]) near &= ~(1u << (k * kEach + l));
        }
      }
    }
    for (; near; near &= near - 1) {
      const int bit = __ffs(static_cast<int>(near)) - 1;
      const int64_t r = place.tile * kTile + row_of_thread() + bit / kEach;
      const int64_t c = other * kTile + column_of_thread() + bit % kEach;
      if ((step == 0 && c <= r) || !place.holds(r) || !place.holds(c)) continue;
      const auto a = static_cast<int32_t>(r - place.first);
      const auto b = static_cast<int32_t>(c - place.first);
      if (forest.parent(a) == forest.parent(b)) continue;
      if (sure >> bit & 1 || cosine(entries, points, r, c) >= threshold) forest.unite(a, b);
    }
  }
}

struct Output {
  int64_t* labels;
  void* centers;  // double or float
  bool wide;
  int64_t *counts, *instances;
  int64_t capacity;

  __device__ void set_center(int64_t at, double value) const {
    if (wide) {
      static_cast<double*>(centers)[at] = value;
    } else {
      static_cast<float*>(centers)[at] = static_cast<float>(value);
    }
  }
};

// Sums of instances to unit vectors, zero where points cancel; and the tables. A thread a row.
static __global__ void __launch_bounds__(kThreads)
    tables_kernel(Slots slots, Segments segments, double* sums, Output out) {
  constexpr double kShortest = 1e-12;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t image = i / out.capacity, k = i % out.capacity;
  if (image >= slots.images.images) return;
  const int32_t found = segments.counts[image];
  if (k == 0) {
    const bool invalid = slots.images.offsets && *slots.images.invalid;
    out.instances[image] = invalid ? -1 : found > out.capacity ? out.capacity + 1 : int64_t{found};
  }
  const bool used = k < found && found <= out.capacity;
  out.counts[i] = used ? segments.lengths[slots.first_slot(image) + k] : 0;
  double* sum = used ? sums + (slots.first_slot(image) + k) * slots.channels : nullptr;
  double square = 0;
  for (int d = 0; used && d < slots.channels; ++d) square += sum[d] * sum[d];
  const double scale = square < kShortest * kShortest ? 0 : 1 / sqrt(square);
  for (int d = 0; d < slots.channels; ++d) {
    if (used) sum[d] *= scale;
    out.set_center(i * slots.channels + d, used ? sum[d] : 0);
  }
}

// The instance whose centre is nearest to a point, the first of equal ones.
template <class A>
__device__ int32_t nearest(const Slots& slots, const double* centers, int32_t instances,
                           const A* point, int64_t stride) {
  int32_t found = -1;
  double most = 0;
  for (int32_t k = 0; k < instances; ++k) {
    double sum = 0;
    for (int d = 0; d < slots.channels; ++d) {
      sum += centers[int64_t{k} * slots.channels + d] * point[d * stride];
    }
    if (found < 0 || sum > most) {
      most = sum;
      found = k;
    }
  }
  return found;
}

// Labels, which are zero before; leftovers go to the nearest centre, if they go anywhere, and are
// counted there. A thread an entry.
template <class A>
__global__ void __launch_bounds__(kThreads)
    label_kernel(Slots entries, Segments segments, View<const A> points, const double* centers,
                 bool give_to_nearest, Output out) {
  const Seat seat(entries);
  if (seat.empty()) return;
  const int64_t first = entries.first_slot(seat.image);
  const int32_t instances = segments.counts[seat.image];
  if (instances > out.capacity) return;
  int32_t instance = segments.numbers[first + segments.leaders[seat.slot]];
  if (instance < 0 && give_to_nearest && instances > 0) {
    instance = nearest(entries, centers + first * entries.channels, instances,
                       points.at(entries.images, seat.pixel), points.strides.channel);
    auto* counts = reinterpret_cast<unsigned long long*>(out.counts);
    atomicAdd(counts + seat.image * out.capacity + instance, 1ull);
  }
  out.labels[seat.pixel] = instance + 1;
}

template <class A>
struct Plan {
  Slots entries, slots;  // in the order of pixels, and of instances
  Segments segments;     // leaders are the forest's parents
  A* points = nullptr;   // packed in either order
  double* tile_sums = nullptr;
  double* sums = nullptr;
  Marks marks;
  int64_t* invalid = nullptr;
  int64_t bytes = 0;

  Plan(void* base, const Array& array, const Array* offsets)
      : entries(Images::of(array, offsets, nullptr), array.shape[1]),
        slots(entries),
        marks(slots.images) {
    Workspace workspace(base);
    entries.take(&workspace);
    slots.take(&workspace);
    segments.take(&workspace, slots);
    points = workspace.take<A>(slots.elements());
    tile_sums = workspace.take<double>(slots.tiles() * slots.channels);
    sums = workspace.take<double>(slots.elements());
    marks.take(&workspace);
    invalid = workspace.take<int64_t>(1);
    entries.images.invalid = slots.images.invalid = marks.chunks.images.invalid = invalid;
    bytes = workspace.used();
  }

  void connect(const View<const A>& view, const Integers& mask, double threshold,
               Stream queue) const {
    const Images& images = entries.images;
    const int64_t blocks = blocks_of(entries.slots());
    launch(mark_units_kernel<A>, "mark_units", blocks_of(images.total), kThreads, 0, queue, entries,
           view, mask, marks.values);
    give_slots(entries, marks, nullptr, queue);
    launch(pack_kernel<A>, "pack", entries.tiles(), kThreads, 0, queue, entries, view, points);
    launch(plant_kernel, "plant", blocks, kThreads, 0, queue, entries, segments.leaders);
    const double slack = 4 * (static_cast<double>(entries.channels) + 8) *
                         std::numeric_limits<A>::epsilon();  // as sphere::rounding()
    launch(connect_kernel<A>, "connect", entries.tiles(), kThreads, 0, queue, entries, points,
           threshold, slack, segments.leaders);
    launch(find_roots_kernel, "find_roots", blocks, kThreads, 0, queue, entries, segments.leaders);
  }

  void sum(const View<const A>& view, int64_t min_size, Stream queue) const {
    order(entries, slots, segments, min_size, queue);
    launch(pack_kernel<A>, "pack", slots.tiles(), kThreads, 0, queue, slots, view, points);
    sum_instances(slots, segments, points, tile_sums, sums, queue);
  }
};

template <class F>
void dispatch(const Array& points, F&& f) {
  expect(points.ndim == 3, "points: expected (images, channels, pixels)");
  expect(points.dtype == DType::f32 || points.dtype == DType::f64,
         std::string("points: expected float32 or float64, got ") + name(points.dtype));
  points.dtype == DType::f32 ? f(float{}) : f(double{});
}

}  // namespace

int64_t cuda_workspace(const Array& points, const Array* offsets) {
  int64_t bytes = 0;
  dispatch(points,
           [&](auto type) { bytes = Plan<decltype(type)>(nullptr, points, offsets).bytes; });
  return bytes;
}

void group_cuda(const Array& points, const Array* mask, const Array* offsets,
                const Options& options, const CudaOutput& output, const Array& workspace,
                int64_t stream) {
  dispatch(points, [&](auto type) {
    using A = decltype(type);
    const Images images = Images::of(points, offsets, nullptr);
    const int64_t channels = points.shape[1];
    expect(points.shape[2] <= INT32_MAX, "points: expected less than 2^31 an image");
    expect(options.threshold >= -1 && options.threshold <= 1,
           "threshold: expected a number in [-1, 1]");
    if (mask) {
      expect(
          mask->ndim == 2 && mask->shape[0] == points.shape[0] && mask->shape[1] == points.shape[2],
          "mask: expected the points' shape without channels");
    }
    const Array& centers = output.centers;
    expect(centers.ndim == 3 && centers.shape[1] >= 1, "centers: expected (images, capacity, ...)");
    const int64_t capacity = centers.shape[1];
    expect(centers.dtype == DType::f32 || centers.dtype == DType::f64,
           "centers: expected float32 or float64");
    expect_contiguous(centers, centers.dtype, images.images * capacity * channels, "centers");
    expect_contiguous(output.labels, DType::i64, images.total, "labels");
    expect_contiguous(output.counts, DType::i64, images.images * capacity, "counts");
    expect_contiguous(output.instances, DType::i64, images.images, "instances");
    expect_contiguous(workspace, DType::u8, workspace.size(), "workspace");
    const Plan<A> plan(workspace.data, points, offsets);
    expect(workspace.size() >= plan.bytes, "workspace: too small");

    const Stream queue = as_stream(stream);
    const View<const A> view = View<const A>::of(points);
    const Output out{output.labels.as<int64_t>(),    centers.data,
                     centers.dtype == DType::f64,    output.counts.as<int64_t>(),
                     output.instances.as<int64_t>(), capacity};
    fill_bytes(out.labels, 0, images.total * 8, queue);
    check_offsets(plan.slots.images, plan.invalid, queue);
    plan.connect(view, Integers::of(mask), options.threshold, queue);
    plan.sum(view, options.min_size, queue);
    launch(tables_kernel, "tables", blocks_of(images.images * capacity), kThreads, 0, queue,
           plan.slots, plan.segments, plan.sums, out);
    launch(label_kernel<A>, "label", blocks_of(plan.entries.slots()), kThreads, 0, queue,
           plan.entries, plan.segments, view, plan.sums, options.nearest, out);
  });
}

}  // namespace instembed::group_on_sphere
