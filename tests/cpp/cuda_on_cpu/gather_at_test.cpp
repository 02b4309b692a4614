// Gathering on the simulated device against the CPU kernel in float64, which the Python tests hold
// to its reference.
#include "cuda_on_cpu/tests.h"
#include "gather_at/cuda.h"

namespace instembed {

namespace {

using namespace gather_at;

struct Case {
  DType dtype = DType::f32;
  std::vector<int64_t> spatial = {7, 9};
  int64_t images = 2, groups = 1, channels = 5, points = 40;
  bool interleaved = false, linear = true, flags = false;
  double reach = 1.3;  // of the points, in sizes of the map
};

// Points in and around the map, some on borders of pixels, some nowhere.
void fill_points(const Case& c, Buffer& points) {
  const auto axes = static_cast<int64_t>(c.spatial.size());
  std::uniform_real_distribution<double> uniform(-0.15, c.reach - 0.15);
  for (int64_t i = 0; i < points.size(); ++i) {
    double x = uniform(generator) * static_cast<double>(c.spatial[axes - 1 - i % axes]);
    if (draw(0, 4) == 0) x = std::floor(x) + 0.5;
    if (draw(0, 4) == 0) x = std::floor(x);
    if (draw(0, 40) == 0) x = std::nan("");
    points.as<float>()[i] = static_cast<float>(x);
  }
}

void check(const Case& c, int schedules) {
  const auto axes = static_cast<int64_t>(c.spatial.size());
  std::vector<int64_t> shape = {c.images, c.groups, c.channels};
  shape.insert(shape.end(), c.spatial.begin(), c.spatial.end());
  std::vector<int> layout = {0};
  for (int k = 3; c.interleaved && k < 3 + axes; ++k) layout.push_back(k);
  for (const int k : {1, 2}) layout.push_back(k);
  for (int k = 3; !c.interleaved && k < 3 + axes; ++k) layout.push_back(k);
  Buffer features(c.dtype, shape, layout), exact(DType::f64, shape, layout);
  fill_normal(features, c.dtype);
  for (int64_t i = 0; i < exact.size(); ++i) {
    exact.as<double>()[i] = value(features, c.dtype, i);
  }
  Buffer points(DType::f32, {c.images, c.points, c.groups, axes});
  fill_points(c, points);
  Buffer flags(DType::i16, {c.images, c.points, c.groups});
  for (int64_t i = 0; i < flags.size(); ++i) flags.as<int16_t>()[i] = draw(-1, 2);
  const Query query{points, c.flags ? &flags : nullptr, c.linear};

  const std::vector<int64_t> rows = {c.images, c.points, c.groups, c.channels};
  Buffer expected(DType::f64, rows), grad(c.dtype, rows), exact_grad(DType::f64, rows);
  forward(exact, query, expected, 1);
  fill_normal(grad, c.dtype);
  for (int64_t i = 0; i < grad.size(); ++i) exact_grad.as<double>()[i] = value(grad, c.dtype, i);
  Buffer expected_features(DType::f64, shape, layout), expected_points(DType::f32, {points.size()});
  backward(exact_grad, exact, query, &expected_features, &expected_points, 1);
  Buffer exact_points(DType::f64, {points.size()});
  for (int64_t i = 0; i < points.size(); ++i) {
    exact_points.as<double>()[i] = expected_points.as<float>()[i];
  }

  std::vector<char> bits;
  for_schedules(schedules, [&] {
    Buffer values(c.dtype, rows), of_features(c.dtype, shape, layout);
    Buffer of_points(DType::f32, {c.images, c.points, c.groups, axes});
    forward_cuda(features, query, values, 0);
    Buffer workspace(DType::u8, {cuda_workspace(features, query)});
    backward_cuda(grad, features, query, &of_features, &of_points, workspace, 0);
    const double tolerance = tolerance_of(c.dtype);
    check_close(values, c.dtype, expected, tolerance);
    check_close(of_features, c.dtype, expected_features, tolerance);
    check_close(of_points, DType::f32, exact_points, 1e-6);
    std::vector<char> now(of_features.raw(), of_features.raw() + of_features.bytes());
    now.insert(now.end(), of_points.raw(), of_points.raw() + of_points.bytes());
    if (bits.empty()) bits = now;
    CHECK(bits == now);  // whatever the schedule
  });
}

}  // namespace

void test_gather_at(int schedules) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    for (const bool linear : {false, true}) {
      Case c;
      c.dtype = dtype;
      c.linear = linear;
      c.interleaved = dtype == DType::f16;
      c.flags = true;
      check(c, schedules);
      c.groups = 3;
      c.spatial = {4, 5, 6};
      check(c, schedules);
    }
  }
  for (const std::vector<int64_t>& spatial :
       std::vector<std::vector<int64_t>>{{1}, {300}, {1, 1}, {33, 1}, {3, 1, 2}, {0, 4}}) {
    Case c;
    c.spatial = spatial;
    check(c, schedules);
  }
  for (const int64_t points : {0, 1, 63, 65, 700}) {
    Case c;
    c.points = points;
    c.channels = points == 65 ? 70 : 3;
    c.spatial = {40, 50};
    check(c, schedules);
  }
  Case crowd;  // many points on few pixels
  crowd.points = 600;
  crowd.reach = 0.4;
  crowd.images = 1;
  check(crowd, schedules);
  Case none;
  none.images = 0;
  check(none, schedules);
}

}  // namespace instembed
