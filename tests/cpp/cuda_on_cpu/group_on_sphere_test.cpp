// Connected components on the simulated device against the CPU kernel, which the Python tests hold
// to its reference.
#include <cmath>

#include "cuda_on_cpu/sphere_points.h"
#include "group_on_sphere/cuda.h"

namespace instembed {

namespace {

using namespace group_on_sphere;

struct Case {
  DType dtype = DType::f32;
  int64_t images = 1, channels = 3, pixels = 100;
  std::vector<int> layout{0, 1, 2};
  int64_t clusters = 6, run = 5;
  double spread = 0.1;
  bool odd = true, masked = false, ragged = false;
  int64_t spare = 2;  // capacity beyond the instances
  Options options{0.95, 1, false};
};

struct Found {
  Buffer labels, centers, counts, instances, iterations;

  Found(const Case& c, int64_t images, int64_t capacity)
      : labels(DType::i64, {c.ragged ? 1 : c.images, c.pixels}),
        centers(c.dtype, {images, capacity, c.channels}),
        counts(DType::i64, {images, capacity}),
        instances(DType::i64, {images}),
        iterations(DType::i64, {images}) {}

  bool same(const Found& other) const {
    return same_bits(labels, other.labels) && same_bits(centers, other.centers) &&
           same_bits(counts, other.counts) && same_bits(instances, other.instances);
  }
};

void run_cuda(const Array& points, const Array* mask, const Array* bounds, const Options& options,
              Found* found) {
  Buffer workspace(DType::u8, {cuda_workspace(points, bounds)});
  group_cuda(points, mask, bounds, options,
             {found->labels, found->centers, found->counts, found->instances}, workspace, 0);
}

// `alter` may change points.
void check(
    const Case& c, int schedules,
    const std::function<void(const Array&)>& alter = [](const Array&) {}) {
  const int64_t rows = c.ragged ? 1 : c.images, images = c.ragged ? 5 : c.images;
  Buffer points(c.dtype, {rows, c.channels, c.pixels}, c.layout);
  fill_units(points, c.clusters, c.run, c.spread, c.odd);
  alter(points);
  Buffer flags(DType::u8, {rows, c.pixels});
  for (int64_t i = 0; i < flags.size(); ++i) flags.as<uint8_t>()[i] = draw(0, 3) != 0;
  Buffer bounds = make_bounds(c.pixels);
  const Array* mask = c.masked ? &flags : nullptr;
  const Array* offsets = c.ragged ? &bounds : nullptr;

  Buffer labels(DType::i64, {rows, c.pixels});
  const mean_shift::Result result = group(points, mask, offsets, c.options, labels, 1);
  const int64_t capacity = std::max<int64_t>(result.largest() + c.spare, 1);
  Found expected(c, images, capacity);
  result.copy(expected.centers, expected.counts, expected.instances, expected.iterations);
  Found first(c, images, capacity);
  run_cuda(points, mask, offsets, c.options, &first);
  for (int64_t i = 0; i < labels.size(); ++i) {
    const int64_t got = first.labels.as<int64_t>()[i], right = labels.as<int64_t>()[i];
    if (got != right) {
      std::fprintf(stderr, "threshold %g, %ld channels: label of point %ld: %ld instead of %ld\n",
                   c.options.threshold, static_cast<long>(c.channels), static_cast<long>(i),
                   static_cast<long>(got), static_cast<long>(right));
    }
    CHECK(got == right);
  }
  CHECK(same_bits(first.counts, expected.counts));
  CHECK(same_bits(first.instances, expected.instances));
  check_close(first.centers, expected.centers, c.dtype == DType::f64 ? 1e-14 : 1e-7);
  for_schedules(schedules - 1, [&] {
    Found again(c, images, capacity);
    run_cuda(points, mask, offsets, c.options, &again);
    CHECK(again.same(first));
  });
}

// A chain along a circle, whose ends are far apart, in a random order.
void make_chain(const Array& points) {
  const int64_t count = points.shape[2];
  std::vector<int64_t> order(count);
  for (int64_t i = 0; i < count; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), generator);
  for (int64_t i = 0; i < count; ++i) {
    const double angle = 3.0 * static_cast<double>(order[i]) / static_cast<double>(count);
    set_element(points, 0, 0, i, std::cos(angle));
    set_element(points, 0, 1, i, std::sin(angle));
  }
}

}  // namespace

void test_group_on_sphere(int schedules) {
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const auto& [channels, pixels] : std::vector<std::pair<int64_t, int64_t>>{
             {1, 1}, {2, 63}, {3, 64}, {17, 65}, {4, 150}, {33, 30}, {5, 0}}) {
      Case c;
      c.dtype = dtype;
      c.channels = channels;
      c.pixels = pixels;
      c.layout = channels % 2 ? std::vector<int>{0, 2, 1} : std::vector<int>{1, 2, 0};
      check(c, schedules);
    }
    Case c;
    c.dtype = dtype;
    c.images = 2;
    c.pixels = 150;
    c.spread = 0.25;
    c.options.min_size = 4;
    for (const bool nearest : {false, true}) {
      c.options.nearest = nearest;
      c.masked = nearest;
      c.ragged = false;
      check(c, schedules);
      c.ragged = true;
      check(c, schedules);
    }
    c.options.min_size = 1000;  // no instance
    check(c, schedules);
    Case chain;
    chain.dtype = dtype;
    chain.channels = 2;
    for (const int64_t count : {130, 200, 300, 1100}) {  // 3, 4, 5 and 18 tiles
      chain.pixels = count;
      for (const double step : {1.2, 0.8}) {  // one component, and as many as points
        chain.options.threshold = std::cos(step * 3 / static_cast<double>(count));
        check(chain, count < 1000 ? (schedules + 2) / 3 : 1, make_chain);
      }
    }
    Case all;
    all.dtype = dtype;
    all.odd = false;
    for (const double threshold : {-1.0, 0.0, 1.0}) {
      all.pixels = threshold < 0 ? 150 : 100;
      all.options.threshold = threshold;
      check(all, schedules, [&](const Array& points) {  // some points twice
        for (int64_t d = 0; d < points.shape[1]; ++d) {
          if (dtype == DType::f32) {  // float64 products are not exact: how they round decides
            set_element(points, 0, d, 90, element(points, 0, d, 3));
          }
          set_element(points, 0, d, 5, d == 1);
          set_element(points, 0, d, 80, d == 1);
        }
      });
    }
  }
  Case c;
  c.images = 0;
  check(c, schedules);

  Case many;  // more instances than the capacity
  many.channels = 2;
  many.pixels = 100;
  Buffer points(DType::f32, {1, 2, 100});
  make_chain(points);
  many.options = {1, 1, true};
  for_schedules(schedules, [&] {
    Found found(many, 1, 99);
    run_cuda(points, nullptr, nullptr, many.options, &found);
    CHECK(found.instances.as<int64_t>()[0] == 100);
    for (int64_t i = 0; i < 100; ++i) CHECK(found.labels.as<int64_t>()[i] == 0);
    for (int64_t i = 0; i < 99; ++i) CHECK(found.counts.as<int64_t>()[i] == 0);
    for (int64_t i = 0; i < 198; ++i) CHECK(found.centers.as<float>()[i] == 0);
  });
  for (const auto& values : std::vector<std::vector<int64_t>>{
           {0, 80, 40, 100}, {0, 101}, {-1, 100}, {0, 99}, {0}, {0, -5, 100}}) {
    Buffer bounds(DType::i64, {static_cast<int64_t>(values.size())});
    std::copy(values.begin(), values.end(), bounds.as<int64_t>());
    many.ragged = true;
    Found found(many, bounds.size() - 1, 9);
    run_cuda(points, nullptr, &bounds, many.options, &found);
    for (int64_t b = 0; b < found.instances.size(); ++b) {
      CHECK(found.instances.as<int64_t>()[b] == -1);
    }
    for (int64_t i = 0; i < 100; ++i) CHECK(found.labels.as<int64_t>()[i] == 0);
  }
}

}  // namespace instembed
