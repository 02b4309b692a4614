// Native tests, to be run under AddressSanitizer and UndefinedBehaviorSanitizer.
//
// Every buffer is allocated to its exact size, so that a read or write one element past it aborts.
// Values are compared between layouts, label codes and thread counts; the Python tests compare them
// with the references.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "associative_embedding/associative_embedding.h"
#include "common/dtype.h"
#include "common/tournament.h"
#include "cosine_margin/cosine_margin.h"
#include "detections/detections.h"
#include "discriminative/discriminative.h"
#include "gather_at/gather_at.h"
#include "group_keypoints/group_keypoints.h"
#include "group_on_sphere/group_on_sphere.h"
#include "instance_pool/instance_pool.h"
#include "label_statistics/label_statistics.h"
#include "mean_shift/mean_shift.h"
#include "pairwise_similarity/pairwise_similarity.h"
#include "recurrent_mean_shift/recurrent_mean_shift.h"
#include "sample_pixels/sample_pixels.h"
#include "seeds/seeds.h"
#include "testing.h"

namespace instembed {
namespace {

DType accumulation(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

void test_discriminative(DType dtype, int64_t images, int64_t channels, int64_t pixels,
                         bool interleaved, int64_t run, int norm, bool push) {
  const std::vector<int> layout =
      interleaved ? std::vector<int>{0, 2, 1} : std::vector<int>{0, 1, 2};
  Buffer embeddings(dtype, {images, channels, pixels}, layout);
  fill_normal(embeddings, dtype);
  Buffer labels = make_labels({images, pixels}, draw(0, 40), run);
  const int64_t capacity =
      draw(0, 1) ? 64 * images : 1;  // one that is too small is a case of its own
  std::vector<std::vector<char>> results;
  for (const int threads : {1, 2}) {
    discriminative::Options options;
    options.norm = norm;
    options.background_push = push;
    options.rules.background = 0;
    options.threads = threads;
    Buffer terms(accumulation(dtype), {images, 4}), first(DType::i64, {images + 1});
    Buffer counts(DType::i64, {capacity}), vectors(accumulation(dtype), {4, capacity, channels});
    Buffer runs(DType::i32, {images * (pixels + 1024) + 1}),
        grad(dtype, {images, channels, pixels}, layout);
    const discriminative::State state{first, counts, vectors, runs};
    discriminative::forward(embeddings, labels, nullptr, options, terms, &state);
    discriminative::backward(embeddings, labels, nullptr, options, terms, state, grad);
    dispatch_floating(accumulation(dtype), "test", [&](auto type) {
      using T = decltype(type);
      for (int64_t i = 0; i < terms.size(); ++i) CHECK(std::isfinite(float(terms.as<T>()[i])));
    });
    std::vector<char> bits(terms.raw(), terms.raw() + terms.bytes());
    bits.insert(bits.end(), grad.raw(), grad.raw() + grad.bytes());
    results.push_back(std::move(bits));
  }
  CHECK(results[0] == results[1]);
}

void test_discriminative_points(int64_t points, int64_t channels) {
  Buffer embeddings(DType::f32, {1, channels, points}, {0, 2, 1});
  fill_normal(embeddings, DType::f32);
  Buffer labels = make_labels({1, points}, 9, draw(1, 8));
  Buffer offsets(DType::i64, {4});
  const int64_t cut = draw(0, points);
  const int64_t values[] = {0, cut, cut, points};
  std::copy(values, values + 4, offsets.as<int64_t>());
  discriminative::Options options;
  Buffer terms(DType::f32, {3, 4});
  discriminative::forward(embeddings, labels, &offsets, options, terms, nullptr);
  for (const int64_t wrong : {int64_t{-1}, points + 1, INT64_MAX}) {
    offsets.as<int64_t>()[1] = wrong;
    bool refused = false;
    try {
      discriminative::forward(embeddings, labels, &offsets, options, terms, nullptr);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
  }
}

void test_mean_shift(DType dtype, int64_t images, int64_t channels, int64_t pixels,
                     bool interleaved, mean_shift::Seeding seeding) {
  Buffer embeddings(dtype, {images, channels, pixels},
                    interleaved ? std::vector<int>{0, 2, 1} : std::vector<int>{0, 1, 2});
  fill_normal(embeddings, dtype);
  if (images > 0 && pixels > 3 && dtype == DType::f32)
    embeddings.as<float>()[draw(0, pixels - 1)] = NAN;
  Buffer mask = make_labels({images, pixels}, 2, 5);
  mean_shift::Options options;
  options.bandwidth = 0.3 * static_cast<double>(draw(1, 10));
  options.seeding = seeding;
  options.leftovers = draw(0, 1) ? mean_shift::Leftovers::nearest : mean_shift::Leftovers::noise;
  options.min_size = draw(1, 4);
  std::vector<std::vector<char>> results;
  for (const int threads : {1, 2}) {
    Buffer labels(DType::i64, {images, pixels});
    const auto result = mean_shift::group(embeddings, &mask, nullptr, options, labels, threads);
    const int64_t capacity = result.largest() + draw(0, 2);
    Buffer centers(accumulation(dtype), {images, capacity, channels}),
        counts(DType::i64, {images, capacity});
    Buffer instances(DType::i64, {images}), iterations(DType::i64, {images});
    result.copy(centers, counts, instances, iterations);
    for (int64_t i = 0; i < labels.size(); ++i) {
      CHECK(labels.as<int64_t>()[i] >= 0);
      CHECK(labels.as<int64_t>()[i] <= instances.as<int64_t>()[i / std::max<int64_t>(1, pixels)]);
    }
    results.emplace_back(labels.raw(), labels.raw() + labels.bytes());
  }
  CHECK(results[0] == results[1]);
}

// Unit vectors along a few axes and their neighbours; some are zero, some NaN.
void fill_directions(Buffer& points, int64_t images, int64_t channels, int64_t pixels) {
  std::normal_distribution<double> normal;
  const auto& stride = static_cast<const Array&>(points).strides;
  for (int64_t b = 0; b < images; ++b) {
    for (int64_t i = 0; i < pixels; ++i) {
      std::vector<double> x(channels);
      double square = 0;
      x[draw(0, channels - 1)] = 1;
      for (double& value : x) {
        value += 0.1 * normal(generator);
        square += value * value;
      }
      const double scale = draw(0, 9) ? 1 / std::sqrt(square) : (draw(0, 1) ? 0 : NAN);
      for (int64_t d = 0; d < channels; ++d) {
        const int64_t at = b * stride[0] + d * stride[1] + i * stride[2];
        if (static_cast<const Array&>(points).dtype == DType::f64) {
          points.as<double>()[at] = scale * x[d];
        } else {
          points.as<float>()[at] = static_cast<float>(scale * x[d]);
        }
      }
    }
  }
}

void test_recurrent_mean_shift(DType dtype, int64_t images, int64_t channels, int64_t pixels,
                               bool interleaved) {
  using namespace recurrent_mean_shift;
  const std::vector<int> layout =
      interleaved ? std::vector<int>{0, 2, 1} : std::vector<int>{0, 1, 2};
  const std::vector<int64_t> shape{images, channels, pixels};
  Buffer points(dtype, shape, layout), weights(dtype, shape, layout);
  fill_directions(points, images, channels, pixels);
  fill_normal(weights, dtype);
  Buffer mask = make_labels({images, pixels}, 2, 5);
  const Rule rule{0.05 * static_cast<double>(draw(1, 20)), 0.5 * static_cast<double>(draw(0, 2)),
                  draw(0, 1) ? 1e-6 : 0.0};
  std::vector<std::vector<char>> results;
  for (const int threads : {1, 2}) {
    Buffer shifted(dtype, shape, layout), grad(dtype, shape, layout);
    Buffer norms(dtype, {images, pixels}), denominators(dtype, {images, pixels});
    const State state{norms, denominators};
    forward(points, &mask, nullptr, rule, shifted, state, threads);
    backward(weights, points, shifted, &mask, nullptr, rule, state, grad, threads);
    std::vector<char> bits;
    for (const auto& array :
         {std::cref(shifted), std::cref(grad), std::cref(norms), std::cref(denominators)}) {
      bits.insert(bits.end(), array.get().raw(), array.get().raw() + array.get().bytes());
    }
    results.push_back(std::move(bits));
  }
  CHECK(results[0] == results[1]);
}

void test_cosine_margin(DType dtype, int64_t images, int64_t channels, int64_t pixels,
                        bool interleaved) {
  using namespace cosine_margin;
  const std::vector<int> layout =
      interleaved ? std::vector<int>{0, 2, 1} : std::vector<int>{0, 1, 2};
  const std::vector<int64_t> shape{images, channels, pixels};
  Buffer points(dtype, shape, layout);
  fill_directions(points, images, channels, pixels);
  Buffer labels = make_labels({images, pixels}, draw(1, 12), 5), keys(DType::f32, {images, pixels});
  fill_normal(keys, DType::f32);
  const bool squared = draw(0, 1) == 1, sampled = draw(0, 1) == 1;
  const double margin = 0.1 * static_cast<double>(draw(0, 10));
  std::vector<std::vector<char>> results;
  for (const int threads : {1, 2}) {
    const Options options{{margin, squared}, {0, std::nullopt}, {0.6, 700}, threads};
    Buffer losses(dtype, {images}), gradient(dtype, shape, layout), again(dtype, {images});
    const Array& drawn = keys;
    const Array& to = gradient;
    forward(points, labels, nullptr, sampled ? &drawn : nullptr, options, losses, &to);
    forward(points, labels, nullptr, sampled ? &drawn : nullptr, options, again, nullptr);
    CHECK(std::equal(losses.raw(), losses.raw() + losses.bytes(), again.raw()));
    std::vector<char> bits(losses.raw(), losses.raw() + losses.bytes());
    bits.insert(bits.end(), gradient.raw(), gradient.raw() + gradient.bytes());
    results.push_back(std::move(bits));
  }
  CHECK(results[0] == results[1]);
}

void test_group_on_sphere(DType dtype, int64_t images, int64_t channels, int64_t pixels,
                          bool interleaved) {
  using namespace group_on_sphere;
  const std::vector<int> layout =
      interleaved ? std::vector<int>{0, 2, 1} : std::vector<int>{0, 1, 2};
  Buffer points(dtype, {images, channels, pixels}, layout);
  fill_directions(points, images, channels, pixels);
  Buffer mask = make_labels({images, pixels}, 2, 5);
  const Options options{0.1 * static_cast<double>(draw(-10, 10)), draw(1, 9), draw(0, 1) == 1};
  std::vector<std::vector<char>> results;
  for (const int threads : {1, 2}) {
    Buffer labels(DType::i64, {images, pixels});
    const auto result = group(points, &mask, nullptr, options, labels, threads);
    for (int64_t i = 0; i < labels.size(); ++i) {
      CHECK(labels.as<int64_t>()[i] >= 0 && labels.as<int64_t>()[i] <= result.largest());
    }
    results.emplace_back(labels.raw(), labels.raw() + labels.bytes());
  }
  CHECK(results[0] == results[1]);
}

void test_label_statistics(int64_t images, int64_t height, int64_t width) {
  Buffer labels = make_labels({images, height, width}, 12, draw(1, 9));
  const auto result = label_statistics::measure(labels, {0, std::nullopt}, 2);
  const int64_t capacity = result.largest() + draw(0, 1);
  Buffer ids(DType::i64, {images, capacity}), boxes(DType::f32, {images, capacity, 4});
  Buffer areas(DType::i64, {images, capacity}), centroids(DType::f32, {images, capacity, 2});
  Buffer instances(DType::i64, {images});
  result.copy(ids, boxes, areas, centroids, instances);
  int64_t foreground = 0, measured = 0;
  for (int64_t i = 0; i < labels.size(); ++i) foreground += labels.as<int64_t>()[i] != 0;
  for (int64_t i = 0; i < areas.size(); ++i) measured += areas.as<int64_t>()[i];
  CHECK(foreground == measured);
}

// Coordinates in and around an image, whole and not.
void fill_points(Buffer& points, double reach) {
  const double strange[] = {NAN, INFINITY, -INFINITY, 1e300, -0.5, 0.49999999999999994};
  std::uniform_real_distribution<double> place(-2, reach + 2);
  for (int64_t i = 0; i < points.size(); ++i) {
    points.as<double>()[i] = draw(0, 9) ? place(generator) : strange[draw(0, 5)];
  }
}

void test_associative_embedding(DType dtype, int64_t images, int64_t people, int64_t joints,
                                int64_t tag, int64_t height, int64_t width, bool interleaved,
                                bool gathered) {
  using namespace associative_embedding;
  const std::vector<int64_t> shape =
      gathered ? std::vector<int64_t>{images, people, joints, tag}
               : std::vector<int64_t>{images, joints * tag, height, width};
  const std::vector<int> layout =
      interleaved ? std::vector<int>{0, 2, 3, 1} : std::vector<int>{0, 1, 2, 3};
  Buffer tags(dtype, shape, layout), keypoints(DType::f64, {images, people, joints, 2});
  fill_normal(tags, dtype);
  fill_points(keypoints, static_cast<double>(std::max(height, width)));
  Buffer visible = make_labels({images, people, joints}, 2, 3);
  const Push push(draw(0, 1) == 1, 0.7, 1.0);
  std::vector<std::vector<char>> results;
  for (const int threads : {1, 2}) {
    Buffer terms(accumulation(dtype), {images, 2}), grad_terms(accumulation(dtype), {images, 2});
    Buffer pixels(DType::i64, {images, people, joints});
    Buffer means(DType::f64, {images, people, tag}), pushes(DType::f64, {images, people, tag});
    const State state{pixels, means, pushes};
    forward(tags, gathered ? nullptr : &keypoints, visible, push, terms, state, threads);
    std::memcpy(grad_terms.as<char>(), terms.raw(), terms.bytes());
    Buffer grad(dtype, shape, layout);
    backward(grad_terms, tags, state, gathered, grad, threads);
    std::vector<char> bits(terms.raw(), terms.raw() + terms.bytes());
    bits.insert(bits.end(), grad.raw(), grad.raw() + grad.bytes());
    results.push_back(std::move(bits));
    if (pixels.size() == 0) continue;
    pixels.as<int64_t>()[draw(0, pixels.size() - 1)] = draw(0, 1) ? -2 : INT64_MAX;
    bool refused = false;
    try {
      backward(grad_terms, tags, state, gathered, grad, threads);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
  }
  CHECK(results[0] == results[1]);
}

void test_gather_at(DType dtype, int64_t images, int64_t groups, int64_t channels, int64_t count,
                    int axes, bool interleaved, bool linear) {
  using namespace gather_at;
  std::vector<int64_t> shape{images, groups, channels};
  for (int axis = 0; axis < axes; ++axis) shape.push_back(draw(0, 9));
  std::vector<int> layout{0};
  for (int axis = 0; axis < axes; ++axis) layout.push_back(3 + axis);
  layout.insert(interleaved ? layout.end() : layout.begin() + 1, {1, 2});
  Buffer features(dtype, shape, layout), points(DType::f64, {images, count, groups, axes});
  fill_normal(features, dtype);
  fill_points(points, 9);
  Buffer valid = make_labels({images, count, groups}, 2, 3);
  const Query query{points, draw(0, 1) ? &valid : nullptr, linear};
  std::vector<std::vector<char>> results;
  for (const int threads : {1, 2}) {
    Buffer values(dtype, {images, count, groups, channels}), grad_features(dtype, shape, layout);
    Buffer grad_points(DType::f64, {images, count, groups, axes});
    forward(features, query, values, threads);
    backward(values, features, query, &grad_features, &grad_points, threads);
    backward(values, features, query, nullptr, nullptr, threads);
    std::vector<char> bits(values.raw(), values.raw() + values.bytes());
    for (const Buffer* gradient : {std::addressof(grad_features), std::addressof(grad_points)}) {
      bits.insert(bits.end(), gradient->raw(), gradient->raw() + gradient->bytes());
    }
    results.push_back(std::move(bits));
  }
  CHECK(results[0] == results[1]);
}

void test_seeds(DType dtype, int64_t images, int64_t channels, int64_t pixels, bool interleaved,
                int64_t run) {
  const std::vector<int> layout =
      interleaved ? std::vector<int>{0, 2, 1} : std::vector<int>{0, 1, 2};
  Buffer embeddings(dtype, {images, channels, pixels}, layout), seediness(dtype, {images, pixels});
  fill_normal(embeddings, dtype);
  fill_normal(seediness, dtype);
  Buffer labels = make_labels({images, pixels}, 9, run);
  Buffer mask(DType::u8, {images, pixels});
  for (int64_t i = 0; i < mask.size(); ++i) mask.as<uint8_t>()[i] = draw(0, 3) > 0;
  const Array* inside = draw(0, 1) ? &mask : nullptr;
  const int64_t count = draw(0, 40);
  Buffer radii(DType::f64, {images, count});
  for (int64_t i = 0; i < radii.size(); ++i) radii.as<double>()[i] = 0.3 * draw(0, 9);
  std::vector<std::vector<char>> results;
  for (const int threads : {1, 2}) {
    Buffer indices(DType::i64, {images, count}), scores(DType::f64, {images, count});
    seeds::select(embeddings, seediness, inside, {0.3, 0.1}, indices, scores, threads);
    Buffer iou(accumulation(dtype), {images, count, 2});
    seeds::mask_iou(embeddings, labels, indices, {0.2, 1.9}, {0, int64_t{1} << 40}, iou, threads);
    Buffer grown(DType::i64, {images, pixels}), order(DType::i64, {images, count});
    Buffer counts(DType::i64, {images, count}), instances(DType::i64, {images});
    seeds::grow(embeddings, inside, indices, scores, radii, {2, 0.9}, grown, order, counts,
                instances, threads);
    std::vector<char> bits;
    for (const Buffer* part : {std::addressof(indices), std::addressof(scores), std::addressof(iou),
                               std::addressof(grown), std::addressof(order), std::addressof(counts),
                               std::addressof(instances)}) {
      bits.insert(bits.end(), part->raw(), part->raw() + part->bytes());
    }
    results.push_back(std::move(bits));
  }
  CHECK(results[0] == results[1]);
}

void test_pairwise_similarity(DType dtype, int64_t images, int64_t channels, int64_t pixels,
                              bool interleaved, int64_t run) {
  const std::vector<int> layout =
      interleaved ? std::vector<int>{0, 2, 1} : std::vector<int>{0, 1, 2};
  Buffer embeddings(dtype, {images, channels, pixels}, layout), words(DType::i64, {images});
  fill_normal(embeddings, dtype);
  for (int64_t b = 0; b < images; ++b) words.as<int64_t>()[b] = draw(INT64_MIN, INT64_MAX);
  Buffer labels = make_labels({images, pixels}, draw(0, 40), run);
  const int64_t samples = draw(0, 20), spare = draw(0, 2);
  std::vector<std::vector<char>> results;
  for (const int threads : {1, 2}) {
    const sample_pixels::Instances instances(labels, nullptr, {0, std::nullopt}, threads);
    const int64_t capacity = instances.largest() + spare;
    Buffer indices(DType::i64, {images, capacity, samples});
    Buffer valid(DType::u8, {images, capacity, samples});
    instances.sample(words, indices, valid, threads);
    for (int64_t i = 0; i < indices.size(); ++i) {
      CHECK((indices.as<int64_t>()[i] >= 0) == (valid.as<uint8_t>()[i] == 1));
    }
    Buffer losses(accumulation(dtype), {images}), alone(accumulation(dtype), {images});
    Buffer slopes(accumulation(dtype), {images, capacity, samples, channels});
    Buffer grad(dtype, {images, channels, pixels}, layout);
    pairwise_similarity::forward(embeddings, indices, losses, &slopes, threads);
    pairwise_similarity::forward(embeddings, indices, alone, nullptr, threads);
    CHECK(std::memcmp(losses.raw(), alone.raw(), losses.bytes()) == 0);
    pairwise_similarity::backward(losses, slopes, indices, grad, threads);
    std::vector<char> bits;
    for (const Buffer* part : {std::addressof(indices), std::addressof(losses),
                               std::addressof(slopes), std::addressof(grad)}) {
      bits.insert(bits.end(), part->raw(), part->raw() + part->bytes());
    }
    results.push_back(std::move(bits));
    if (indices.size() == 0) continue;
    indices.as<int64_t>()[draw(0, indices.size() - 1)] = pixels;
    bool refused = false;
    try {
      pairwise_similarity::forward(embeddings, indices, losses, nullptr, threads);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
  }
  CHECK(results[0] == results[1]);
}

void test_group_keypoints(DType dtype, int64_t images, int64_t joints, bool interleaved) {
  const int64_t height = draw(0, 20), width = draw(0, 40), dims = draw(1, 3);
  const std::vector<int> layout =
      interleaved ? std::vector<int>{0, 2, 3, 1} : std::vector<int>{0, 1, 2, 3};
  Buffer heatmaps(dtype, {images, joints, height, width}, layout);
  Buffer tags(dtype, {images, joints * dims, height, width}, layout);
  fill_normal(heatmaps, dtype);
  fill_normal(tags, dtype);
  if (heatmaps.size() > 0 && dtype == DType::f32) {
    heatmaps.as<float>()[draw(0, heatmaps.size() - 1)] = NAN;
    tags.as<float>()[draw(0, tags.size() - 1)] = INFINITY;
  }
  group_keypoints::Options options;
  options.max_people = draw(1, 9);
  options.peak_threshold = static_cast<double>(draw(0, 2));
  options.nms = 2 * draw(0, 30) + 1;
  for (int64_t k = 0; k < joints; ++k) options.joint_order.push_back(joints - 1 - k);
  std::vector<std::vector<char>> results;
  for (const int threads : {1, 2}) {
    Buffer keypoints(accumulation(dtype), {images, options.max_people, joints, 2});
    Buffer scores(accumulation(dtype), {images, options.max_people});
    Buffer person_tags(accumulation(dtype), {images, options.max_people, dims});
    Buffer people(DType::i64, {images});
    Buffer keypoint_scores(accumulation(dtype), {images, options.max_people, joints});
    Buffer visibility(DType::u8, {images, options.max_people, joints});
    group_keypoints::group(heatmaps, tags, options,
                           {keypoints, scores, person_tags, people, keypoint_scores, visibility},
                           threads);
    for (int64_t b = 0; b < images; ++b) CHECK(people.as<int64_t>()[b] <= options.max_people);
    std::vector<char> bits(keypoints.raw(), keypoints.raw() + keypoints.bytes());
    bits.insert(bits.end(), person_tags.raw(), person_tags.raw() + person_tags.bytes());
    results.push_back(std::move(bits));
  }
  CHECK(results[0] == results[1]);
}

void test_instance_pool(DType dtype, int64_t images, int64_t channels, int64_t pixels,
                        bool interleaved, int64_t run) {
  const std::vector<int> layout =
      interleaved ? std::vector<int>{0, 2, 1} : std::vector<int>{0, 1, 2};
  Buffer features(dtype, {images, channels, pixels}, layout);
  fill_normal(features, dtype);
  Buffer labels = make_labels({images, pixels}, draw(0, 40), run);
  for (const auto reduce : {instance_pool::Reduce::mean, instance_pool::Reduce::max}) {
    const bool max = reduce == instance_pool::Reduce::max;
    std::vector<std::vector<char>> results;
    for (const int threads : {1, 2}) {
      const instance_pool::Instances instances(labels, nullptr, {0, std::nullopt}, threads);
      const int64_t capacity = instances.largest() + 1;
      Buffer pooled(accumulation(dtype), {images, capacity, channels});
      Buffer valid(DType::u8, {images, capacity}), ids(DType::i64, {images, capacity});
      Buffer counts(DType::i64, {images, capacity});
      Buffer argmax(DType::i64, {images, capacity, channels});
      Buffer grad(dtype, {images, channels, pixels}, layout);
      instances.pool(features, nullptr, reduce,
                     {pooled, valid, ids, counts, max ? &argmax : nullptr}, threads);
      if (max) {
        instance_pool::spread_max(pooled, argmax, nullptr, grad, threads);
      } else {
        instances.spread(pooled, nullptr, reduce, grad, threads);
      }
      int64_t members = 0, foreground = 0;
      for (int64_t i = 0; i < counts.size(); ++i) members += counts.as<int64_t>()[i];
      for (int64_t i = 0; i < labels.size(); ++i) foreground += labels.as<int64_t>()[i] != 0;
      CHECK(members == foreground);
      std::vector<char> bits(pooled.raw(), pooled.raw() + pooled.bytes());
      bits.insert(bits.end(), grad.raw(), grad.raw() + grad.bytes());
      results.push_back(std::move(bits));
    }
    CHECK(results[0] == results[1]);
  }
}

void test_half_conversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Half half{static_cast<uint16_t>(bits)};
    const float value = half;
    if (std::isnan(value)) {
      CHECK(std::isnan(float(Half::from(value))));
    } else {
      CHECK(Half::from(value).bits == bits);
    }
    const BFloat16 brain{static_cast<uint16_t>(bits)};
    if (!std::isnan(float(brain))) CHECK(BFloat16::from(brain).bits == bits);
  }
  CHECK(Half::from(65519.9f).bits == 0x7bff && Half::from(65520.0f).bits == 0x7c00);
  CHECK(Half::from(2.98e-8f).bits == 0 && Half::from(2.99e-8f).bits == 1);
  CHECK(BFloat16::from(1.00390625f).bits == 0x3f80 && BFloat16::from(1.01171875f).bits == 0x3f82);
}

// Every pair of ranges once, none of a range at the same time, and in one order for each range.
void test_pairs(const std::vector<int64_t>& counts) {
  using Opponents = std::vector<std::vector<std::vector<int64_t>>>;  // of every range, in order
  std::vector<Opponents> results;
  for (const int threads : {1, 4}) {
    Opponents opponents;
    std::vector<std::vector<std::atomic<bool>>> playing;
    for (const int64_t count : counts) {
      opponents.emplace_back(count);
      playing.emplace_back(count);
    }
    for_pairs(counts, threads, [&](int64_t g, int64_t a, int64_t b) {
      const std::set<int64_t> ranges{a, b};
      for (const int64_t range : ranges) CHECK(!playing[g][range].exchange(true));
      std::this_thread::yield();
      for (const int64_t range : ranges) opponents[g][range].push_back(a + b - range);
      for (const int64_t range : ranges) playing[g][range] = false;
    });
    for (const auto& group : opponents) {
      for (std::vector<int64_t> others : group) {
        std::sort(others.begin(), others.end());
        CHECK(others.size() == group.size());
        for (size_t k = 0; k < others.size(); ++k) CHECK(others[k] == static_cast<int64_t>(k));
      }
    }
    results.push_back(std::move(opponents));
  }
  CHECK(results[0] == results[1]);
}

void test_pair_that_throws() {
  for (const int threads : {1, 4}) {
    bool thrown = false;
    try {
      for_pairs({9}, threads, [&](int64_t, int64_t a, int64_t b) {
        if (a == 3 && b == 5) throw std::runtime_error("no match");
      });
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    CHECK(thrown);
  }
}

void run() {
  test_half_conversions();
  for (const auto& counts :
       std::vector<std::vector<int64_t>>{{}, {0}, {1}, {2}, {7}, {16}, {3, 0, 1, 12}, {30, 2}}) {
    test_pairs(counts);
  }
  test_pair_that_throws();
  const DType types[] = {DType::f16, DType::bf16, DType::f32, DType::f64};
  const int64_t sizes[] = {0, 1, 7, 16, 17, 255, 1024, 1025, 5000};
  for (const int64_t pixels : sizes) {
    for (int repeat = 0; repeat < 12; ++repeat) {
      const DType dtype = types[draw(0, 3)];
      const int64_t images = draw(0, 3), channels = draw(1, 20);
      const bool interleaved = draw(0, 1) == 1;
      test_discriminative(dtype, images, channels, pixels, interleaved, draw(0, 1) ? 1 : 20,
                          static_cast<int>(draw(1, 2)), draw(0, 1) == 1);
      test_discriminative_points(pixels, channels);
      test_mean_shift(dtype, images, std::min<int64_t>(channels, 6),
                      std::min<int64_t>(pixels, 1500), interleaved,
                      draw(0, 1) ? mean_shift::Seeding::peel : mean_shift::Seeding::all);
      test_recurrent_mean_shift(accumulation(dtype), images, channels,
                                std::min<int64_t>(pixels, 1500), interleaved);
      test_cosine_margin(accumulation(dtype), images, channels, std::min<int64_t>(pixels, 1500),
                         interleaved);
      test_group_on_sphere(accumulation(dtype), images, channels, std::min<int64_t>(pixels, 1500),
                           interleaved);
      test_instance_pool(dtype, images, channels, pixels, interleaved, draw(0, 1) ? 1 : 20);
      test_label_statistics(images, draw(0, 30), draw(0, 30));
      test_group_keypoints(dtype, images, draw(1, 6), interleaved);
      test_associative_embedding(dtype, images, draw(0, 40), draw(1, 5), draw(1, 3), draw(0, 20),
                                 draw(0, 20), interleaved, draw(0, 1) == 1);
      test_gather_at(dtype, images, draw(1, 3), channels, draw(0, 1) ? draw(0, 40) : 300,
                     static_cast<int>(draw(1, 3)), interleaved, draw(0, 1) == 1);
      test_seeds(dtype, images, channels, pixels, interleaved, draw(0, 1) ? 1 : 20);
      test_pairwise_similarity(dtype, images, channels, pixels, interleaved, draw(0, 1) ? 1 : 20);
    }
  }
}

}  // namespace
}  // namespace instembed

int main() {
  instembed::run();
  std::puts("native tests passed");
  return 0;
}
