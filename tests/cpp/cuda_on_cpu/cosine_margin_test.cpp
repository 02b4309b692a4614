// The cosine margin loss on the simulated device against the CPU kernel in double, which the Python
// tests hold to its reference.
#include <cmath>

#include "cosine_margin/cuda.h"
#include "cuda_on_cpu/sphere_points.h"

namespace instembed {

namespace {

using namespace cosine_margin;

struct Case {
  DType dtype = DType::f32;
  int64_t images = 1, channels = 3, pixels = 100;
  std::vector<int> layout{0, 1, 2};
  int64_t instances = 5, run = 9;
  bool ragged = false, sampled = false, longer = false;
  int64_t key_values = 1 << 24;  // few: many keys are equal
  DType label_type = DType::i64;
  Options options;

  Case() { options.labels = {0, std::nullopt}; }
};

struct Result {
  Buffer losses, gradient;

  Result(const Case& c, DType dtype, int64_t images, std::vector<int> layout)
      : losses(dtype, {1, images}),
        gradient(dtype, {c.ragged ? 1 : c.images, c.channels, c.pixels}, layout) {}
};

void run_cuda(const Array& points, const Array& labels, const Array* bounds, const Array* keys,
              const Options& options, const Array& losses, const Array* gradient) {
  Buffer workspace(DType::u8, {cuda_workspace(points, bounds, keys, options.sampling, gradient)});
  forward_cuda(points, labels, bounds, keys, options, losses, gradient, workspace, 0);
}

Buffer make_keys(int64_t rows, int64_t columns, int64_t values) {
  Buffer keys(DType::f32, {rows, columns});
  for (int64_t i = 0; i < keys.size(); ++i) {
    keys.as<float>()[i] = static_cast<float>(draw(0, values - 1)) / static_cast<float>(values);
  }
  return keys;
}

// Labels of a type, in the memory of twice as many columns.
Buffer narrowed_labels(Buffer& labels, DType type) {
  const Array& from = labels;
  Buffer to(type, {from.shape[0], from.shape[1]});
  for (int64_t i = 0; i < from.size(); ++i) {
    const int64_t id = from.as<int64_t>()[i] >> 40;
    dispatch_integer(type, "test",
                     [&](auto t) { to.as<decltype(t)>()[i] = static_cast<decltype(t)>(id); });
  }
  return to;
}

// `alter` may change points.
void check(
    const Case& c, int schedules,
    const std::function<void(const Array&)>& alter = [](const Array&) {}) {
  const int64_t rows = c.ragged ? 1 : c.images;
  Buffer points(c.dtype, {rows, c.channels, c.pixels}, c.layout);
  fill_units(points, 4, 7, 0.5, false);
  if (c.longer) {
    for (int64_t i = 0; i < c.pixels; ++i) {
      const double length = static_cast<double>(draw(0, 300)) / 100;
      for (int64_t d = 0; d < c.channels; ++d) {
        set_element(points, 0, d, i, length * element(points, 0, d, i));
      }
    }
  }
  alter(points);
  Buffer wide = make_labels({rows, c.pixels}, c.instances, c.run);
  Buffer labels =
      c.label_type == DType::i64 ? std::move(wide) : narrowed_labels(wide, c.label_type);
  Buffer keys = make_keys(rows, c.pixels, c.key_values);
  Buffer bounds = make_bounds(c.pixels);
  const Array* offsets = c.ragged ? &bounds : nullptr;
  const Array* draws = c.sampled ? &keys : nullptr;
  const int64_t images = c.ragged ? 5 : c.images;

  Result exact(c, DType::f64, images, {0, 1, 2});
  forward(widened(points), labels, offsets, draws, c.options, exact.losses, &exact.gradient);
  const double tolerance = c.dtype == DType::f64 ? 1e-12 : 2e-6;
  Result first(c, c.dtype, images, c.layout);
  run_cuda(points, labels, offsets, draws, c.options, first.losses, &first.gradient);
  check_close(first.losses, exact.losses, tolerance);
  check_close(first.gradient, exact.gradient, tolerance);
  Result alone(c, c.dtype, images, c.layout);
  run_cuda(points, labels, offsets, draws, c.options, alone.losses, nullptr);
  CHECK(same_bits(alone.losses, first.losses));
  for_schedules(schedules - 1, [&] {
    Result again(c, c.dtype, images, c.layout);
    run_cuda(points, labels, offsets, draws, c.options, again.losses, &again.gradient);
    CHECK(same_bits(again.losses, first.losses) && same_bits(again.gradient, first.gradient));
  });
}

void check_wrong_bounds(std::vector<int64_t> values) {
  Buffer points(DType::f32, {1, 2, 90});
  fill_units(points, 3, 9, 0.1, false);
  Buffer labels = make_labels({1, 90}, 3, 5);
  Buffer bounds(DType::i64, {static_cast<int64_t>(values.size())});
  std::copy(values.begin(), values.end(), bounds.as<int64_t>());
  Buffer keys = make_keys(1, 90, 1000);
  Options options;
  for (const bool sampled : {false, true}) {
    options.sampling = {0.5, 20};
    Buffer losses(DType::f32, {1, bounds.size() - 1}), gradient(DType::f32, {1, 2, 90});
    run_cuda(points, labels, &bounds, sampled ? &keys : nullptr, options, losses, &gradient);
    for (int64_t i = 0; i < losses.size(); ++i) CHECK(std::isnan(losses.as<float>()[i]));
    for (int64_t i = 0; i < gradient.size(); ++i) CHECK(std::isnan(gradient.as<float>()[i]));
  }
}

}  // namespace

void test_cosine_margin(int schedules) {
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const auto& [channels, pixels] : std::vector<std::pair<int64_t, int64_t>>{
             {1, 1}, {2, 63}, {3, 64}, {17, 65}, {16, 150}, {33, 30}, {70, 70}, {5, 0}}) {
      Case c;
      c.dtype = dtype;
      c.channels = channels;
      c.pixels = pixels;
      c.layout = channels % 2 ? std::vector<int>{0, 2, 1} : std::vector<int>{1, 2, 0};
      c.options.rule = {channels % 3 ? 0.5 : 0.2, channels % 2 == 0};
      check(c, schedules);
    }
    Case c;
    c.dtype = dtype;
    c.images = 2;
    c.pixels = 135;
    c.run = 60;  // tiles of one instance
    c.options.labels = {std::nullopt, 2LL << 40};
    check(c, schedules);
    c.run = 1;
    c.instances = 1000;  // as many as there are pixels, nearly
    check(c, schedules);
    c.instances = 6;
    c.label_type = DType::u8;
    c.options.labels = {0, std::nullopt};
    c.longer = true;
    c.ragged = true;
    check(c, schedules);
    if (dtype == DType::f64) continue;  // keys are of one type
    for (const Sampling sampling : {Sampling{0.35, 4000}, Sampling{1, 40}, Sampling{1, 1000}}) {
      c.sampled = true;
      c.options.sampling = sampling;
      for (const bool ragged : {false, true}) {
        c.ragged = ragged;
        c.key_values = ragged ? 5 : 1 << 24;
        check(c, schedules);
      }
    }
  }
  Case large;  // several chunks of 1024 pixels an image
  large.images = 2;
  large.sampled = true;
  large.options.sampling = {0.5, 150};
  for (const bool ragged : {false, true}) {
    large.ragged = ragged;
    for (const int64_t key_values : {int64_t{40}, int64_t{1} << 24}) {
      large.key_values = key_values;
      large.pixels = ragged ? 4300 : 2060;
      check(large, (schedules + 3) / 4);
    }
  }
  large.images = 1;  // more of them than a block adds up at once
  large.ragged = false;
  large.key_values = 1 << 18;
  large.channels = 1;
  large.pixels = 1024 * 257 + 1;
  check(large, 1);
  Case parts;  // several blocks order an image's points, by more than a block at once
  parts.channels = 1;
  parts.pixels = 4800;
  parts.instances = 0;  // but for the background, which counts: no pair of tiles does
  parts.options.labels = {std::nullopt, std::nullopt};
  check(parts, 1);
  Case c;
  c.images = 3;
  for (const double value : {static_cast<double>(NAN), static_cast<double>(INFINITY), 2e9}) {
    check(c, schedules, [&](const Array& points) { set_element(points, 1, 2, 50, value); });
  }
  c.images = 0;
  check(c, schedules);
  for (const auto& values : std::vector<std::vector<int64_t>>{
           {0, 80, 40, 90}, {0, 91}, {-1, 90}, {0, 89}, {0}, {0, -5, 90}}) {
    check_wrong_bounds(values);
  }
}

}  // namespace instembed
