// Seeds and what grows from them on the simulated device against the CPU kernels, which the Python
// tests hold to their references.
#include <cmath>
#include <limits>

#include "cuda_on_cpu/tests.h"
#include "seeds/cuda.h"

namespace instembed {

namespace {

using namespace seeds;

const std::vector<int> kPlanar{0, 1, 2}, kInterleaved{0, 2, 1}, kStrided{2, 0, 1};

struct Case {
  DType dtype = DType::f32;
  int64_t images = 2, channels = 3, pixels = 150, seeds = 12;
  std::vector<int> layout = kPlanar;
  int64_t clusters = 6, run = 20;  // points about so many centres, in runs of about so many pixels
  double spread = 0.3;             // of the points, where the centres are about 2 apart
  bool whole_numbers = false;      // distances and objectives meet
  double grain = 0;                // what those are off by, about; then all are equally seedy
  bool rough = false;              // some values are not finite
  bool unordered = false;          // a third of the scores are NaN
  double foreground = 1;           // of the pixels, by a mask
  std::vector<double> radii{1.94, 1.1, 0.51, 0.2};  // squared
  Growth growth;
  Selection selection;
};

struct Data {
  Buffer embeddings, labels, mask, seediness, seeds, scores, radii;
  const Array* counted;

  // A quarter of the seeds is none.
  explicit Data(const Case& c)
      : embeddings(c.dtype, {c.images, c.channels, c.pixels}, c.layout),
        labels(DType::i64, {c.images, c.pixels}),
        mask(DType::u8, {c.images, c.pixels}, {1, 0}),
        seediness(c.dtype, {c.images, c.pixels}, {1, 0}),
        seeds(DType::i64, {c.images, c.seeds}),
        scores(DType::f64, {c.images, c.seeds}),
        radii(DType::f64, {c.images, c.seeds}),
        counted(c.foreground < 1 ? &mask : nullptr) {
    std::normal_distribution<double> normal;
    std::vector<double> centers(c.clusters * c.channels);
    for (double& value : centers) value = 1.4 * normal(generator);
    for (int64_t b = 0; b < c.images; ++b) {
      int64_t own = 0;
      for (int64_t i = 0; i < c.pixels; ++i) {
        if (draw(1, c.run) == 1) own = draw(0, c.clusters - 1);
        labels.as<int64_t>()[b * c.pixels + i] = (own == 1 ? -1 : own) * (int64_t{1} << 40);
        mask.as<uint8_t>()[i * c.images + b] =
            static_cast<uint8_t>(draw(1, 1000) <= 1000 * c.foreground ? draw(1, 255) : 0);
        for (int64_t d = 0; d < c.channels; ++d) {
          double value = centers[own * c.channels + d] + c.spread * normal(generator);
          if (c.whole_numbers)
            value = static_cast<double>(draw(-1, 1)) + c.grain * normal(generator);
          if (c.rough && draw(1, 40) == 1) value = strange(c.dtype);
          const Array& array = embeddings;
          set(embeddings, c.dtype,
              b * array.strides[0] + d * array.strides[1] + i * array.strides[2], value);
        }
        double value = c.grain > 0 ? 0.5 : draw(-1, 20) / 20.0;
        if (c.rough && draw(1, 20) == 1) value = strange(c.dtype);
        set(seediness, c.dtype, i * c.images + b, value);
      }
      for (int64_t s = 0; s < c.seeds; ++s) {
        const int64_t k = b * c.seeds + s;
        seeds.as<int64_t>()[k] = draw(1, 4) == 1 || c.pixels == 0 ? -1 : draw(0, c.pixels - 1);
        scores.as<double>()[k] = c.unordered && draw(1, 3) == 1 ? NAN : draw(0, 8) / 8.0;
        radii.as<double>()[k] = c.radii[draw(0, static_cast<int64_t>(c.radii.size()) - 1)];
      }
    }
  }

  double value(int64_t image, int64_t channel, int64_t pixel) {
    const Array& array = embeddings;
    return dispatch_floating(array.dtype, "test", [&](auto type) {
      return static_cast<double>(
          embeddings.as<decltype(type)>()[image * array.strides[0] + channel * array.strides[1] +
                                          pixel * array.strides[2]]);
    });
  }

  // Every radius becomes the distance of some pixel from a seed, or the number below.
  void move_to_border(Case* c) {
    const auto distance = [&](int64_t b, int64_t seed) {
      const int64_t pixel = draw(0, c->pixels - 1);
      double total = 0;
      for (int64_t d = 0; d < c->channels; ++d) {
        const double difference = value(b, d, pixel) - value(b, d, seed < 0 ? 0 : seed);
        total += difference * difference;
      }
      return draw(0, 1) ? total : std::nextafter(total, -1);
    };
    for (int64_t k = 0; k < seeds.size(); ++k) {
      radii.as<double>()[k] = distance(k / c->seeds, seeds.as<int64_t>()[k]);
    }
    for (double& radius : c->radii) radius = distance(0, seeds.as<int64_t>()[0]);
  }

  static void set(Buffer& array, DType dtype, int64_t i, double value) {
    dispatch_floating(dtype, "test", [&](auto type) {
      using T = decltype(type);
      array.as<T>()[i] = rounded<T>(value);
    });
  }

  static double strange(DType dtype) {
    const double largest = dtype == DType::f64 ? 1e300 : dtype == DType::f16 ? 6e4 : 1e38;
    const double values[] = {NAN, INFINITY, -INFINITY, largest, -largest};
    return values[draw(0, 4)];
  }
};

Buffer memory(int64_t bytes) {  // of NaNs
  Buffer workspace(DType::u8, {bytes});
  std::memset(workspace.as<char>(), 0xff, bytes);
  return workspace;
}

DType accumulation(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// ---------------------------------------------------------------------------------------------------------
// Each op, by the CPU kernel once and by the CUDA kernels under several schedules

void check_iou(const Case& c, const Data& data, const LabelRules& rules, int schedules) {
  const auto radii = static_cast<int64_t>(c.radii.size());
  Buffer expected(accumulation(c.dtype), {c.images, c.seeds, radii});
  mask_iou(data.embeddings, data.labels, data.seeds, c.radii, rules, expected, 1);
  for_schedules(schedules, [&] {
    Buffer got(accumulation(c.dtype), {c.images, c.seeds, radii});
    mask_iou_cuda(data.embeddings, data.labels, data.seeds, c.radii, rules, got,
                  memory(mask_iou_cuda_workspace(data.embeddings, data.seeds)), 0);
    CHECK(same_bits(got, expected));
  });
}

void check_select(const Case& c, const Data& data, int schedules) {
  const DType type = c.layout == kStrided ? DType::f64 : DType::f32;
  Buffer indices(DType::i64, {c.images, c.seeds}), scores(type, {c.images, c.seeds});
  select(data.embeddings, data.seediness, data.counted, c.selection, indices, scores, 1);
  for_schedules(schedules, [&] {
    Buffer got(DType::i64, {c.images, c.seeds}), at(type, {c.images, c.seeds});
    select_cuda(data.embeddings, data.seediness, data.counted, c.selection, got, at,
                memory(select_cuda_workspace(data.embeddings)), 0);
    CHECK(same_bits(got, indices));
    CHECK(same_bits(at, scores));
  });
}

struct Grown {
  Buffer labels, order, counts, instances;

  explicit Grown(const Case& c)
      : labels(DType::i64, {c.images, c.pixels}),
        order(DType::i64, {c.images, c.seeds}),
        counts(DType::i64, {c.images, c.seeds}),
        instances(DType::i64, {c.images}) {}
};

void check_grow(const Case& c, const Data& data, int schedules) {
  Grown expected(c);
  grow(data.embeddings, data.counted, data.seeds, data.scores, data.radii, c.growth,
       expected.labels, expected.order, expected.counts, expected.instances, 1);
  for_schedules(schedules, [&] {
    Grown got(c);
    grow_cuda(data.embeddings, data.counted, data.seeds, data.scores, data.radii, c.growth,
              got.labels, got.order, got.counts, got.instances,
              memory(grow_cuda_workspace(data.embeddings, data.seeds)), 0);
    CHECK(same_bits(got.labels, expected.labels));
    CHECK(same_bits(got.order, expected.order));
    CHECK(same_bits(got.counts, expected.counts));
    CHECK(same_bits(got.instances, expected.instances));
  });
}

void check(Case c, int schedules, bool border = false) {
  Data data(c);
  if (border) data.move_to_border(&c);
  check_iou(c, data, {0, -(int64_t{1} << 40)}, schedules);
  check_select(c, data, schedules);
  check_grow(c, data, schedules);
}

void check_wrong_seeds(int schedules) {
  Case c;
  Data data(c);
  int64_t* seeds = data.seeds.as<int64_t>();
  for (int64_t k = 0; k < data.seeds.size(); ++k) seeds[k] = -1;
  Grown nothing(c);
  grow(data.embeddings, nullptr, data.seeds, data.scores, data.radii, c.growth, nothing.labels,
       nothing.order, nothing.counts, nothing.instances, 1);
  const int64_t wrong[] = {c.pixels, INT64_MAX, -2, INT64_MIN};
  for (int64_t k = 0; k < data.seeds.size(); ++k) seeds[k] = wrong[k % 4];
  for_schedules(schedules, [&] {
    Buffer iou(DType::f32, {c.images, c.seeds, 4});
    mask_iou_cuda(data.embeddings, data.labels, data.seeds, c.radii, {}, iou,
                  memory(mask_iou_cuda_workspace(data.embeddings, data.seeds)), 0);
    for (int64_t k = 0; k < iou.size(); ++k) CHECK(std::isnan(iou.as<float>()[k]));
    Grown got(c);
    grow_cuda(data.embeddings, nullptr, data.seeds, data.scores, data.radii, c.growth, got.labels,
              got.order, got.counts, got.instances,
              memory(grow_cuda_workspace(data.embeddings, data.seeds)), 0);
    CHECK(same_bits(got.labels, nothing.labels) && same_bits(got.order, nothing.order));
  });
}

// Seeds without a score come last, in their order.
void check_unordered(int schedules) {
  Case c;
  c.images = 1;
  c.seeds = 4;
  c.growth.overlap = 1;
  Data data(c);
  for (int64_t k = 0; k < c.seeds; ++k) {
    data.seeds.as<int64_t>()[k] = 30 * k;
    data.scores.as<double>()[k] = k < 2 ? NAN : static_cast<double>(k);
    data.radii.as<double>()[k] = 0;  // of itself only
  }
  Grown grown(c);
  grow(data.embeddings, nullptr, data.seeds, data.scores, data.radii, c.growth, grown.labels,
       grown.order, grown.counts, grown.instances, 1);
  const int64_t expected[] = {3, 2, 0, 1};
  CHECK(std::equal(expected, expected + 4, grown.order.as<int64_t>()));
  check_grow(c, data, schedules);
}

}  // namespace

void test_seeds(int schedules) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    for (const auto& layout : {kPlanar, kInterleaved, kStrided}) {
      Case c;
      c.dtype = dtype;
      c.layout = layout;
      c.rough = layout != kPlanar;
      c.foreground = layout == kStrided ? 0.6 : 1;
      c.growth.min_size = layout == kInterleaved ? 12 : 1;
      check(c, schedules);
    }
  }
  for (const int64_t pixels : {0, 1, 31, 33, 700}) {
    for (const int64_t images : {0, 1, 4}) {
      Case c;
      c.pixels = images == 4 ? std::min<int64_t>(pixels, 50) : pixels;
      c.images = images;
      c.growth.min_size = 5;
      check(c, schedules);
    }
  }
  for (const int64_t channels : {1, 8, 9, 17, 40}) {
    Case c;
    c.channels = channels;
    c.images = 1;
    c.spread = 0.7 / std::sqrt(static_cast<double>(channels));
    check(c, schedules);
  }
  for (const int64_t seeds : {0, 1, 32, 33, 90}) {  // more than pixels
    Case c;
    c.seeds = seeds;
    c.pixels = 70;
    c.growth.overlap = seeds == 33 ? 1 : 0.2;
    check(c, schedules);
  }
  for (const DType dtype : {DType::f32, DType::f64}) {  // on the border, and of equals the first
    for (const double diversity : {0.0, 0.3}) {
      Case c;
      c.dtype = dtype;
      c.whole_numbers = true;
      c.radii = {2, 1, 0, 4};
      c.growth.overlap = 1;
      c.growth.min_size = 8;
      c.selection = {diversity, 0.2};
      check(c, schedules);
    }
  }
  for (const int64_t channels : {2, 13}) {  // float does not tell distances apart
    Case c;
    c.channels = channels;
    c.whole_numbers = true;
    c.grain = 1e-7;
    c.seeds = 60;
    check(c, schedules);
  }
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const int64_t channels : {2, 13}) {
      Case c;
      c.dtype = dtype;
      c.channels = channels;
      c.radii = std::vector<double>(8);
      c.seeds = 40;
      check(c, schedules, true);
    }
  }
  {  // several groups of pixels a warp, all of one instance
    Case c;
    c.images = 9;
    c.pixels = 900;
    c.clusters = 2;
    c.run = 300;
    c.spread = 0.1;
    c.seeds = 5;
    check_grow(c, Data(c), schedules);
  }
  {
    Case c;
    c.unordered = true;
    c.seeds = 40;
    check(c, schedules);
  }
  {  // one mask over everything; instances that others leave too little of, again and again
    Case c;
    c.radii = {1e9};
    check(c, schedules);
    c.radii = {3, 2, 1};
    c.growth.overlap = 1;
    c.seeds = 40;
    for (const int64_t size : {3, 6, 12, 40}) {
      c.growth.min_size = size;
      check(c, schedules);
    }
    c.radii = std::vector<double>(11);  // more than one pass counts
    for (size_t t = 0; t < c.radii.size(); ++t) c.radii[t] = 0.2 * static_cast<double>(t);
    check(c, schedules);
  }
  check_wrong_seeds(schedules);
  check_unordered(schedules);
}

}  // namespace instembed
