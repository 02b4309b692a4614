// The discriminative loss on the simulated device against the CPU kernel in float64, which the
// Python tests hold to its reference.
#include <cmath>

#include "cuda_on_cpu/tests.h"
#include "discriminative/cuda.h"

namespace instembed {

namespace {

using namespace discriminative;

struct Case {
  DType dtype = DType::f32;
  int64_t images = 1, channels = 3, pixels = 100;
  bool interleaved = false;
  int64_t run = 9, ids = 10;
  int norm = 2;
  bool push = false, pooled = false, ragged = false;
  int64_t spare = 3;  // capacity beyond the instances
};

void check(const Case& c, int schedules) {
  const std::vector<int> layout =
      c.interleaved ? std::vector<int>{0, 2, 1} : std::vector<int>{0, 1, 2};
  const int64_t rows = c.ragged ? 1 : c.images, columns = c.ragged ? c.images * c.pixels : c.pixels;
  Buffer embeddings(c.dtype, {rows, c.channels, columns}, layout);
  fill_normal(embeddings, c.dtype);
  Buffer exact(DType::f64, {rows, c.channels, columns}, layout);
  for (int64_t i = 0; i < exact.size(); ++i) {
    exact.as<double>()[i] = value(embeddings, c.dtype, i);
  }
  Buffer labels = make_labels({rows, columns}, c.ids, c.run);
  Buffer offsets(DType::i64, {c.images + 1});
  for (int64_t b = 0; b <= c.images; ++b) {  // of different sizes, one of them empty
    const int64_t at = b == 0 ? 0 : b == c.images ? columns : (b / 2) * 2 * c.pixels;
    offsets.as<int64_t>()[b] = at;
  }
  const Array* bounds = c.ragged ? &offsets : nullptr;
  Options options;
  options.norm = c.norm;
  options.background_push = c.push;
  options.pooled_variance = c.pooled;
  options.delta_var = 0.3;
  options.delta_dist = 1.2;
  options.rules = {0, int64_t{1} << 40};

  // In float64 on the CPU.
  Buffer terms(DType::f64, {c.images, 4}), weights(DType::f64, {c.images, 4});
  fill_normal(weights, DType::f64);
  Buffer first(DType::i64, {c.images + 1}), counts(DType::i64, {rows * columns + 1});
  Buffer vectors(DType::f64, {4, rows * columns + 1, c.channels});
  Buffer runs(DType::i32, {rows * (columns + 1024) + c.images * 1024 + 1});
  const State state{first, counts, vectors, runs};
  Buffer expected(DType::f64, {rows, c.channels, columns}, layout);
  forward(exact, labels, bounds, options, terms, &state);
  backward(exact, labels, bounds, options, weights, state, expected);

  int64_t most = 0;
  for (int64_t b = 0; b < c.images; ++b) {
    most = std::max(most, first.as<int64_t>()[b + 1] - first.as<int64_t>()[b]);
  }
  const int64_t capacity = std::max<int64_t>(most + c.spare, 1);
  const DType sums = sums_of(c.dtype);
  Buffer grad_terms(sums, {c.images, 4});
  fill_as(weights, sums, grad_terms);
  const double tolerance = tolerance_of(c.dtype);
  std::vector<char> bits;
  for_schedules(schedules, [&] {
    Buffer got(sums, {c.images, 4}), info(DType::i64, {2 * c.images + 1});
    Buffer sizes(DType::i64, {c.images * capacity});
    Buffer tables(sums, {c.push ? 4 : 3, c.images * capacity, c.channels});
    Buffer slots(DType::i32, {(rows * columns * cuda_slot_bytes(capacity) + 3) / 4});
    const CudaState kept{info, sizes, tables, slots};
    Buffer workspace(DType::u8, {cuda_workspace(embeddings, bounds, options, capacity, false)});
    forward_cuda(embeddings, labels, bounds, options, got, kept, workspace, 0);
    Buffer grad(c.dtype, {rows, c.channels, columns}, layout);
    Buffer again(DType::u8, {cuda_workspace(embeddings, bounds, options, capacity, true)});
    backward_cuda(embeddings, bounds, options, grad_terms, kept, grad, again, 0);
    if (most > capacity) {
      for (int64_t k = 0; k < grad.size(); ++k) CHECK(std::isnan(value(grad, c.dtype, k)));
      for (int64_t k = 0; k < 4; ++k) CHECK(std::isnan(value(got, sums, k)));
      return;
    }
    check_close(got, sums, terms, sums == DType::f64 ? 1e-11 : 5e-6);
    check_close(grad, c.dtype, expected, tolerance);
    std::vector<char> now(got.raw(), got.raw() + got.bytes());
    now.insert(now.end(), grad.raw(), grad.raw() + grad.bytes());
    if (bits.empty()) bits = now;
    CHECK(bits == now);  // whatever the schedule
  });
}

}  // namespace

void test_discriminative(int schedules) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    for (const bool interleaved : {false, true}) {
      Case c;
      c.dtype = dtype;
      c.interleaved = interleaved;
      c.images = 2;
      c.channels = interleaved ? 8 : 5;
      c.pixels = interleaved ? 1030 : 2100;
      check(c, schedules);
      c.push = true;
      c.norm = 1;
      c.ragged = interleaved;
      c.pixels = 103;
      check(c, schedules);
    }
  }
  for (const int64_t channels : {1, 2, 21, 70, 260}) {
    Case c;
    c.channels = channels;
    c.pixels = channels > 20 ? 100 : 1100;
    c.images = 2;
    c.pooled = true;
    c.interleaved = channels > 100;
    check(c, schedules);
  }
  // The kernels of few channels: every number that registers are made for, with tables of a warp,
  // of a block, and in global memory.
  for (const int64_t channels : {8, 16, 31, 32}) {
    for (const int64_t ids : {3, 150}) {
      Case c;
      c.channels = channels;
      c.dtype = channels == 16 ? DType::f64 : DType::f32;
      c.pixels = 701;
      c.ids = channels == 31 ? 2 * ids : ids;
      c.run = ids == 3 ? 40 : 2;
      c.interleaved = channels == 8 || channels == 31;
      c.norm = channels == 31 ? 1 : 2;
      check(c, schedules);
      c.dtype = DType::bf16;
      if (channels == 16) check(c, schedules);
    }
  }
  for (const int64_t pixels : {0, 1, 31, 33, 2049}) {
    Case c;
    c.pixels = pixels;
    c.ids = 1;  // one instance
    c.push = true;
    check(c, schedules);
    c.ids = 0;  // none
    check(c, schedules);
    c.images = 0;
    check(c, schedules);
  }
  Case c;
  c.pixels = 1000;
  c.channels = 8;
  c.ids = 300;
  c.run = 1;
  check(c, schedules);
  c.spare = -2;  // too many
  check(c, schedules);
  c.channels = 33;  // with more than a table in shared memory takes
  c.pixels = 400;
  c.interleaved = true;
  check(c, schedules);
  c.spare = 3;
  check(c, schedules);
  c = {};
  c.ragged = true;
  c.images = 6;
  c.pixels = 90;
  c.run = 1;
  check(c, schedules);
  c.spare = 9000;  // slots of 32 bits
  check(c, schedules);
  c = {};
  c.ragged = true;  // more tables than a thread reads at a time
  c.channels = 129;
  c.pixels = 512;
  c.ids = 3;
  check(c, schedules);
}

}  // namespace instembed
