// The cosine margin loss and its gradient on CUDA.
//
// The pixels that take part get slots in the order of their instances, so that both parts of the
// loss have what they need side by side: the first a sum over consecutive slots, in double and in a
// fixed order; the second tiles of which most hold one instance. A block owns the 64 rows of a
// tile, walks over all tiles of its image in their order, multiplies, and adds the hinges, whose
// derivatives it multiplies with the points for the gradient. A pair of tiles of one and the same
// instance is left out, and the second product where no pair exceeds the margin. No N x N, and no
// limit to the number of instances: a table of ids grows with the pixels.
//
// For N pixels that take part, D channels, float32:
//   bytes   N_all (L + 1) labels of all pixels, once more with keys a digit (6 each)
//         + N (2 D S + 250)     packed, and what is known of each slot
//         + N^2 / 64 (2 D) S    tiles, from the L2 (S = 4 bytes)
//         + N_all D S           the gradient, which is zero elsewhere
//   flops   N^2 (4 D + 4), half of it without gradient.
// At N = 16384, D = 64: 70 GFLOP, 2.1 ms at 33 TFLOP/s (see sphere/products.cuh), 2 GB of the L2:
// arithmetic is the limit. Unlike the CPU kernel this takes no advantage of the hinge's being
// linear or of the matrix's symmetry. Reasoned, not measured: the kernels have never run on a GPU.
#pragma once

#include <cmath>
#include <limits>

#include "cosine_margin/cuda.h"
#include "cosine_margin/sample.cuh"
#include "sphere/products.cuh"
#include "sphere/segments.cuh"

namespace instembed::cosine_margin {
namespace {

constexpr double kLongest = 1e9;  // a vector's length; similarities of longer ones may overflow
constexpr int32_t kNone = -1;

// ---------------------------------------------------------------------------------------------------------
// Who belongs together

// A hash table an image, of twice as many places as its entries' tiles have slots: an entry of each
// id that is there, in the end the first.
struct IdPlaces {
  int32_t* entries = nullptr;

  __device__ int32_t* of(const Slots& slots, int64_t image) const {
    return entries + 2 * slots.first_slot(image);
  }
};

// leaders = the place of each entry's id. A thread an entry.
static __global__ void __launch_bounds__(kThreads)
    insert_ids_kernel(Slots entries, Integers labels, IdPlaces places, int32_t* leaders) {
  const Seat seat(entries);
  if (seat.empty()) return;
  const int64_t first = entries.first_slot(seat.image), start = entries.images.start(seat.image);
  const auto entry = static_cast<int32_t>(seat.slot - first);
  const int64_t id = labels.at(entries.images, seat.pixel);
  int32_t* table = places.of(entries, seat.image);
  const auto size = static_cast<uint64_t>(2 * kTile * entries.tiles_taken(seat.image));
  // Consecutive ids fall far apart, and so do multiples of a power of two.
  const uint64_t hash = (static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15u) >> 32;
  auto place = static_cast<int64_t>(hash * size >> 32);
  while (true) {
    int32_t found = *static_cast<const volatile int32_t*>(table + place);
    if (found == kNone) found = atomicCAS(table + place, kNone, entry);
    if (found == kNone) break;
    if (labels.at(entries.images, start + entries.pixels[first + found]) == id) {
      if (entry < found) atomicMin(table + place, entry);
      break;
    }
    if (++place == static_cast<int64_t>(size)) place = 0;
  }
  leaders[seat.slot] = static_cast<int32_t>(place);
}

static __global__ void __launch_bounds__(kThreads)
    find_leaders_kernel(Slots entries, IdPlaces places, int32_t* leaders) {
  const Seat seat(entries);
  if (seat.empty()) return;
  leaders[seat.slot] = places.of(entries, seat.image)[leaders[seat.slot]];
}

// ---------------------------------------------------------------------------------------------------------
// The two parts of the loss

template <class A>
struct Fields {                 // of every slot
  A* points = nullptr;          // packed
  A* weights = nullptr;         // w_i; 0 where there is no point
  A* hinges = nullptr;          // sum_j w_j h(s_ij) / scale()
  A* pushes = nullptr;          // sum_j w_j h'(s_ij) x_j, packed
  double* pulls = nullptr;      // S_c of each instance, counted like slots
  double* tile_sums = nullptr;  // of each tile and channel
  double* terms = nullptr;      // what the slot adds to the first part
  int32_t* bad = nullptr;       // of each image: whether a point is not finite, or too long
};

// w of the instance that is number `instance` of the image whose slots begin at `first`.
__device__ __forceinline__ double weight_of(const Segments& segments, int64_t image, int64_t first,
                                            int32_t instance) {
  return 1 / (static_cast<double>(segments.counts[image]) * segments.lengths[first + instance]);
}

// Weights and terms. A thread a slot.
template <class A>
__global__ void __launch_bounds__(kThreads)
    pull_kernel(Slots slots, Segments segments, Fields<A> fields, double rounding) {
  const Seat seat(slots);
  if (seat.slot >= slots.slots()) return;
  fields.weights[seat.slot] = 0;
  if (seat.empty()) return;
  const int64_t first = slots.first_slot(seat.image);
  const int32_t instance = segments.instances[seat.slot];
  const double length = segments.lengths[first + instance];
  const double weight = weight_of(segments, seat.image, first, instance);
  const double* pull = fields.pulls + (first + instance) * slots.channels;
  double square = 0, apart = 0;
  for (int d = 0; d < slots.channels; ++d) {
    const double x = fields.points[slots.at(seat.slot, d)], difference = x - pull[d] / length;
    square += x * x;
    apart += difference * difference;
  }
  fields.weights[seat.slot] = static_cast<A>(weight);
  fields.terms[seat.slot] =
      0.5 * weight * weight * length * (apart + short_of_unit(square, rounding));
  if (!(square <= kLongest * kLongest)) fields.bad[seat.image] = 1;  // so for NaN
}

// Dot products to w_j h', and their products with h / h' added to `sums`. Returns whether there is
// any.
template <class A, bool squared>
__device__ __forceinline__ bool to_hinges(const Fields<A>& fields, const int32_t* instances,
                                          A least, int64_t row, int64_t column,
                                          A (&dots)[kEach][kEach], Total<A> (&sums)[kEach]) {
  bool any = false;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int32_t own = instances[row + k];
    A sum = 0;
#pragma unroll
    for (int l = 0; l < kEach; ++l) {
      const A above = dots[k][l] - least;
      const bool counts = above > 0 && instances[column + l] != own;
      const A weight = counts ? fields.weights[column + l] : A(0);
      dots[k][l] = squared ? weight * above : weight;
      if (counts) sum += dots[k][l] * above;
      any = any || counts;
    }
    sums[k].add(sum);
  }
  return any;
}

// A tile of rows has `groups` blocks, each for U kSide channels of the pushes.
template <class A, int U, bool squared, bool gradient>
__global__ void __launch_bounds__(kThreads, 2)
    push_kernel(Slots slots, Segments segments, Fields<A> fields, A least, int groups) {
  INSTEMBED_SHARED_VECTORS(A, stage, kStage<A>);
  INSTEMBED_SHARED_VECTORS(A, weights, kTile * kPitch);
  const Place place(slots, blockIdx.x / groups);
  if (!place.used()) return;
  const int first = static_cast<int>(blockIdx.x % groups) * U * kSide;
  const int64_t row = place.tile * kTile + row_of_thread();
  const int64_t tile_elements = int64_t{slots.channels} * kTile;
  // The instances of a tile are first to last.
  const auto first_instance = [&](int64_t tile) { return segments.instances[tile * kTile]; };
  const auto last_instance = [&](int64_t tile) {
    const int64_t end = place.first + place.taken, tile_end = (tile + 1) * kTile;
    return segments.instances[(tile_end < end ? tile_end : end) - 1];
  };
  const int32_t own = first_instance(place.tile);
  const bool one = own == last_instance(place.tile);
  RowSums<A, U> rows;
  for (int64_t t = 0; t < slots.tiles_taken(place.image); ++t) {
    const int64_t other = slots.first_tile(place.image) + t;
    if (one && first_instance(other) == own && last_instance(other) == own) continue;
    const A* points = fields.points + other * tile_elements;
    A values[kEach][kEach] = {};
    add_dots(fields.points + place.tile * tile_elements, points, slots.channels, stage, values);
    const bool any =
        to_hinges<A, squared>(fields, segments.instances, least, row,
                              other * kTile + column_of_thread(), values, rows.numbers);
    if constexpr (gradient) {
      if (!__syncthreads_or(any)) continue;
      put(values, weights);
      A vectors[kEach][U] = {};
      add_products(weights, points + first * kTile, slots.channels - first, stage, vectors);
      rows.add_vectors(vectors);
    }
  }
  if (gradient) rows.write_vectors(slots, place.tile, first, fields.pushes);
  if (first == 0) rows.write_numbers(place.tile, fields.hinges);
}

// A block an image.
template <class A>
__global__ void __launch_bounds__(kThreads)
    loss_kernel(Slots slots, Fields<A> fields, double scale, A* losses) {
  INSTEMBED_SHARED(double, sums, kWarps);
  const int64_t image = blockIdx.x;
  const int32_t count = slots.counts[image];
  const int64_t first = count > 0 ? slots.first_slot(image) : 0;
  double own = 0, loss = 0;
#pragma unroll 4
  for (int64_t s = first + threadIdx.x; s < first + count; s += kThreads) {
    own += fields.terms[s] + scale * fields.weights[s] * fields.hinges[s];
  }
  sum_before<kWarps, double>(own, sums, &loss);
  if (threadIdx.x > 0) return;
  const bool invalid = slots.images.offsets && *slots.images.invalid;
  losses[image] = fields.bad[image] || invalid ? static_cast<A>(NAN) : static_cast<A>(loss);
}

// The gradient is zero, or NaN if the offsets are none, where no point takes part. A thread a
// pixel.
template <class A>
__global__ void __launch_bounds__(kThreads) clear_gradient_kernel(Slots slots, View<A> gradient) {
  const Images& images = slots.images;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= images.total) return;
  const A value = images.offsets && *images.invalid ? static_cast<A>(NAN) : A(0);
  A* to = gradient.at(images, i);
  for (int d = 0; d < slots.channels; ++d) to[d * gradient.strides.channel] = value;
}

// A thread a slot.
template <class A>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(Slots slots, Segments segments, Fields<A> fields, View<A> gradient) {
  const Seat seat(slots);
  if (seat.empty()) return;
  const int64_t first = slots.first_slot(seat.image);
  const int32_t instance = segments.instances[seat.slot];
  const double weight = weight_of(segments, seat.image, first, instance);
  const double* pull = fields.pulls + (first + instance) * slots.channels;
  const bool bad = fields.bad[seat.image];
  A* to = gradient.at(slots.images, seat.pixel);
  for (int d = 0; d < slots.channels; ++d) {
    const double push = fields.pushes[slots.at(seat.slot, d)];
    to[d * gradient.strides.channel] =
        bad ? static_cast<A>(NAN) : static_cast<A>(weight * (push - weight * pull[d]));
  }
}

// ---------------------------------------------------------------------------------------------------------
// Host

inline int64_t most_points(const Array& points, const Array* keys, const Sampling& sampling) {
  const int64_t pixels = points.shape[2];
  if (!keys) return pixels;
  const double share = std::ceil(sampling.fraction * static_cast<double>(pixels));
  return std::min({pixels, static_cast<int64_t>(share), sampling.most});
}

template <class A>
struct Plan {
  Slots entries, slots;  // in the order of pixels, and of instances
  Segments segments;
  IdPlaces places;
  Limits limits;
  Fields<A> fields;
  Marks marks;
  int64_t* invalid = nullptr;
  int64_t bytes = 0;

  Plan(void* base, const Array& points, const Array* offsets, int64_t most, bool gradient)
      : entries(Images::of(points, offsets, nullptr), points.shape[1], most),
        slots(entries),
        marks(slots.images) {
    Workspace workspace(base);
    entries.take(&workspace);
    slots.take(&workspace);
    segments.take(&workspace, slots);
    places.entries = workspace.take<int32_t>(2 * slots.slots());
    limits.take(&workspace, slots.images.images);
    fields.points = workspace.take<A>(slots.elements());
    if (gradient) fields.pushes = workspace.take<A>(slots.elements());
    fields.weights = workspace.take<A>(slots.slots());
    fields.hinges = workspace.take<A>(slots.slots());
    fields.pulls = workspace.take<double>(slots.elements());
    fields.tile_sums = workspace.take<double>(slots.tiles() * slots.channels);
    fields.terms = workspace.take<double>(slots.slots());
    fields.bad = workspace.take<int32_t>(slots.images.images);
    marks.take(&workspace);
    invalid = workspace.take<int64_t>(1);
    entries.images.invalid = slots.images.invalid = marks.chunks.images.invalid = invalid;
    bytes = workspace.used();
  }

  void find_instances(const Array& labels, Stream queue) const {
    const int64_t blocks = blocks_of(entries.slots());
    fill_bytes(places.entries, 0xff, 2 * slots.slots() * 4, queue);
    launch(insert_ids_kernel, "insert_ids", blocks, kThreads, 0, queue, entries,
           Integers::of(&labels), places, segments.leaders);
    launch(find_leaders_kernel, "find_leaders", blocks, kThreads, 0, queue, entries, places,
           segments.leaders);
    order(entries, slots, segments, 1, queue);
  }

  void pull(const View<const A>& points, Stream queue) const {
    const double rounding = 64 * std::numeric_limits<A>::epsilon();
    fill_bytes(fields.bad, 0, slots.images.images * 4, queue);
    launch(pack_kernel<A>, "pack", slots.tiles(), kThreads, 0, queue, slots, points, fields.points);
    sum_instances(slots, segments, fields.points, fields.tile_sums, fields.pulls, queue);
    launch(pull_kernel<A>, "pull", blocks_of(slots.slots()), kThreads, 0, queue, slots, segments,
           fields, rounding);
  }

  template <int U, bool gradient>
  void push_channels(const Rule& rule, Stream queue) const {
    const int groups = gradient ? (slots.channels + U * kSide - 1) / (U * kSide) : 1;
    const auto run = [&](auto kernel) {
      launch(kernel, "cosine_margin", slots.tiles() * groups, kThreads, 0, queue, slots, segments,
             fields, static_cast<A>(rule.least()), groups);
    };
    if (rule.squared) {
      run(push_kernel<A, U, true, gradient>);
    } else {
      run(push_kernel<A, U, false, gradient>);
    }
  }
  void push(const Rule& rule, bool gradient, Stream queue) const {
    if (!gradient) return push_channels<1, false>(rule, queue);
    with_channels<A>(slots.channels,
                     [&](auto each) { push_channels<decltype(each)::value, true>(rule, queue); });
  }
};

template <class F>
void dispatch(const Array& points, F&& f) {
  expect(points.ndim == 3, "points: expected (images, channels, pixels)");
  expect(points.dtype == DType::f32 || points.dtype == DType::f64,
         std::string("points: expected float32 or float64, got ") + name(points.dtype));
  points.dtype == DType::f32 ? f(float{}) : f(double{});
}

void check_pixels(const Array& array, const Array& points, const char* what) {
  expect(array.ndim == 2 && array.shape[0] == points.shape[0] && array.shape[1] == points.shape[2],
         std::string(what) + ": expected the points' shape without channels");
}

}  // namespace

int64_t cuda_workspace(const Array& points, const Array* offsets, const Array* keys,
                       const Sampling& sampling, bool gradient) {
  int64_t bytes = 0;
  dispatch(points, [&](auto type) {
    const int64_t most = most_points(points, keys, sampling);
    bytes = Plan<decltype(type)>(nullptr, points, offsets, most, gradient).bytes;
  });
  return bytes;
}

void forward_cuda(const Array& points, const Array& labels, const Array* offsets, const Array* keys,
                  const Options& options, const Array& losses, const Array* gradient,
                  const Array& workspace, int64_t stream) {
  dispatch(points, [&](auto type) {
    using A = decltype(type);
    const Images images = Images::of(points, offsets, nullptr);
    expect((offsets ? images.total : images.pixels) <= INT32_MAX / 2,
           "points: expected less than 2^30 an image");
    check_pixels(labels, points, "labels");
    if (keys) {
      check_pixels(*keys, points, "keys");
      expect(keys->dtype == DType::f32, "keys: expected float32");
    }
    expect_contiguous(losses, points.dtype, images.images, "losses");
    if (gradient) {
      expect(
          gradient->dtype == points.dtype && gradient->ndim == 3 && gradient->shape == points.shape,
          "gradient: expected the points' shape and type");
    }
    expect_contiguous(workspace, DType::u8, workspace.size(), "workspace");
    const Plan<A> plan(workspace.data, points, offsets, most_points(points, keys, options.sampling),
                       gradient != nullptr);
    expect(workspace.size() >= plan.bytes, "workspace: too small");

    const Stream queue = as_stream(stream);
    check_offsets(plan.slots.images, plan.invalid, queue);
    choose(plan.entries, labels, options.labels, keys, options.sampling, plan.limits, plan.marks,
           queue);
    plan.find_instances(labels, queue);
    plan.pull(View<const A>::of(points), queue);
    plan.push(options.rule, gradient != nullptr, queue);
    launch(loss_kernel<A>, "loss", images.images, kThreads, 0, queue, plan.slots, plan.fields,
           options.rule.scale(), losses.as<A>());
    if (!gradient) return;
    const View<A> to = View<A>::of(*gradient);
    launch(clear_gradient_kernel<A>, "clear_gradient", blocks_of(images.total), kThreads, 0, queue,
           plan.slots, to);
    launch(gradient_kernel<A>, "gradient", blocks_of(plan.slots.slots()), kThreads, 0, queue,
           plan.slots, plan.segments, plan.fields, to);
  });
}

}  // namespace instembed::cosine_margin
