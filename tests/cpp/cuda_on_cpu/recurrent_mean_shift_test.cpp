// Mean shift on the sphere on the simulated device against the CPU kernel in double, which the
// Python tests hold to its reference.
#include <cmath>

#include "cuda_on_cpu/sphere_points.h"
#include "recurrent_mean_shift/cuda.h"

namespace instembed {

namespace {

using namespace recurrent_mean_shift;

struct Case {
  DType dtype = DType::f32;
  int64_t images = 1, channels = 3, pixels = 100;
  std::vector<int> layout{0, 1, 2};
  int64_t clusters = 4, run = 20;
  double spread = 0.2;
  bool odd = true;  // some points are none
  bool masked = false, ragged = false;
  DType mask_type = DType::u8;
  Rule rule{0.3, 1, 0};
};

struct Pass {  // forward and backward
  Buffer shifted, norms, denominators, grad;

  Pass(const Array& points, std::vector<int> layout)
      : shifted(points.dtype, {points.shape[0], points.shape[1], points.shape[2]}, layout),
        norms(points.dtype, {points.shape[0], points.shape[2]}),
        denominators(points.dtype, {points.shape[0], points.shape[2]}),
        grad(points.dtype, {points.shape[0], points.shape[1], points.shape[2]}, layout) {}

  bool same(const Pass& other) const {
    return same_bits(shifted, other.shifted) && same_bits(norms, other.norms) &&
           same_bits(denominators, other.denominators) && same_bits(grad, other.grad);
  }
};

void run_cuda(const Array& points, const Array& upstream, const Array* mask, const Array* bounds,
              const Rule& rule, Pass* pass) {
  const State state{pass->norms, pass->denominators};
  Buffer first(DType::u8, {cuda_workspace(points, bounds, false)});
  forward_cuda(points, mask, bounds, rule, pass->shifted, state, first, 0);
  Buffer second(DType::u8, {cuda_workspace(points, bounds, true)});
  backward_cuda(upstream, points, pass->shifted, mask, bounds, rule, state, pass->grad, second, 0);
}

void check(const Case& c, int schedules) {
  const int64_t rows = c.ragged ? 1 : c.images;
  Buffer points(c.dtype, {rows, c.channels, c.pixels}, c.layout);
  Buffer upstream(c.dtype, {rows, c.channels, c.pixels}, c.layout);
  fill_units(points, c.clusters, c.run, c.spread, c.odd);
  fill_normal(upstream, c.dtype);
  Buffer flags(c.mask_type, {rows, c.pixels});
  std::memset(flags.as<char>(), 0, flags.bytes());
  const int64_t width = item_size(c.mask_type);
  for (int64_t i = 0; i < flags.size(); ++i) {
    flags.as<char>()[i * width + width - 1] = static_cast<char>(draw(0, 3));
  }
  Buffer bounds = make_bounds(c.pixels);
  const Array* mask = c.masked ? &flags : nullptr;
  const Array* offsets = c.ragged ? &bounds : nullptr;

  const Buffer exact_points = widened(points), exact_upstream = widened(upstream);
  Pass exact(exact_points, {0, 1, 2});
  const State state{exact.norms, exact.denominators};
  forward(exact_points, mask, offsets, c.rule, exact.shifted, state, 1);
  backward(exact_upstream, exact_points, exact.shifted, mask, offsets, c.rule, state, exact.grad,
           1);
  // A logarithm of K is off by some roundings of 1 / bandwidth^2.
  const double rounding = c.dtype == DType::f64 ? 0x1p-53 : 0x1p-24;
  const double tolerance = 8 * rounding * std::max(1.0, c.rule.rate());
  Pass first(points, c.layout);
  run_cuda(points, upstream, mask, offsets, c.rule, &first);
  check_close(first.shifted, exact.shifted, tolerance);
  check_close(first.norms, exact.norms, tolerance);
  check_close(first.denominators, exact.denominators, tolerance);
  check_close(first.grad, exact.grad, 10 * tolerance);
  for_schedules(schedules - 1, [&] {
    Pass again(points, c.layout);
    run_cuda(points, upstream, mask, offsets, c.rule, &again);
    CHECK(again.same(first));
  });
}

void check_wrong_bounds(std::vector<int64_t> values) {
  Buffer points(DType::f32, {1, 2, 90}), upstream(DType::f32, {1, 2, 90});
  fill_units(points, 3, 9, 0.1, false);
  fill_normal(upstream, DType::f32);
  Buffer bounds(DType::i64, {static_cast<int64_t>(values.size())});
  std::copy(values.begin(), values.end(), bounds.as<int64_t>());
  Pass pass(points, {0, 1, 2});
  run_cuda(points, upstream, nullptr, &bounds, {0.3, 1, 0}, &pass);
  for (int64_t i = 0; i < points.size(); ++i) {
    CHECK(std::isnan(pass.shifted.as<float>()[i]) && std::isnan(pass.grad.as<float>()[i]));
  }
}

}  // namespace

void test_recurrent_mean_shift(int schedules) {
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const auto& [channels, pixels] : std::vector<std::pair<int64_t, int64_t>>{
             {1, 1}, {2, 63}, {3, 64}, {17, 65}, {16, 130}, {33, 30}, {70, 67}, {5, 0}}) {
      Case c;
      c.dtype = dtype;
      c.channels = channels;
      c.pixels = pixels;
      c.layout = channels % 2 ? std::vector<int>{0, 2, 1} : std::vector<int>{1, 2, 0};
      c.rule.step = channels % 3 ? 1 : 0.4;
      check(c, schedules);
    }
    Case c;
    c.dtype = dtype;
    c.images = 2;
    c.pixels = 150;
    c.masked = true;
    for (const DType type : {DType::u8, DType::i64}) {
      c.mask_type = type;
      check(c, schedules);
    }
    c.ragged = true;
    check(c, schedules);
    c.rule = {0.05, 1, 1e-3};  // tiles are left out
    c.spread = 0.005;
    c.run = 80;
    c.odd = false;
    c.rule.tolerance = 1e-12;
    check(c, schedules);
    c.images = 0;
    c.ragged = false;
    check(c, schedules);
  }
  for (const auto& values : std::vector<std::vector<int64_t>>{
           {0, 80, 40, 90}, {0, 91}, {-1, 90}, {0, 89}, {0}, {0, -5, 90}}) {
    check_wrong_bounds(values);
  }
}

}  // namespace instembed
