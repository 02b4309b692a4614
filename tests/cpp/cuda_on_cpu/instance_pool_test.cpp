// Instance pooling on the simulated device against the CPU kernel in float64, which the Python
// tests hold to its reference.
#include "cuda_on_cpu/tests.h"
#include "instance_pool/cuda.h"

namespace instembed {

namespace {

using namespace instance_pool;

struct Case {
  DType dtype = DType::f32;
  int64_t images = 1, channels = 3, pixels = 100;
  bool interleaved = false;
  int64_t run = 9, ids = 10;
  bool ragged = false;
  int64_t spare = 3;  // capacity beyond the instances
};

struct Pooled {
  Buffer pooled, valid, ids, counts, argmax;

  Pooled(DType sums, int64_t images, int64_t capacity, int64_t channels)
      : pooled(sums, {images, capacity, channels}),
        valid(DType::u8, {images, capacity}),
        ids(DType::i64, {images, capacity}),
        counts(DType::i64, {images, capacity}),
        argmax(DType::i64, {images, capacity, channels}) {}

  Outputs outputs(Reduce reduce) const {
    return {pooled, valid, ids, counts, reduce == Reduce::max ? &argmax : nullptr};
  }
};

void check(const Case& c, Reduce reduce, int schedules) {
  const std::vector<int> layout =
      c.interleaved ? std::vector<int>{0, 2, 1} : std::vector<int>{0, 1, 2};
  const int64_t rows = c.ragged ? 1 : c.images, columns = c.ragged ? c.images * c.pixels : c.pixels;
  Buffer features(c.dtype, {rows, c.channels, columns}, layout);
  fill_normal(features, c.dtype);
  Buffer exact(DType::f64, {rows, c.channels, columns}, layout);
  for (int64_t i = 0; i < exact.size(); ++i) {
    exact.as<double>()[i] = value(features, c.dtype, i);
  }
  Buffer labels = make_labels({rows, columns}, c.ids, c.run);
  Buffer offsets(DType::i64, {c.images + 1});
  for (int64_t b = 0; b <= c.images; ++b) {  // of different sizes, one of them empty
    offsets.as<int64_t>()[b] = b == 0 ? 0 : b == c.images ? columns : (b / 2) * 2 * c.pixels;
  }
  const Array* bounds = c.ragged ? &offsets : nullptr;
  const LabelRules rules{0, int64_t{1} << 40};
  const bool max = reduce == Reduce::max;

  const Instances instances(labels, bounds, rules, 1);
  const int64_t most = instances.largest(), capacity = std::max<int64_t>(most + c.spare, 1);
  const DType sums = sums_of(c.dtype);
  const int64_t enough = std::max(capacity, most);
  Pooled expected(DType::f64, c.images, enough, c.channels);
  instances.pool(exact, bounds, reduce, expected.outputs(reduce), 1);
  Buffer weights(DType::f64, {c.images, enough, c.channels});
  fill_normal(weights, DType::f64);
  Buffer grad(sums, {c.images, enough, c.channels});
  fill_as(weights, sums, grad);
  Buffer expected_grad(DType::f64, {rows, c.channels, columns}, layout);
  if (max) {
    spread_max(weights, expected.argmax, bounds, expected_grad, 1);
  } else {
    instances.spread(weights, bounds, reduce, expected_grad, 1);
  }

  std::vector<char> bits;
  for_schedules(schedules, [&] {
    Pooled got(sums, c.images, capacity, c.channels);
    Buffer found(DType::i64, {c.images});
    Buffer workspace(DType::u8, {pool_workspace(features, bounds, reduce, capacity)});
    pool_cuda(features, labels, bounds, rules, reduce, got.outputs(reduce), found, workspace, 0);
    if (capacity < most) {
      CHECK(c.images == 1 && found.as<int64_t>()[0] == capacity + 1);
      for (int64_t k = 0; k < got.pooled.size(); ++k) CHECK(std::isnan(value(got.pooled, sums, k)));
      for (int64_t k = 0; k < got.ids.size(); ++k) {
        CHECK(got.valid.as<uint8_t>()[k] == 0 && got.ids.as<int64_t>()[k] == 0);
        CHECK(got.counts.as<int64_t>()[k] == 0);
      }
      return;
    }
    check_close(got.pooled, sums, expected.pooled, sums == DType::f64 ? 1e-14 : 2e-7);
    CHECK(same_bits(got.valid, expected.valid) && same_bits(got.ids, expected.ids));
    CHECK(same_bits(got.counts, expected.counts));
    Buffer gradient(c.dtype, {rows, c.channels, columns}, layout);
    if (max) {
      CHECK(same_bits(got.argmax, expected.argmax));
      spread_max_cuda(grad, got.argmax, bounds, gradient, 0);
    } else {
      Buffer again(DType::u8, {spread_workspace(gradient, bounds, capacity)});
      spread_cuda(grad, labels, bounds, rules, reduce, gradient, again, 0);
    }
    check_close(gradient, c.dtype, expected_grad, tolerance_of(c.dtype));
    std::vector<char> now(got.pooled.raw(), got.pooled.raw() + got.pooled.bytes());
    now.insert(now.end(), gradient.raw(), gradient.raw() + gradient.bytes());
    if (bits.empty()) bits = now;
    CHECK(bits == now);  // whatever the schedule
  });
}

void check(const Case& c, int schedules) {
  for (const Reduce reduce : {Reduce::mean, Reduce::sum, Reduce::max}) check(c, reduce, schedules);
}

}  // namespace

void test_instance_pool(int schedules) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    for (const bool interleaved : {false, true}) {
      Case c;
      c.dtype = dtype;
      c.interleaved = interleaved;
      c.images = 2;
      c.channels = interleaved ? 8 : 5;
      c.pixels = interleaved ? 530 : 1100;
      check(c, schedules);
      c.ragged = true;
      c.images = 3;
      c.pixels = 103;
      check(c, schedules);
    }
  }
  for (const int64_t channels : {1, 2, 21, 64, 70, 260}) {
    Case c;
    c.channels = channels;
    c.pixels = 170;
    check(c, schedules);
  }
  for (const int64_t pixels : {1, 31, 33, 513}) {
    Case c;
    c.pixels = pixels;
    c.spare = 0;
    check(c, schedules);
  }
  Case many;  // more instances than a table in shared memory has room for, in runs of one pixel
  many.pixels = 3000;
  many.run = 1;
  many.ids = 2500;
  many.channels = 7;
  check(many, schedules);
  Case few;  // instances that no block has alone
  few.ids = 2;
  few.run = 300;
  few.pixels = 5000;
  check(few, schedules);
  for (const int64_t ids : {8, 20, 45}) {  // 4 tables of a block, 2 and 1; one less for maxima
    Case c;
    c.channels = 64;
    c.pixels = 300;
    c.ids = ids;
    c.run = 3;
    check(c, schedules);
  }
  Case wide;  // several tiles a block
  wide.channels = 200;
  wide.pixels = 1500;
  check(wide, schedules);
  Case none;
  none.ids = 0;
  check(none, schedules);
  none.images = 0;
  check(none, schedules);
  Case overflow;
  overflow.spare = -2;
  check(overflow, schedules);
}

}  // namespace instembed
