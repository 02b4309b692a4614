// The loss on the CPU: pixels are chosen, ordered so that neighbours lie together, and summed, by
// instances here and over pairs in hinge.cpp. The gradient comes with the loss: it needs the same
// similarities.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "common/dtype.h"
#include "common/id_map.h"
#include "common/memory.h"
#include "cosine_margin/cosine_margin.h"
#include "cosine_margin/hinge.h"

namespace instembed::cosine_margin {
namespace {

using sphere::at;
using sphere::for_each;
using sphere::Place;

constexpr double kLongest = 1e9;  // a vector's length; similarities of longer ones may overflow

// The pixels of an image that take part, and what they are.
struct Chosen {
  std::vector<int32_t> pixels;     // ascending
  std::vector<int32_t> instances;  // of each pixel, from 0
  std::vector<int64_t> counts;     // pixels of each instance, at least 1
};

void read_labels(const Array& labels, const Place& place, int64_t pixels, const LabelRules& rules,
                 std::vector<int32_t>* chosen, std::vector<int64_t>* ids) {
  dispatch_integer(labels.dtype, "labels", [&](auto type) {
    using L = decltype(type);
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const auto id = static_cast<int64_t>(labels.as<const L>()[place.index(labels, pixel)]);
      if (rules.ignore_index == id || rules.background == id) continue;
      chosen->push_back(static_cast<int32_t>(pixel));
      ids->push_back(id);
    }
  });
}

// Keeps the entries with the least keys, the first of equal ones.
void sample(const Array& keys, const Place& place, const Sampling& sampling,
            std::vector<int32_t>* pixels, std::vector<int64_t>* ids) {
  const auto count = static_cast<int64_t>(pixels->size());
  const double share = std::ceil(sampling.fraction * static_cast<double>(count));
  const int64_t kept = std::min({count, static_cast<int64_t>(share), sampling.most});
  if (kept == count) return;
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  const auto key = [&](int64_t k) {
    return keys.as<const float>()[place.index(keys, (*pixels)[k])];
  };
  std::nth_element(order.begin(), order.begin() + kept, order.end(), [&](int64_t a, int64_t b) {
    return key(a) != key(b) ? key(a) < key(b) : a < b;
  });
  std::sort(order.begin(), order.begin() + kept);
  for (int64_t k = 0; k < kept; ++k) {
    (*pixels)[k] = (*pixels)[order[k]];
    (*ids)[k] = (*ids)[order[k]];
  }
  pixels->resize(kept);
  ids->resize(kept);
}

Chosen choose(const Array& labels, const Array* keys, const Place& place, int64_t pixels,
              const Options& options) {
  Chosen chosen;
  std::vector<int64_t> ids;
  read_labels(labels, place, pixels, options.labels, &chosen.pixels, &ids);
  if (keys) sample(*keys, place, options.sampling, &chosen.pixels, &ids);
  IdMap map;
  for (const int64_t id : ids) {
    chosen.instances.push_back(map.slot(id));
    chosen.counts.resize(map.size());
    ++chosen.counts[chosen.instances.back()];
  }
  return chosen;
}

// What the first part of the loss needs of each instance.
struct Sums {
  int64_t channels;
  std::vector<double> vectors;  // S_c
  std::vector<double> spreads;  // sum_i [ |x_i - mu_c|^2 + 1 - |x_i|^2 ]

  double* of(int64_t instance) { return vectors.data() + instance * channels; }
};

// False where a point is not finite, or too long.
template <class A>
bool sum_instances(const Image<const A>& points, const Chosen& chosen, Sums* sums) {
  const double slack = 64 * std::numeric_limits<A>::epsilon();
  const auto count = static_cast<int64_t>(chosen.pixels.size()), channels = points.channels;
  bool fine = true;
  for (int64_t k = 0; k < count; ++k) {
    const A* x = at(points, chosen.pixels[k]);
    double* sum = sums->of(chosen.instances[k]);
    double square = 0;
    for (int64_t d = 0; d < channels; ++d) {
      const double value = x[d * points.channel_stride];
      sum[d] += value;
      square += value * value;
    }
    sums->spreads[chosen.instances[k]] += short_of_unit(square, slack);
    fine = fine && square <= kLongest * kLongest;  // not so for NaN
  }
  for (int64_t k = 0; k < count; ++k) {
    const A* x = at(points, chosen.pixels[k]);
    const double* sum = sums->of(chosen.instances[k]);
    const double share = 1 / static_cast<double>(chosen.counts[chosen.instances[k]]);
    double square = 0;
    for (int64_t d = 0; d < channels; ++d) {
      const double difference = x[d * points.channel_stride] - share * sum[d];
      square += difference * difference;
    }
    sums->spreads[chosen.instances[k]] += square;
  }
  return fine;
}

template <class A>
sphere::Cloud<A> build_cloud(const Image<const A>& points, const Chosen& chosen,
                             Members<A>* members, int threads) {
  // Where each chosen pixel is in `chosen`, by way of the slot's pixel.
  sphere::Cloud<A> cloud = sphere::build_cloud(points, chosen.pixels, threads);
  const int64_t slots = cloud.tiles.slots(), padded = cloud.padded;
  *members = {Lines<MaskLane<A>>(slots), Lines<A>(slots), Lines<A>(slots * padded)};
  const auto instances = static_cast<double>(chosen.counts.size());
  for_each(slots, threads, [&](int64_t s) {
    const int32_t pixel = cloud.tiles.point[s];
    if (pixel < 0) return;
    const int64_t k =
        std::lower_bound(chosen.pixels.begin(), chosen.pixels.end(), pixel) - chosen.pixels.begin();
    const int32_t instance = chosen.instances[k];
    const auto weight =
        static_cast<A>(1 / (instances * static_cast<double>(chosen.counts[instance])));
    members->ids.data()[s] = instance;
    members->weights.data()[s] = weight;
    for (int64_t d = 0; d < padded; ++d) {
      members->weighted.data()[s * padded + d] = weight * cloud.points.rows.data()[s * padded + d];
    }
  });
  return cloud;
}

template <class A>
void forward_image(const Image<const A>& points, const Array& labels, const Array* keys,
                   const Place& place, const Options& options, A* loss, const Image<A>* gradient,
                   int threads) {
  const Chosen chosen = choose(labels, keys, place, points.pixels, options);
  const auto instances = static_cast<int64_t>(chosen.counts.size());
  *loss = 0;
  if (instances == 0) return;
  Sums sums{points.channels, std::vector<double>(instances * points.channels),
            std::vector<double>(instances)};
  if (!sum_instances(points, chosen, &sums)) {
    *loss = std::numeric_limits<A>::quiet_NaN();
    for (const int32_t pixel : gradient ? chosen.pixels : std::vector<int32_t>()) {
      for (int64_t d = 0; d < points.channels; ++d) {
        at(*gradient, pixel)[d * gradient->channel_stride] = *loss;
      }
    }
    return;
  }
  double value = 0;
  std::vector<double> weights(instances);
  for (int64_t c = 0; c < instances; ++c) {
    weights[c] = 1 / (static_cast<double>(instances) * static_cast<double>(chosen.counts[c]));
    value +=
        0.5 * weights[c] * weights[c] * static_cast<double>(chosen.counts[c]) * sums.spreads[c];
  }
  Members<A> members;
  const sphere::Cloud<A> cloud = build_cloud(points, chosen, &members, threads);
  Lines<double> pushes(gradient ? cloud.tiles.slots() * cloud.padded : 0);
  value += add_hinges(cloud, members, options.rule, gradient ? pushes.data() : nullptr, threads);
  *loss = static_cast<A>(value);
  if (!gradient) return;
  for_each(cloud.tiles.slots(), threads, [&](int64_t s) {
    const int32_t pixel = cloud.tiles.point[s];
    if (pixel < 0) return;
    const int64_t instance = members.ids.data()[s];
    const double weight = weights[instance];
    const double* pull = sums.of(instance);
    const double* push = pushes.data() + s * cloud.padded;
    for (int64_t d = 0; d < points.channels; ++d) {
      at(*gradient, pixel)[d * gradient->channel_stride] =
          static_cast<A>(weight * (push[d] - weight * pull[d]));
    }
  });
}

}  // namespace

void forward(const Array& points, const Array& labels, const Array* offsets, const Array* keys,
             const Options& options, const Array& losses, const Array* gradient) {
  expect(points.dtype == DType::f32 || points.dtype == DType::f64,
         std::string("points: expected float32 or float64, got ") + name(points.dtype));
  const Batch batch = Batch::of_embeddings(points, offsets);
  expect(batch.pixels <= std::numeric_limits<int32_t>::max(), "points: expected less than 2^31");
  const auto check_pixels = [&](const Array& array, const char* what) {
    expect(array.ndim == 2 && array.shape[0] == points.shape[0] && array.shape[1] == batch.pixels,
           std::string(what) + ": expected the points' shape without channels");
  };
  check_pixels(labels, "labels");
  if (keys) {
    check_pixels(*keys, "keys");
    expect(keys->dtype == DType::f32, "keys: expected float32");
  }
  expect_contiguous(losses, points.dtype, batch.images, "losses");
  if (gradient) {
    expect(
        gradient->dtype == points.dtype && gradient->ndim == 3 && gradient->shape == points.shape,
        "gradient: expected the points' shape and type");
    fill_zero(*gradient, options.threads);
  }
  const auto run = [&](auto type) {
    using A = decltype(type);
    sphere::for_images(batch, options.threads, [&](int64_t b, int threads) {
      const Image<const A> image(points, batch, b);
      A* loss = losses.as<A>() + b;
      if (gradient) {
        const Image<A> to(*gradient, Batch::of_embeddings(*gradient, offsets), b);
        forward_image(image, labels, keys, {batch, b}, options, loss, &to, threads);
      } else {
        forward_image<A>(image, labels, keys, {batch, b}, options, loss, nullptr, threads);
      }
    });
  };
  points.dtype == DType::f32 ? run(float{}) : run(double{});
}

}  // namespace instembed::cosine_margin
