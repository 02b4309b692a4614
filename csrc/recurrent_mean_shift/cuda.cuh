// One iteration of mean shift on the unit sphere, and its gradient, on CUDA.
//
// Points that take part are packed into tiles. A block owns the 64 rows of a tile, walks over all
// tiles of its image in their order, and computes of each the 64 x 64 similarities, the kernel
// values, and their products with the points: an attention whose largest logit is known, so there
// is no online maximum. Sums stay in registers, nothing of size N x N exists, and no block waits
// for another. Backward computes the similarities anew. Where all 64 x 64 values are below
// tolerance / 64, the exponentials are zero and the products are left out.
//
// For N points of D channels, float32, a pass moves
//   N (2 D S + 9)              points packed, flags and slots
// + N^2 / 64 (2 D) S           tiles of rows and columns, from the L2 (S = 4 bytes)
// + N (3 D + 2) S              sums written, read, and the result.
// and does N^2 (4 D + 2) flops and N^2 exponentials forward, N^2 (10 D + 8) backward. At N = 16384,
// D = 16: 18 and 45 GFLOP, 0.55 and 1.4 ms at 33 TFLOP/s (see sphere/products.cuh); 0.54 GB of the
// L2 a pass and 2 x 8 MB of DRAM. Arithmetic is the limit. Not done, and worth it: an order that
// puts neighbours together, as on the CPU, with caps that skip whole tiles; the symmetry of the
// matrix; tensor cores, which would need three products of halves for the digits of a float.
// Reasoned, not measured: the kernels have never run on a GPU.
//
// More channels than 64 (16 in double) are shared out to several blocks, which each compute the
// similarities.
#pragma once

#include <cmath>
#include <limits>

#include "recurrent_mean_shift/cuda.h"
#include "sphere/products.cuh"

namespace instembed::recurrent_mean_shift {
namespace {

using namespace sphere::device;

template <class A>
struct Numbers {  // of the rule
  A scale;        // of -|x - y|^2 / 2 in the power of 2
  A least;        // powers below it do not count
  A rate;

  explicit Numbers(const Rule& rule) {
    const double smallest = std::max<double>(rule.tolerance / kTile, std::numeric_limits<A>::min());
    scale = static_cast<A>(rule.rate() * 1.44269504088896340736);  // log2(e)
    least = static_cast<A>(std::log2(smallest));
    rate = static_cast<A>(rule.rate());
  }
};

// What kernels have of every slot. Vectors are packed like the points.
template <class A>
struct Fields {
  A* points = nullptr;
  A* halves = nullptr;   // |x|^2 / 2: x . y - halves is -|x - y|^2 / 2 however lengths were rounded
  A* vectors = nullptr;  // sums over pairs
  A* a = nullptr;        // of the formula's gradient
  A* b = nullptr;
};

template <class A>
constexpr A kFar = std::numeric_limits<A>::max() / 4;  // a half that makes every value zero

template <class A>
__device__ __forceinline__ A power_of_2(A x) {
  if constexpr (sizeof(A) == 4) {
    return exp2f(x);
  } else {
    return exp2(x);
  }
}

// Points that take no part: target = source, and 1 for their state. Without offsets that are any,
// no point exists; then all is NaN.
template <class A>
__global__ void __launch_bounds__(kThreads)
    copy_others_kernel(Slots slots, const uint8_t* marks, View<const A> source, View<A> target,
                       A* norms, A* denominators) {
  const Images& images = slots.images;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= images.total) return;
  const bool invalid = images.offsets && *images.invalid;
  if (marks[i] && !invalid) return;
  const A nan = static_cast<A>(NAN);
  if (norms) norms[i] = denominators[i] = invalid ? nan : A(1);
  const A* from = source.at(images, i);
  A* to = target.at(images, i);
  for (int d = 0; d < slots.channels; ++d) {
    to[d * target.strides.channel] = invalid ? nan : from[d * source.strides.channel];
  }
}

// A thread a slot, those of an image's last tile that hold no point among them: they are far from
// everything.
template <class A>
__global__ void __launch_bounds__(kThreads) halves_kernel(Slots slots, Fields<A> fields) {
  const Seat seat(slots);
  if (seat.slot >= slots.slots()) return;
  A square = 0;
  for (int d = 0; !seat.empty() && d < slots.channels; ++d) {
    const A x = fields.points[slots.at(seat.slot, d)];
    square += x * x;  // as add_dots() sums x . x
  }
  fields.halves[seat.slot] = seat.empty() ? kFar<A> : square * static_cast<A>(0.5);
}

// Dot products to kernel values, of rows `row` and columns `column` on. Returns whether any counts.
template <class A>
__device__ __forceinline__ bool to_kernel(const Fields<A>& fields, const Numbers<A>& numbers,
                                          int64_t row, int64_t column, A (&dots)[kEach][kEach]) {
  bool any = false;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const A half = fields.halves[row + k];
#pragma unroll
    for (int l = 0; l < kEach; ++l) {
      const A power = (dots[k][l] - half - fields.halves[column + l]) * numbers.scale;
      const bool counts = power >= numbers.least;
      any = any || counts;
      // Rounding may leave a power just above 0.
      dots[k][l] = counts ? power_of_2(power < 0 ? power : A(0)) : A(0);
    }
  }
  return any;
}

// K to W of the formula, from `dots`, which are a_i . x_j + a_j . x_i. A point and itself do not
// count: that is along the point, and the gradient is tangent.
template <class A>
__device__ __forceinline__ void to_weights(const Fields<A>& fields, const Numbers<A>& numbers,
                                           int64_t row, int64_t column, SharedPtr<A> kernel,
                                           A (&dots)[kEach][kEach]) {
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const A b = fields.b[row + k];
#pragma unroll
    for (int l = 0; l < kEach; ++l) {
      const A value = kernel[(row_of_thread() + k) * kPitch + column_of_thread() + l];
      const A other = fields.b[column + l];
      dots[k][l] = row + k == column + l ? A(0) : value * numbers.rate * (dots[k][l] - b - other);
    }
  }
}

// vectors = sum_j K_ij x_j and sums = sum_j K_ij; with weights, sum_j [ K_ij a_j + W_ij x_j ]. A
// tile of rows has `groups` blocks, each for U kSide channels of the vectors.
template <class A, int U, bool weighted>
__global__ void __launch_bounds__(kThreads, 2)
    pairs_kernel(Slots slots, Fields<A> fields, Numbers<A> numbers, A* sums, int groups) {
  INSTEMBED_SHARED_VECTORS(A, stage, kStage<A>);
  INSTEMBED_SHARED_VECTORS(A, kernel, kTile * kPitch);
  const Place place(slots, blockIdx.x / groups);
  if (!place.used()) return;
  const int first = static_cast<int>(blockIdx.x % groups) * U * kSide;
  const int channels = slots.channels, left = channels - first;
  const int64_t row = place.tile * kTile + row_of_thread();
  const int64_t tile_elements = int64_t{channels} * kTile;
  RowSums<A, U> rows;
  for (int64_t t = 0; t < slots.tiles_taken(place.image); ++t) {
    const int64_t other = slots.first_tile(place.image) + t;
    const int64_t column = other * kTile + column_of_thread();
    const int64_t here = place.tile * tile_elements, there = other * tile_elements;
    A values[kEach][kEach] = {};
    add_dots(fields.points + here, fields.points + there, channels, stage, values);
    const bool counts = to_kernel(fields, numbers, row, column, values);
    if (!__syncthreads_or(counts)) continue;
    put(values, kernel);
    A vectors[kEach][U] = {};
    if constexpr (weighted) {
      add_products(kernel, fields.a + there + first * kTile, left, stage, vectors);
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
#pragma unroll
        for (int l = 0; l < kEach; ++l) values[k][l] = 0;
      }
      add_dots(fields.a + here, fields.points + there, channels, stage, values);
      add_dots(fields.points + here, fields.a + there, channels, stage, values);
      to_weights(fields, numbers, row, column, kernel, values);
      put(values, kernel);
    } else {
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        A sum = 0;
#pragma unroll
        for (int l = 0; l < kEach; ++l) sum += values[k][l];
        rows.numbers[k].add(sum);
      }
    }
    add_products(kernel, fields.points + there + first * kTile, left, stage, vectors);
    rows.add_vectors(vectors);
  }
  rows.write_vectors(slots, place.tile, first, fields.vectors);
  if (!weighted && first == 0) rows.write_numbers(place.tile, sums);
}

// z, and the new point. A thread a slot.
template <class A>
__global__ void __launch_bounds__(kThreads)
    shift_kernel(Slots slots, Fields<A> fields, double step, const A* sums, View<A> shifted,
                 A* norms, A* denominators) {
  const Seat seat(slots);
  if (seat.empty()) return;
  const double share = step / sums[seat.slot];
  const auto z = [&](int d) {
    const int64_t at = slots.at(seat.slot, d);
    return share * fields.vectors[at] + (1 - step) * fields.points[at];
  };
  double square = 0;
  for (int d = 0; d < slots.channels; ++d) square += z(d) * z(d);
  const double norm = sqrt(square), scale = norm < kShortest ? 0 : 1 / norm;
  A* to = shifted.at(slots.images, seat.pixel);
  for (int d = 0; d < slots.channels; ++d) {
    to[d * shifted.strides.channel] = static_cast<A>(scale * z(d));
  }
  norms[seat.pixel] = static_cast<A>(scale == 0 ? 0 : norm);
  denominators[seat.pixel] = sums[seat.slot];
}

template <class A>
struct Given {  // to the backward pass: the gradient of the new points, and what forward left
  View<const A> gradient, shifted;
  const A* norms;
  const A* denominators;
};

// dz_i of the formula.
template <class A>
class Change {
 public:
  __device__ Change(const Slots& slots, const Given<A>& given, int64_t pixel)
      : gradient_(given.gradient.at(slots.images, pixel)),
        shifted_(given.shifted.at(slots.images, pixel)),
        gradient_stride_(given.gradient.strides.channel),
        shifted_stride_(given.shifted.strides.channel),
        scale_(given.norms[pixel] == 0 ? 0 : 1 / static_cast<double>(given.norms[pixel])) {
    for (int d = 0; d < slots.channels; ++d) along_ += gradient(d) * shifted(d);
  }
  __device__ double operator[](int d) const {
    return scale_ == 0 ? 0 : scale_ * (gradient(d) - along_ * shifted(d));
  }

 private:
  __device__ double gradient(int d) const { return gradient_[d * gradient_stride_]; }
  __device__ double shifted(int d) const { return shifted_[d * shifted_stride_]; }

  const A* gradient_;
  const A* shifted_;
  int64_t gradient_stride_, shifted_stride_;
  double scale_, along_ = 0;
};

// a and b of the formula; zero at slots without a point. A thread a slot.
template <class A>
__global__ void __launch_bounds__(kThreads)
    weights_kernel(Slots slots, Fields<A> fields, double step, Given<A> given) {
  const Seat seat(slots);
  if (seat.slot >= slots.slots()) return;
  if (seat.empty()) {
    for (int d = 0; d < slots.channels; ++d) fields.a[slots.at(seat.slot, d)] = 0;
    fields.b[seat.slot] = 0;
    return;
  }
  const Change<A> dz(slots, given, seat.pixel);
  const double share = 1 / static_cast<double>(given.denominators[seat.pixel]);
  double b = 0;
  for (int d = 0; d < slots.channels; ++d) {
    const int64_t at = slots.at(seat.slot, d);
    fields.a[at] = static_cast<A>(step * share * dz[d]);
    b += dz[d] * fields.points[at];
  }
  fields.b[seat.slot] = static_cast<A>((step - 1) * share * b);
}

// (1 - step) dz and the sum over pairs, without what is along the point. A thread a slot.
template <class A>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(Slots slots, Fields<A> fields, double step, Given<A> given, View<A> grad) {
  const Seat seat(slots);
  if (seat.empty()) return;
  const Change<A> dz(slots, given, seat.pixel);
  const auto sum = [&](int d) {
    return (1 - step) * dz[d] + fields.vectors[slots.at(seat.slot, d)];
  };
  double along = 0, square = 0;
  for (int d = 0; d < slots.channels; ++d) {
    const double x = fields.points[slots.at(seat.slot, d)];
    along += sum(d) * x;
    square += x * x;
  }
  A* to = grad.at(slots.images, seat.pixel);
  for (int d = 0; d < slots.channels; ++d) {
    to[d * grad.strides.channel] =
        static_cast<A>(sum(d) - along / square * fields.points[slots.at(seat.slot, d)]);
  }
}

template <class A>
struct Plan {
  Slots slots;
  Fields<A> fields;
  A* sums = nullptr;
  Marks marks;
  int64_t* invalid = nullptr;
  int64_t bytes = 0;

  Plan(void* base, const Array& points, const Array* offsets, bool backward)
      : slots(Images::of(points, offsets, nullptr), points.shape[1]), marks(slots.images) {
    Workspace workspace(base);
    slots.take(&workspace);
    fields.points = workspace.take<A>(slots.elements());
    fields.vectors = workspace.take<A>(slots.elements());
    fields.halves = workspace.take<A>(slots.slots());
    if (backward) {
      fields.a = workspace.take<A>(slots.elements());
      fields.b = workspace.take<A>(slots.slots());
    } else {
      sums = workspace.take<A>(slots.slots());
    }
    marks.take(&workspace);
    invalid = workspace.take<int64_t>(1);
    slots.images.invalid = marks.chunks.images.invalid = invalid;
    bytes = workspace.used();
  }

  // Finds the points that take part, and packs them.
  void collect(const Array& points, const Array* mask, Stream queue) const {
    const View<const A> view = View<const A>::of(points);
    check_offsets(slots.images, invalid, queue);
    launch(mark_units_kernel<A>, "mark_units", blocks_of(slots.images.total), kThreads, 0, queue,
           slots, view, Integers::of(mask), marks.values);
    give_slots(slots, marks, nullptr, queue);
    launch(pack_kernel<A>, "pack", slots.tiles(), kThreads, 0, queue, slots, view, fields.points);
    launch(halves_kernel<A>, "halves", blocks_of(slots.slots()), kThreads, 0, queue, slots, fields);
  }

  template <bool weighted>
  void sum_pairs(const Rule& rule, Stream queue) const {
    with_channels<A>(slots.channels, [&](auto each) {
      constexpr int U = decltype(each)::value;
      const int groups = (slots.channels + U * kSide - 1) / (U * kSide);
      launch(pairs_kernel<A, U, weighted>, "recurrent_mean_shift", slots.tiles() * groups, kThreads,
             0, queue, slots, fields, Numbers<A>(rule), sums, groups);
    });
  }
};

template <class F>
void dispatch(const Array& points, F&& f) {
  expect(points.dtype == DType::f32 || points.dtype == DType::f64,
         std::string("points: expected float32 or float64, got ") + name(points.dtype));
  points.dtype == DType::f32 ? f(float{}) : f(double{});
}

void check_like(const Array& array, const Array& points, const char* what) {
  expect(array.dtype == points.dtype && array.ndim == points.ndim && array.shape == points.shape,
         std::string(what) + ": expected the points' shape and type");
}

void check(const Array& points, const Array* mask, const Rule& rule, const State& state,
           const Array& workspace) {
  expect(points.ndim == 3, "points: expected (images, channels, pixels)");
  const int64_t total = points.shape[0] * points.shape[2];
  expect(rule.bandwidth > 0, "bandwidth: expected a positive number");
  expect(rule.tolerance >= 0 && rule.tolerance < 1, "tolerance: expected a number in [0, 1)");
  expect(points.shape[2] <= std::numeric_limits<int32_t>::max(), "points: expected less than 2^31");
  if (mask) {
    expect(
        mask->ndim == 2 && mask->shape[0] == points.shape[0] && mask->shape[1] == points.shape[2],
        "mask: expected the points' shape without channels");
  }
  expect_contiguous(state.norms, points.dtype, total, "norms");
  expect_contiguous(state.denominators, points.dtype, total, "denominators");
  expect_contiguous(workspace, DType::u8, workspace.size(), "workspace");
}

}  // namespace

int64_t cuda_workspace(const Array& points, const Array* offsets, bool backward) {
  expect(points.ndim == 3, "points: expected (images, channels, pixels)");
  int64_t bytes = 0;
  dispatch(points, [&](auto type) {
    bytes = Plan<decltype(type)>(nullptr, points, offsets, backward).bytes;
  });
  return bytes;
}

void forward_cuda(const Array& points, const Array* mask, const Array* offsets, const Rule& rule,
                  const Array& shifted, const State& state, const Array& workspace,
                  int64_t stream) {
  check(points, mask, rule, state, workspace);
  check_like(shifted, points, "shifted");
  const Stream queue = as_stream(stream);
  dispatch(points, [&](auto type) {
    using A = decltype(type);
    const Plan<A> plan(workspace.data, points, offsets, false);
    expect(workspace.size() >= plan.bytes, "workspace: too small");
    const View<A> target = View<A>::of(shifted);
    A* norms = state.norms.as<A>();
    A* denominators = state.denominators.as<A>();
    plan.collect(points, mask, queue);
    launch(copy_others_kernel<A>, "copy_others", blocks_of(plan.slots.images.total), kThreads, 0,
           queue, plan.slots, plan.marks.values, View<const A>::of(points), target, norms,
           denominators);
    plan.template sum_pairs<false>(rule, queue);
    launch(shift_kernel<A>, "shift", blocks_of(plan.slots.slots()), kThreads, 0, queue, plan.slots,
           plan.fields, rule.step, plan.sums, target, norms, denominators);
  });
}

void backward_cuda(const Array& grad_shifted, const Array& points, const Array& shifted,
                   const Array* mask, const Array* offsets, const Rule& rule, const State& state,
                   const Array& grad, const Array& workspace, int64_t stream) {
  check(points, mask, rule, state, workspace);
  check_like(grad_shifted, points, "grad_shifted");
  check_like(shifted, points, "shifted");
  check_like(grad, points, "grad");
  const Stream queue = as_stream(stream);
  dispatch(points, [&](auto type) {
    using A = decltype(type);
    const Plan<A> plan(workspace.data, points, offsets, true);
    expect(workspace.size() >= plan.bytes, "workspace: too small");
    const View<A> target = View<A>::of(grad);
    const Given<A> given{View<const A>::of(grad_shifted), View<const A>::of(shifted),
                         state.norms.as<const A>(), state.denominators.as<const A>()};
    plan.collect(points, mask, queue);
    launch(copy_others_kernel<A>, "copy_others", blocks_of(plan.slots.images.total), kThreads, 0,
           queue, plan.slots, plan.marks.values, given.gradient, target, nullptr, nullptr);
    const int64_t blocks = blocks_of(plan.slots.slots());
    launch(weights_kernel<A>, "weights", blocks, kThreads, 0, queue, plan.slots, plan.fields,
           rule.step, given);
    plan.template sum_pairs<true>(rule, queue);
    launch(gradient_kernel<A>, "gradient", blocks, kThreads, 0, queue, plan.slots, plan.fields,
           rule.step, given, target);
  });
}

}  // namespace instembed::recurrent_mean_shift
