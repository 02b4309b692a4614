// Mean-shift grouping on the simulated device against the CPU kernel, which the Python tests hold
// to its reference.
#include <cmath>
#include <limits>

#include "cuda_on_cpu/tests.h"
#include "mean_shift/cuda.h"

namespace instembed {

namespace {

using namespace mean_shift;

struct Case {
  DType dtype = DType::f32;
  int64_t images = 1, channels = 3, pixels = 150;
  std::vector<int> layout{0, 1, 2};
  int64_t clusters = 6, run = 20;  // points about so many centres, in runs of about so many pixels
  double spread = 0.2;             // of the points, where the centres are about 3 apart
  bool rough = false;              // some points lie between two centres
  bool whole_numbers = false;      // sums are exact, and distances meet the bandwidth
  int64_t ids = 0;                 // classes; 1: a mask of 0 and 1
  double foreground = 1;           // of the pixels, where there is a mask
  DType mask_type = DType::i64;
  bool ragged = false;
  std::function<int64_t(int64_t)> classes;  // of each pixel, instead
  int64_t spare = 2;                        // capacity beyond the instances
  Options options;

  Case() { options.bandwidth = 1.5; }
};

void set(Buffer& array, DType dtype, int64_t i, double value) {
  dispatch_floating(dtype, "test", [&](auto type) {
    using T = decltype(type);
    array.as<T>()[i] = rounded<T>(value);
  });
}

// Element (row, channel, column) of an array whatever its layout.
int64_t place(const Array& array, int64_t row, int64_t channel, int64_t column) {
  return row * array.strides[0] + channel * array.strides[1] + column * array.strides[2];
}

void fill_points(const Case& c, Buffer& embeddings) {
  const Array& array = embeddings;
  std::normal_distribution<double> normal;
  std::vector<double> centers(c.clusters * c.channels);
  for (double& value : centers) value = 2.5 * normal(generator);
  for (int64_t row = 0; row < array.shape[0]; ++row) {
    int64_t own = 0;
    for (int64_t i = 0; i < array.shape[2]; ++i) {
      if (draw(1, c.run) == 1) own = draw(0, c.clusters - 1);
      const int64_t other = draw(0, c.clusters - 1);
      const double mix = c.rough && draw(0, 9) == 0 ? draw(0, 100) / 100.0 : 0;
      for (int64_t d = 0; d < c.channels; ++d) {
        double value = (1 - mix) * centers[own * c.channels + d] +
                       mix * centers[other * c.channels + d] + c.spread * normal(generator);
        if (c.whole_numbers) value = static_cast<double>(draw(-3, 3));
        set(embeddings, c.dtype, place(array, row, d, i), value);
      }
    }
  }
}

struct Found {
  Buffer labels, centers, counts, instances, iterations;

  Found(const Case& c, int64_t rows, int64_t columns, int64_t capacity)
      : labels(DType::i64, {rows, columns}),
        centers(c.dtype == DType::f64 ? DType::f64 : DType::f32, {c.images, capacity, c.channels}),
        counts(DType::i64, {c.images, capacity}),
        instances(DType::i64, {c.images}),
        iterations(DType::i64, {c.images}) {}

  double center(int64_t i) {
    return static_cast<const Array&>(centers).dtype == DType::f64 ? centers.as<double>()[i]
                                                                  : centers.as<float>()[i];
  }
};

void report(const char* what, int64_t at, int64_t got, int64_t expected) {
  std::fprintf(stderr, "%s %ld: %ld instead of %ld\n", what, static_cast<long>(at),
               static_cast<long>(got), static_cast<long>(expected));
}

void check_same(Found& got, Found& expected) {
  for (int64_t b = 0; b < expected.instances.size(); ++b) {
    const int64_t a = got.instances.as<int64_t>()[b], e = expected.instances.as<int64_t>()[b];
    if (a != e) report("image", b, a, e);
    CHECK(a == e);
  }
  for (int64_t i = 0; i < expected.labels.size(); ++i) {
    const int64_t a = got.labels.as<int64_t>()[i], e = expected.labels.as<int64_t>()[i];
    if (a != e) report("label of pixel", i, a, e);
    CHECK(a == e);
  }
  CHECK(same_bits(got.counts, expected.counts));
  CHECK(same_bits(got.iterations, expected.iterations));
  const bool wide = static_cast<const Array&>(expected.centers).dtype == DType::f64;
  for (int64_t i = 0; i < expected.centers.size(); ++i) {
    const double e = expected.center(i);
    CHECK(std::abs(got.center(i) - e) <= (wide ? 1e-13 : 1e-7) * (1 + std::abs(e)));
  }
}

// Shared memory that has room for so many seeds at a time, and not for twice as many.
int64_t shared_for(int seeds, const Case& c) {
  return 1200 + seeds * 8 * (13 * (c.channels + 1) + 2 * c.channels + 4);
}

// Returns how often blocks arrived at a barrier of the first group, where it has several.
uint64_t run(const Case& c, const Buffer& embeddings, const Array* mask, const Array* bounds,
             Found* got, int seeds = 8) {
  const int64_t capacity = static_cast<const Array&>(got->counts).shape[1];
  auto& shared = cuda::simulator::options.shared;
  const int64_t all_shared = shared;
  if (c.options.seeding == Seeding::peel && seeds < 8) {
    shared = std::min(shared, shared_for(seeds, c));
  }
  Buffer workspace(DType::u8, {cuda_workspace(embeddings, mask, bounds, c.options, capacity)});
  group_cuda(embeddings, mask, bounds, c.options,
             {got->labels, got->centers, got->counts, got->instances, got->iterations}, workspace,
             0);
  shared = all_shared;
  return workspace.as<uint64_t>()[0];
}

// `alter` may change some values of the embeddings.
void check(
    const Case& c, int schedules, const std::function<void(Buffer&)>& alter = [](Buffer&) {}) {
  const int64_t rows = c.ragged ? 1 : c.images, columns = c.ragged ? c.images * c.pixels : c.pixels;
  Buffer embeddings(c.dtype, {rows, c.channels, columns}, c.layout);
  fill_points(c, embeddings);
  alter(embeddings);
  Buffer mask(c.mask_type, {rows, columns});
  std::memset(mask.as<char>(), 0, mask.bytes());
  int64_t id = 1;
  for (int64_t i = 0; i < mask.size(); ++i) {
    if (draw(1, c.run) == 1) id = draw(0, c.ids);
    if (c.foreground < 1) id = draw(1, 1000) <= 1000 * c.foreground ? 1 : 0;
    if (c.classes) id = c.classes(i);
    if (c.mask_type == DType::i64) {
      mask.as<int64_t>()[i] = id < 2 ? id : (id % 2 ? id : -id) * (int64_t{1} << 40);
    } else {
      mask.as<uint8_t>()[i] = static_cast<uint8_t>(id);
    }
  }
  Buffer offsets(DType::i64, {c.images + 1});
  for (int64_t b = 0; b <= c.images; ++b) {  // of different sizes, one of them empty
    offsets.as<int64_t>()[b] = b == 0 ? 0 : b == c.images ? columns : (b / 2) * 2 * c.pixels;
  }
  const Array* classes = c.ids > 0 || c.classes ? &mask : nullptr;
  const Array* bounds = c.ragged ? &offsets : nullptr;

  Buffer expected_labels(DType::i64, {rows, columns});
  const Result result = group(embeddings, classes, bounds, c.options, expected_labels, 1);
  const int64_t capacity = std::max<int64_t>(result.largest() + c.spare, 1);
  std::vector<char> bits;
  if (capacity < result.largest()) {
    for_schedules(schedules, [&] {
      Found got(c, rows, columns, capacity);
      run(c, embeddings, classes, bounds, &got);
      for (int64_t b = 0; b < c.images; ++b) {
        const int64_t found = result.images[b].size();
        CHECK(got.instances.as<int64_t>()[b] == std::min(found, capacity + 1));
        if (found <= capacity) continue;
        for (int64_t k = 0; k < capacity; ++k) {
          CHECK(got.counts.as<int64_t>()[b * capacity + k] == 0);
          CHECK(got.center((b * capacity + k) * c.channels) == 0);
        }
        for (int64_t i = 0; i < c.pixels && !c.ragged; ++i) {
          CHECK(got.labels.as<int64_t>()[b * c.pixels + i] == 0);
        }
      }
    });
    return;
  }
  Found expected(c, rows, columns, capacity);
  std::memcpy(expected.labels.as<char>(), expected_labels.raw(), expected_labels.bytes());
  result.copy(expected.centers, expected.counts, expected.instances, expected.iterations);
  for_schedules(schedules, [&] {
    Found got(c, rows, columns, capacity);
    run(c, embeddings, classes, bounds, &got, 8 >> cuda::simulator::options.seed % 4);
    check_same(got, expected);
    std::vector<char> now(got.centers.raw(), got.centers.raw() + got.centers.bytes());
    if (bits.empty()) bits = now;
    CHECK(bits == now);  // whatever the schedule and the number of seeds at a time
  });
}

// Points on a line, in this order, with their class.
struct Place {
  double at;
  int64_t times = 1, label_class = 1;
};

// What a round of several seeds may guess wrong: balls reach 1.5. The first round has one seed,
// which is elsewhere.
const std::vector<std::vector<Place>> kRounds = {
    // All of a round's seeds are right, in more than a round.
    {{0}, {9}, {0, 40}, {18}, {27}, {36}, {45}, {54}, {63}, {72}, {81}, {90}, {99}, {90, 30}},
    // The second ball has members (1.4) that the first one takes.
    {{0, 10}, {1.4, 3}, {2}, {3, 2}, {9, 5}},
    // It loses them in its second shift, but would have had one shift less without them.
    {{0, 10}, {1.4, 3}, {2}, {3.4, 20}, {9, 5}},
    // -0.9 is near the first seed, not near its mode, and comes before the seed at 9: it is next.
    {{0}, {-0.9}, {9}, {1, 20}, {9, 5}, {-1.2, 2}, {18}, {17}, {19.1, 9}, {27}},
    // The same with seeds that come in the order of neither places nor modes.
    {{9}, {7.6}, {10.2, 20}, {0}, {1.3}, {-1.1, 9}, {2.4, 3}, {5}, {4}, {3, 2}, {6.1, 5}},
    // In float64 the sums of 1.7e308 overflow: each is given up alone, in the middle of a round.
    {{0}, {9}, {1.7e308, 3}, {18, 3}, {0, 3}, {27, 3}},
    // A chunk (1024 pixels) of another class names a seed that is not asked for.
    {{0, 4}, {0, 1200, 0}, {9, 1, 3}, {0, 1000, 0}, {10.2}, {11.4, 9}, {7.6, 2}},
    // A class is next only once the one before is empty; classes share places and tiles.
    {{0, 1, 2},
     {9, 1, 1},
     {0, 1, 1},
     {9, 9, 2},
     {18, 1, 2},
     {27, 1, 1},
     {1.4, 5, 1},
     {1.4, 5, 2},
     {2, 3, 1},
     {2.6, 4, 2},
     {9, 20, 3},
     {18, 9, 1},
     {27, 2, 2},
     {36, 1, 1},
     {0, 9, 3}},
    // Small clusters are dropped in the middle of a round.
    {{0}, {9}, {18}, {27}, {0, 5}, {27, 5}, {36, 9}, {45, 2}, {54, 5}, {63}, {72, 9}, {18, 5}},
};

void check_rounds(int schedules) {
  for (const std::vector<Place>& places : kRounds) {
    Case c;
    c.options.seeding = Seeding::peel;
    std::vector<Place> points{{500}};
    for (const Place& place : places) {
      for (int64_t k = 0; k < place.times; ++k) points.push_back(place);
    }
    c.channels = 1;
    c.pixels = static_cast<int64_t>(points.size());
    c.classes = [&](int64_t i) { return points[i].label_class; };
    for (const int64_t min_size : {1, 3}) {
      for (const int64_t spare : {0, -2}) {  // or too many instances, which shows within a round
        c.options.min_size = min_size;
        c.dtype = min_size == 1 ? DType::f32 : DType::f64;
        c.spare = spare;
        check(c, schedules, [&](Buffer& embeddings) {
          for (int64_t i = 0; i < c.pixels; ++i) set(embeddings, c.dtype, i, points[i].at);
        });
      }
    }
  }
}

// How many passes an image takes with so many seeds at a time. Blocks meet after each.
int64_t passes(const Case& c, const Buffer& embeddings, const Array* mask, int seeds) {
  Found got(c, c.images, c.pixels, 300);
  const uint64_t arrived = run(c, embeddings, mask, nullptr, &got, seeds);
  CHECK(arrived % cuda::simulator::options.resident == 0 && arrived > 0);
  return static_cast<int64_t>(arrived) / cuda::simulator::options.resident;
}

// Speculation is taken where it pays, and given up where it does not.
void check_passes() {
  generator.seed(1);
  Case c;
  c.options.seeding = Seeding::peel;
  const int64_t height = 128, width = 256, instances = 50;
  c.pixels = height * width;
  // A trained embedding: instances are patches that touch, with centres 3 apart (twice the
  // bandwidth) and points within 0.7 of them.
  std::vector<int64_t> rows(instances), columns(instances);
  for (int64_t k = 0; k < instances; ++k) {
    rows[k] = draw(0, height - 1);
    columns[k] = draw(0, width - 1);
  }
  Buffer embeddings(c.dtype, {1, c.channels, c.pixels});
  for (int64_t i = 0; i < c.pixels; ++i) {
    int64_t own = 0, least = INT64_MAX;
    for (int64_t k = 0; k < instances; ++k) {
      const int64_t y = i / width - rows[k], x = i % width - columns[k];
      if (y * y + x * x < least) own = k;
      least = std::min(least, y * y + x * x);
    }
    for (int64_t d = 0, rest = own; d < c.channels; ++d, rest /= 4) {
      set(embeddings, c.dtype, place(embeddings, 0, d, i),
          3.0 * static_cast<double>(rest % 4) + draw(-400, 400) / 1000.0);
    }
  }
  // One after the other they take 1 + 3 * 50.
  CHECK(passes(c, embeddings, nullptr, 8) <= 40);
  // Few points without structure.
  c.pixels = 40960;
  c.options.bandwidth = 3;
  Buffer noise(c.dtype, {1, c.channels, c.pixels}), mask(DType::u8, {1, c.pixels});
  for (int64_t i = 0; i < c.pixels; ++i) {
    mask.as<uint8_t>()[i] = draw(1, 250) == 1;
    for (int64_t d = 0; d < c.channels; ++d) {
      set(noise, c.dtype, place(noise, 0, d, i), draw(-400, 400) / 100.0);
    }
  }
  const Array points = mask;
  const int64_t alone = passes(c, noise, &points, 1);
  CHECK(passes(c, noise, &points, 8) <= alone + alone / 8);
  // Seeds that are far from the first two: a second look at as many chunks as there are threads
  // finds them, 1 + 2 + 3 passes; but there is no third one, and the second cluster has a round of
  // its own.
  c = Case();
  c.options.seeding = Seeding::peel;
  c.channels = 1;
  const int64_t chunk = 1024, threads = 384;
  for (const int64_t first : {threads, 2 * threads}) {
    c.pixels = chunk * (first + 2);
    Buffer far(c.dtype, {1, c.channels, c.pixels}), seen(DType::u8, {1, c.pixels});
    std::memset(seen.as<char>(), 0, seen.bytes());
    for (int64_t k = 0; k < 9; ++k) {
      const int64_t i = k < 2 ? k : chunk * first + 150 * k;
      seen.as<uint8_t>()[i] = 1;
      set(far, c.dtype, i, 3.0 * static_cast<double>(k));
    }
    const Array places = seen;
    CHECK(passes(c, far, &places, 8) == (first == threads ? 6 : 8));
  }
  // Nearly every guess is wrong: seeds are 0.5 apart, and each moves away, in a direction of its
  // own, so that it leaves the next one, which it is near to.
  const int64_t steps = 40;
  c.options.bandwidth = 1.5;
  c.channels = 11;
  c.pixels = height * width;
  Buffer ladder(c.dtype, {1, c.channels, c.pixels}), some(DType::u8, {1, c.pixels});
  for (int64_t i = 0; i < c.pixels; ++i) {
    const int64_t k = i % steps, direction = k % 20;
    some.as<uint8_t>()[i] = i < 31 * steps;
    for (int64_t d = 0; d < c.channels; ++d) {
      double at = d == 0 ? 0.5 * static_cast<double>(k) : 0;
      if (i >= steps && d == 1 + direction / 2) at += direction % 2 ? 1.49 : -1.49;
      set(ladder, c.dtype, place(ladder, 0, d, i), at);
    }
  }
  const Array rungs = some;
  const int64_t one = passes(c, ladder, &rungs, 1);
  CHECK(passes(c, ladder, &rungs, 8) <= one + one / 8);
}

// Points in clusters 10 apart, of which the last channel tells. `offsets` are those of a cluster's
// points, in the first channel.
std::function<void(Buffer&)> clusters_of(const Case& c,
                                         const std::vector<std::vector<double>>& offsets,
                                         bool sorted = false) {
  return [=](Buffer& embeddings) {
    const Array& array = embeddings;
    const int64_t rows = array.shape[0], columns = array.shape[2];
    const auto kinds = static_cast<int64_t>(offsets.size());
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < columns; ++i) {
        const int64_t k = sorted ? i * kinds / columns : draw(0, kinds - 1);
        const int64_t point = draw(0, static_cast<int64_t>(offsets[k].size()) - 1);
        for (int64_t d = 0; d < c.channels; ++d) {
          const double value = d == 0 ? offsets[k][point] : d + 1 == c.channels ? 10.0 * k : 0.0;
          set(embeddings, c.dtype, place(array, row, d, i), value);
        }
      }
    }
  };
}

// The certificate, and tiles whose seeds are one: equal results, and less work.
void check_shortcuts(int schedules) {
  Case base;
  base.options.seeding = Seeding::all;  // of bandwidth 1.5
  base.pixels = 70;
  // All are members of each other; the ends are not; a neighbour is near one of them; points at h/2
  // from their mean and others at 1.5 h, which are then at h of one; just beyond that. Sums of all
  // are exact, so the test may ask for iterations at a tolerance of 0.
  const std::vector<std::vector<double>> mixed{{-0.125, 0, 0.125},   {-1.25, 0, 1.25},
                                               {-0.625, 0.625, 2},   {-0.75, 0.75, 2.25, 3.75},
                                               {-0.75, 0.75, 2.375}, {0}};
  for (const int64_t max_iter : {300, 1, 0}) {
    Case c = base;
    c.options.max_iter = max_iter;
    if (max_iter == 300) {
      c.options.tol = 0;
    } else {
      c.dtype = DType::f64;
      c.ids = 2;
      c.images = 2;
      c.ragged = true;
    }
    check(c, (schedules + 1) / 2, clusters_of(c, mixed));
  }
  const auto work = [&](double bandwidth, bool sorted) {
    Case c = base;
    c.pixels = 288;  // whole tiles of a cluster, if they are sorted
    c.options.bandwidth = bandwidth;
    cuda::simulator::options.resident = 1;  // so few warps that one has all seeds of a tile
    check(c, 1, clusters_of(c, {{-0.25, 0, 0.25}, {-0.25, 0, 0.25}, {0}}, sorted));
    cuda::simulator::options.resident = cuda::simulator::Options().resident;
    return cuda::simulator::operations;
  };
  // The same members, but at a bandwidth of 8 other clusters are not beyond 1.5 of it.
  const int64_t certain = work(1.5, false), alike = work(8, true), alone = work(8, false);
  CHECK(5 * certain < alone);
  CHECK(5 * alike < alone);
}

const std::vector<int> kPlanar{0, 1, 2}, kInterleaved{0, 2, 1}, kStrided{2, 0, 1};

}  // namespace

void test_mean_shift(int schedules) {
  for (const Seeding seeding : {Seeding::peel, Seeding::all}) {
    Case base;
    base.options.seeding = seeding;
    const bool all = seeding == Seeding::all;  // which costs the square of the pixels
    if (all) base.pixels = 70;
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
      for (const auto& layout : {kPlanar, kInterleaved, kStrided}) {
        Case c = base;
        c.dtype = dtype;
        c.layout = layout;
        c.images = 2;
        c.channels = layout == kInterleaved ? 8 : 5;
        c.rough = layout != kStrided;
        c.pixels = layout == kPlanar && !all ? 300 : 75;
        check(c, schedules);
      }
    }
    for (const int64_t pixels : {0, 1, 31, 33, all ? 65 : 1025}) {
      for (const int64_t images : {0, 1, 4}) {
        Case c = base;
        c.pixels = pixels;
        c.images = images;
        check(c, schedules);
      }
    }
    for (const int64_t channels : {1, 2, 9, 21, 70}) {
      Case c = base;
      c.channels = channels;
      c.spread = 0.05;
      c.pixels = channels > 9 ? 50 : 100;
      check(c, schedules);
    }
    for (const Leftovers leftovers : {Leftovers::noise, Leftovers::nearest}) {
      for (const int64_t ids : {0, 1, 7}) {
        Case c = base;
        c.images = 3;
        c.ids = ids;
        c.mask_type = ids == 1 ? DType::u8 : DType::i64;
        c.rough = true;
        c.ragged = leftovers == Leftovers::nearest;
        c.options.min_size = 9;
        c.options.leftovers = leftovers;
        check(c, schedules);
      }
    }
    {  // every pixel of a class of its own
      Case c = base;
      c.ids = 1 << 20;
      c.run = 1;
      c.pixels = 40;
      check(c, schedules);
    }
    for (const DType dtype : {DType::f32, DType::f64}) {  // distances that equal the bandwidth
      Case c = base;
      c.dtype = dtype;
      c.whole_numbers = true;
      c.channels = 2;
      c.options.bandwidth = 2;
      check(c, schedules);
    }
    {  // no two points together, and centres that move far
      Case c = base;
      c.spread = 3;
      c.pixels = 60;
      c.options.bandwidth = 0.5;
      check(c, schedules);
      c.options.bandwidth = 4;
      c.options.max_iter = 2;
      check(c, schedules);
      c.options.max_iter = 0;
      if (!all) check(c, schedules);  // check_shortcuts() has it
      c.options.max_iter = 300;
      c.options.tol = 0.3;
      check(c, schedules);
    }
    {  // too many instances
      Case c = base;
      c.clusters = 12;
      c.pixels = all ? 100 : 300;
      c.run = 6;
      c.images = 2;
      c.options.min_size = 3;
      c.spare = -1;
      check(c, schedules);
      c.spare = -5;
      check(c, schedules);
    }
    for (const DType dtype : {DType::f32, DType::f64, DType::f16}) {
      const double huge = dtype == DType::f64 ? 1.7e308 : dtype == DType::f32 ? 3e38 : 6e4;
      Case c = base;
      c.dtype = dtype;
      c.images = 2;
      c.options.leftovers = Leftovers::nearest;
      c.options.min_size = 4;
      check(c, schedules, [&](Buffer& embeddings) {  // what is not finite, or is nearly
        const double values[] = {std::nan(""),
                                 std::numeric_limits<double>::infinity(),
                                 -std::numeric_limits<double>::infinity(),
                                 huge,
                                 -huge,
                                 1e-40};
        for (int k = 0; k < 60; ++k) {
          set(embeddings, dtype, draw(0, embeddings.size() - 1), values[draw(0, 5)]);
        }
      });
      // Bandwidths for which no test in float is certain.
      for (const double scale : {1e-20, 1e18}) {
        if (dtype == DType::f16) continue;
        c.options.bandwidth = 1.5 * scale;
        check(c, schedules, [&](Buffer& embeddings) {
          for (int64_t i = 0; i < embeddings.size(); ++i) {
            const double value = dtype == DType::f64
                                     ? embeddings.as<double>()[i]
                                     : static_cast<double>(embeddings.as<float>()[i]);
            set(embeddings, dtype, i, value * scale);
          }
        });
      }
    }
    {  // several parts for several blocks
      Case c = base;
      c.pixels = 17000;
      c.run = 100;
      c.ids = 1;
      c.foreground = all ? 0.01 : 0.5;
      c.mask_type = DType::u8;
      c.options.min_size = 20;
      check(c, schedules);
      c.images = 2;
      c.pixels = 9000;
      check(c, schedules);
    }
  }
  check_rounds(schedules);
  check_passes();
  check_shortcuts(schedules);
  // Offsets that are none: nothing is found.
  Case c;
  c.ragged = true;
  c.images = 2;
  Buffer embeddings(c.dtype, {1, 3, 100});
  fill_points(c, embeddings);
  for (const auto& wrong :
       std::vector<std::vector<int64_t>>{{0, 90, 40}, {0, 50, 200}, {1, 50, 100}, {0, -5, 100}}) {
    Buffer offsets(DType::i64, {3});
    for (int k = 0; k < 3; ++k) offsets.as<int64_t>()[k] = wrong[k];
    Found got(c, 1, 100, 5);
    run(c, embeddings, nullptr, &offsets, &got);
    for (int b = 0; b < 2; ++b) CHECK(got.instances.as<int64_t>()[b] == -1);
    for (int i = 0; i < 100; ++i) CHECK(got.labels.as<int64_t>()[i] == 0);
  }
}

}  // namespace instembed
