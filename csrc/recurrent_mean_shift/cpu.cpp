// An iteration on the CPU: points that take part are ordered so that neighbours lie together,
// summed over pairs (pairs.cpp), and written back. The order is found anew in each call: points
// move.
#include <cmath>
#include <limits>

#include "common/batch.h"
#include "common/dtype.h"
#include "recurrent_mean_shift/pairs.h"
#include "recurrent_mean_shift/recurrent_mean_shift.h"
#include "sphere/cloud.h"
#include "sphere/unit.h"

namespace instembed::recurrent_mean_shift {
namespace {

using sphere::at;
using sphere::dot;
using sphere::for_each;
using sphere::Place;

// The points that take part. f(pixel) is called for every other pixel.
template <class A, class F>
Cloud<A> build_cloud(const Image<const A>& points, const Place& place, const Array* mask,
                     int threads, F&& others) {
  const auto taken = sphere::choose_pixels(points.pixels, threads, [&](int64_t pixel) {
    const bool takes_part =
        !place.masked_out(mask, pixel) && sphere::is_unit(dot(points, points, pixel));
    if (!takes_part) others(pixel);
    return takes_part;
  });
  return sphere::build_cloud(points, taken, threads);
}

template <class A>
void forward_image(const Image<const A>& points, const Place& place, const Array* mask,
                   const Rule& rule, const Image<A>& shifted, const State& state, int threads) {
  A* norms = state.norms.as<A>() + place.first();
  A* denominators = state.denominators.as<A>() + place.first();
  const Cloud<A> cloud = build_cloud(points, place, mask, threads, [&](int64_t pixel) {
    norms[pixel] = denominators[pixel] = 1;
    for (int64_t d = 0; d < points.channels; ++d) {
      at(shifted, pixel)[d * shifted.channel_stride] = at(points, pixel)[d * points.channel_stride];
    }
  });
  const int64_t slots = cloud.tiles.slots();
  Sums sums{Lines<double>(slots * cloud.padded), Lines<double>(slots)};
  add_pairs<A>(cloud, rule, nullptr, &sums, threads);
  for_each(slots, threads, [&](int64_t s) {
    const int64_t pixel = cloud.tiles.point[s];
    if (pixel < 0) return;
    double* z = sums.vectors.data() + s * cloud.padded;
    const A* x = cloud.points.rows.data() + s * cloud.padded;
    const double share = rule.step / sums.numbers.data()[s];
    double square = 0;
    for (int64_t d = 0; d < points.channels; ++d) {
      z[d] = share * z[d] + (1 - rule.step) * x[d];
      square += z[d] * z[d];
    }
    const double norm = std::sqrt(square), scale = norm < kShortest ? 0 : 1 / norm;
    for (int64_t d = 0; d < points.channels; ++d) {
      at(shifted, pixel)[d * shifted.channel_stride] = static_cast<A>(scale * z[d]);
    }
    norms[pixel] = static_cast<A>(scale == 0 ? 0 : norm);
    denominators[pixel] = static_cast<A>(sums.numbers.data()[s]);
  });
}

template <class A>
void backward_image(const Image<const A>& grad_shifted, const Image<const A>& points,
                    const Image<const A>& shifted, const Place& place, const Array* mask,
                    const Rule& rule, const State& state, const Image<A>& grad, int threads) {
  const int64_t channels = points.channels;
  const A* norms = state.norms.as<const A>() + place.first();
  const A* denominators = state.denominators.as<const A>() + place.first();
  const Cloud<A> cloud = build_cloud(points, place, mask, threads, [&](int64_t pixel) {
    for (int64_t d = 0; d < channels; ++d) {
      at(grad, pixel)[d * grad.channel_stride] =
          at(grad_shifted, pixel)[d * grad_shifted.channel_stride];
    }
  });
  const int64_t slots = cloud.tiles.slots(), padded = cloud.padded;
  Weights<A> weights{Field<A>(channels, padded, slots), Lines<A>(slots)};
  Sums sums{Lines<double>(slots * padded), Lines<double>(slots)};
  for_each(slots, threads, [&](int64_t s) {
    const int64_t pixel = cloud.tiles.point[s];
    if (pixel < 0 || norms[pixel] == 0) return;
    const A* x = cloud.points.rows.data() + s * padded;
    const double along = dot(grad_shifted, shifted, pixel), share = rule.step / denominators[pixel];
    double b = 0;
    for (int64_t d = 0; d < channels; ++d) {
      const double difference = at(grad_shifted, pixel)[d * grad_shifted.channel_stride] -
                                along * at(shifted, pixel)[d * shifted.channel_stride];
      const double dz = difference / norms[pixel];
      sums.vectors.data()[s * padded + d] = (1 - rule.step) * dz;
      weights.a.rows.data()[s * padded + d] = static_cast<A>(share * dz);
      b += dz * x[d];
    }
    weights.b.data()[s] = static_cast<A>((rule.step - 1) * b / denominators[pixel]);
  });
  sphere::fill_planar(cloud, &weights.a, threads);
  add_pairs(cloud, rule, &weights, &sums, threads);
  for_each(slots, threads, [&](int64_t s) {
    const int64_t pixel = cloud.tiles.point[s];
    if (pixel < 0) return;
    const double* sum = sums.vectors.data() + s * padded;
    const A* x = cloud.points.rows.data() + s * padded;
    double along = 0, square = 0;
    for (int64_t d = 0; d < channels; ++d) {
      along += sum[d] * x[d];
      square += static_cast<double>(x[d]) * x[d];
    }
    for (int64_t d = 0; d < channels; ++d) {
      at(grad, pixel)[d * grad.channel_stride] = static_cast<A>(sum[d] - along / square * x[d]);
    }
  });
}

template <class F>
void dispatch(const Array& points, F&& f) {
  points.dtype == DType::f32 ? f(float{}) : f(double{});
}

void check_like(const Array& array, const Array& points, const char* what) {
  expect(array.dtype == points.dtype && array.ndim == points.ndim && array.shape == points.shape,
         std::string(what) + ": expected the points' shape and type");
}

Batch checked(const Array& points, const Array* mask, const Array* offsets, const Rule& rule,
              const State& state) {
  expect(points.dtype == DType::f32 || points.dtype == DType::f64,
         std::string("points: expected float32 or float64, got ") + name(points.dtype));
  const Batch batch = Batch::of_embeddings(points, offsets);
  const int64_t rows = offsets ? 1 : batch.images;
  expect(rule.bandwidth > 0, "bandwidth: expected a positive number");
  expect(rule.tolerance >= 0 && rule.tolerance < 1, "tolerance: expected a number in [0, 1)");
  expect(batch.pixels <= std::numeric_limits<int32_t>::max(), "points: expected less than 2^31");
  if (mask) {
    expect(mask->ndim == 2 && mask->shape[0] == rows && mask->shape[1] == batch.pixels,
           "mask: expected the points' shape without channels");
  }
  expect_contiguous(state.norms, points.dtype, rows * batch.pixels, "norms");
  expect_contiguous(state.denominators, points.dtype, rows * batch.pixels, "denominators");
  return batch;
}

}  // namespace

void forward(const Array& points, const Array* mask, const Array* offsets, const Rule& rule,
             const Array& shifted, const State& state, int threads) {
  const Batch batch = checked(points, mask, offsets, rule, state);
  check_like(shifted, points, "shifted");
  const Batch to = Batch::of_embeddings(shifted, offsets);
  dispatch(points, [&](auto type) {
    using A = decltype(type);
    sphere::for_images(batch, threads, [&](int64_t b, int inner) {
      forward_image<A>({points, batch, b}, {batch, b}, mask, rule, {shifted, to, b}, state, inner);
    });
  });
}

void backward(const Array& grad_shifted, const Array& points, const Array& shifted,
              const Array* mask, const Array* offsets, const Rule& rule, const State& state,
              const Array& grad, int threads) {
  const Batch batch = checked(points, mask, offsets, rule, state);
  check_like(grad_shifted, points, "grad_shifted");
  check_like(shifted, points, "shifted");
  check_like(grad, points, "grad");
  const Batch from = Batch::of_embeddings(grad_shifted, offsets);
  const Batch after = Batch::of_embeddings(shifted, offsets);
  const Batch to = Batch::of_embeddings(grad, offsets);
  dispatch(points, [&](auto type) {
    using A = decltype(type);
    sphere::for_images(batch, threads, [&](int64_t b, int inner) {
      backward_image<A>({grad_shifted, from, b}, {points, batch, b}, {shifted, after, b},
                        {batch, b}, mask, rule, state, {grad, to, b}, inner);
    });
  });
}

}  // namespace instembed::recurrent_mean_shift
