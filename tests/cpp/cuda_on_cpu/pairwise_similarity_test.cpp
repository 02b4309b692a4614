// The pairwise similarity loss on the simulated device against the CPU kernel, which the Python
// tests hold to its reference.
#include <cmath>
#include <limits>

#include "cuda_on_cpu/tests.h"
#include "pairwise_similarity/cuda.h"

namespace instembed {

namespace {

using namespace pairwise_similarity;

struct Case {
  DType dtype = DType::f32;
  int64_t images = 1, channels = 5, pixels = 200, instances = 6, samples = 7;
  std::vector<int> layout{0, 1, 2};
  double scale = 0.5;   // of the embeddings
  int gaps = 5;         // one index in so many is none; 0: none is
  bool points = false;  // of all images in one
  bool differentiable = true;

  DType accumulation() const { return dtype == DType::f64 ? DType::f64 : DType::f32; }
};

double value(Buffer& buffer, int64_t i) {
  return dispatch_floating(static_cast<const Array&>(buffer).dtype, "test", [&](auto type) {
    return static_cast<double>(buffer.as<decltype(type)>()[i]);
  });
}

Buffer memory(int64_t bytes) {  // of NaNs
  Buffer workspace(DType::u8, {bytes});
  std::memset(workspace.as<char>(), 0xff, bytes);
  return workspace;
}

struct Results {
  Buffer losses, slopes, gradient;

  explicit Results(const Case& c)
      : losses(c.accumulation(), {c.images}),
        slopes(c.accumulation(), {c.images, c.instances, c.samples, c.channels}),
        gradient(c.dtype, {c.points ? 1 : c.images, c.channels, c.pixels}, c.layout) {}
};

void check_same(const char* what, Buffer& got, Buffer& expected, double tolerance) {
  double largest = 0;
  for (int64_t i = 0; i < expected.size(); ++i) {
    const double e = value(expected, i);
    if (std::isfinite(e)) largest = std::max(largest, std::abs(e));
  }
  for (int64_t i = 0; i < expected.size(); ++i) {
    const double g = value(got, i), e = value(expected, i);
    const bool same = std::isfinite(e) ? std::abs(g - e) <= tolerance * largest
                                       : g == e || (std::isnan(g) && std::isnan(e));
    if (!same) std::fprintf(stderr, "%s %ld: %g instead of %g\n", what, static_cast<long>(i), g, e);
    CHECK(same);
  }
}

void check(
    const Case& c, int schedules, const std::function<void(Buffer&)>& alter = [](Buffer&) {}) {
  const int64_t rows = c.points ? 1 : c.images;
  Buffer embeddings(c.dtype, {rows, c.channels, c.pixels}, c.layout);
  fill_normal(embeddings, c.dtype);
  dispatch_floating(c.dtype, "test", [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < embeddings.size(); ++i) {
      embeddings.as<T>()[i] = rounded<T>(c.scale * value(embeddings, i));
    }
  });
  alter(embeddings);
  Buffer indices(DType::i64, {c.images, c.instances, c.samples});
  std::vector<int64_t> order(c.pixels);
  for (int64_t i = 0; i < c.pixels; ++i) order[i] = i;
  size_t next = 0;
  for (int64_t k = 0; k < indices.size(); ++k) {
    if (!c.points && k % (c.instances * c.samples) == 0) next = 0;
    if (next == 0) std::shuffle(order.begin(), order.end(), generator);
    const bool gap = next == order.size() || (c.gaps > 0 && draw(1, c.gaps) == 1);
    indices.as<int64_t>()[k] = gap ? -1 : order[next++];
  }
  Buffer grads(c.accumulation(), {c.images});
  fill_normal(grads, c.accumulation());

  const Array* none = nullptr;
  Results expected(c);
  forward(embeddings, indices, expected.losses, &expected.slopes, 1);
  backward(grads, expected.slopes, indices, expected.gradient, 1);
  const double tolerance = c.dtype == DType::f64 ? 1e-13 : 2e-5;
  std::vector<char> bits;
  for_schedules(schedules, [&] {
    Results got(c);
    Buffer workspace = memory(cuda_workspace(embeddings, indices));
    forward_cuda(embeddings, indices, got.losses, c.differentiable ? &got.slopes : none, workspace,
                 0);
    check_same("loss", got.losses, expected.losses, tolerance);
    std::vector<char> now(got.losses.raw(), got.losses.raw() + got.losses.bytes());
    if (c.differentiable) {
      check_same("slope", got.slopes, expected.slopes, tolerance);
      now.insert(now.end(), got.slopes.raw(), got.slopes.raw() + got.slopes.bytes());
      backward_cuda(grads, expected.slopes, indices, got.gradient, 0);
      CHECK(same_bits(got.gradient, expected.gradient));
    }
    if (bits.empty()) bits = now;
    CHECK(bits == now);  // whatever the schedule
  });
}

}  // namespace

void test_pairwise_similarity(int schedules) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    for (const auto& layout : std::vector<std::vector<int>>{{0, 1, 2}, {0, 2, 1}}) {
      Case c;
      c.dtype = dtype;
      c.layout = layout;
      c.images = 2;
      check(c, schedules);
    }
  }
  for (const int64_t channels : {1, 31, 32, 33, 70}) {
    Case c;
    c.channels = channels;
    c.scale = 1 / std::sqrt(static_cast<double>(channels));
    c.instances = 5;
    check(c, schedules);
  }
  for (const int64_t instances : {0, 1, 2, 19}) {
    for (const int64_t samples : {1, 4, 33}) {
      Case c;
      c.instances = instances;
      c.samples = instances == 19 ? std::min<int64_t>(samples, 8) : samples;
      c.images = instances == 2 ? 0 : 2;
      c.gaps = samples == 4 ? 2 : 0;
      check(c, schedules);
    }
  }
  for (const double scale : {0.0, 1e-4, 30.0, 1e14, 1e17}) {  // all together; far apart; beyond
    Case c;
    c.scale = scale;
    c.gaps = 0;
    check(c, schedules);
    c.dtype = DType::f64;
    check(c, schedules);
  }
  {  // no gradients wanted; room for many more instances; points of several images in one
    Case c;
    c.differentiable = false;
    check(c, schedules);
    c.instances = 200;
    c.samples = 2;
    c.pixels = 60;
    c.differentiable = true;
    c.gaps = 3;
    check(c, schedules);
    c.points = true;
    c.images = 3;
    c.instances = 9;
    check(c, schedules);
  }
  for (const float wrong : {NAN, INFINITY}) {  // shows in its own image only
    Case c;
    c.images = 2;
    c.gaps = 0;
    c.pixels = c.instances * c.samples;
    check(c, schedules, [&](Buffer& embeddings) { embeddings.as<float>()[17] = wrong; });
  }
  for (const int64_t wrong : {int64_t{200}, INT64_MAX, int64_t{-2}}) {  // is no pixel
    Case c;
    Buffer embeddings(c.dtype, {1, c.channels, c.pixels});
    fill_normal(embeddings, c.dtype);
    Buffer indices(DType::i64, {1, c.instances, c.samples});
    for (int64_t k = 0; k < indices.size(); ++k) indices.as<int64_t>()[k] = k;
    indices.as<int64_t>()[9] = wrong;
    for_schedules(schedules, [&] {
      Results got(c);
      Buffer workspace = memory(cuda_workspace(embeddings, indices));
      forward_cuda(embeddings, indices, got.losses, &got.slopes, workspace, 0);
      CHECK(std::isnan(value(got.losses, 0)));
      Buffer grads(DType::f32, {1});
      grads.as<float>()[0] = 1;
      backward_cuda(grads, got.slopes, indices, got.gradient, 0);
    });
  }
}

}  // namespace instembed
