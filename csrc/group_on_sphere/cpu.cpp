// Points that take part are ordered so that neighbours lie together, and connected tile by tile
// (components.cpp); here components become instances.
#include <cmath>
#include <limits>
#include <string>

#include "group_on_sphere/components.h"
#include "group_on_sphere/group_on_sphere.h"
#include "sphere/unit.h"

namespace instembed::group_on_sphere {
namespace {

using mean_shift::Instances;
using sphere::at;
using sphere::Place;

// The component of each pixel, numbered by its first pixel; -1 where a pixel takes no part.
struct Components {
  std::vector<int32_t> of_pixel;
  std::vector<int64_t> sizes;
};

template <class A>
Components find_components(const Image<const A>& points, const Array* mask, const Place& place,
                           double threshold, int threads) {
  const auto taken = sphere::choose_pixels(points.pixels, threads, [&](int64_t pixel) {
    return !place.masked_out(mask, pixel) && sphere::is_unit(sphere::dot(points, points, pixel));
  });
  const sphere::Cloud<A> cloud = sphere::build_cloud(points, taken, threads);
  const std::vector<int32_t> roots = connect(cloud, threshold, threads);
  Components components{std::vector<int32_t>(points.pixels, -1), {}};
  sphere::for_each(cloud.tiles.slots(), threads, [&](int64_t s) {
    if (roots[s] >= 0) components.of_pixel[cloud.tiles.point[s]] = roots[s];
  });
  std::vector<int32_t> numbers(roots.size(), -1);
  for (int32_t& component : components.of_pixel) {
    if (component < 0) continue;
    int32_t& number = numbers[component];
    if (number < 0) {
      number = static_cast<int32_t>(components.sizes.size());
      components.sizes.push_back(0);
    }
    component = number;
    ++components.sizes[component];
  }
  return components;
}

// Unit vectors along the sums of the instances' points; zero where points cancel.
template <class A>
void find_centers(const Image<const A>& points, const int64_t* labels, Instances* instances) {
  constexpr double kShortest = 1e-12;
  const int64_t channels = points.channels, count = instances->size();
  instances->centers.assign(count * channels, 0.0);
  for (int64_t pixel = 0; pixel < points.pixels; ++pixel) {
    if (labels[pixel] == 0) continue;
    double* center = instances->centers.data() + (labels[pixel] - 1) * channels;
    const A* x = at(points, pixel);
    for (int64_t d = 0; d < channels; ++d) center[d] += x[d * points.channel_stride];
  }
  for (int64_t k = 0; k < count; ++k) {
    double* center = instances->centers.data() + k * channels;
    double square = 0;
    for (int64_t d = 0; d < channels; ++d) square += center[d] * center[d];
    const double scale = square < kShortest * kShortest ? 0 : 1 / std::sqrt(square);
    for (int64_t d = 0; d < channels; ++d) center[d] *= scale;
  }
}

// The instance of the nearest centre, the first of equal ones.
template <class A>
int64_t nearest(const Image<const A>& points, int64_t pixel, const Instances& instances) {
  const A* x = at(points, pixel);
  int64_t found = 0;
  double most = -std::numeric_limits<double>::infinity();
  for (int64_t k = 0; k < instances.size(); ++k) {
    const double* center = instances.centers.data() + k * points.channels;
    double sum = 0;
    for (int64_t d = 0; d < points.channels; ++d) sum += center[d] * x[d * points.channel_stride];
    if (sum > most) {
      most = sum;
      found = k;
    }
  }
  return found;
}

template <class A>
Instances group_image(const Image<const A>& points, const Array* mask, const Place& place,
                      const Options& options, int64_t* labels, int threads) {
  const Components components = find_components(points, mask, place, options.threshold, threads);
  Instances instances;
  std::vector<int64_t> label_of(components.sizes.size(), 0);
  for (size_t k = 0; k < label_of.size(); ++k) {
    if (components.sizes[k] < options.min_size) continue;
    instances.counts.push_back(components.sizes[k]);
    label_of[k] = instances.size();
  }
  sphere::for_each(points.pixels, threads, [&](int64_t pixel) {
    const int32_t component = components.of_pixel[pixel];
    labels[pixel] = component < 0 ? 0 : label_of[component];
  });
  find_centers(points, labels, &instances);
  if (!options.nearest || instances.size() == 0) return instances;
  sphere::for_each(points.pixels, threads, [&](int64_t pixel) {
    if (labels[pixel] == 0 && components.of_pixel[pixel] >= 0) {
      labels[pixel] = 1 + nearest(points, pixel, instances);
    }
  });
  std::fill(instances.counts.begin(), instances.counts.end(), 0);
  for (int64_t pixel = 0; pixel < points.pixels; ++pixel) {
    if (labels[pixel] > 0) ++instances.counts[labels[pixel] - 1];
  }
  return instances;
}

}  // namespace

mean_shift::Result group(const Array& points, const Array* mask, const Array* offsets,
                         const Options& options, const Array& labels, int threads) {
  expect(points.dtype == DType::f32 || points.dtype == DType::f64,
         std::string("points: expected float32 or float64, got ") + name(points.dtype));
  const Batch batch = Batch::of_embeddings(points, offsets);
  const int64_t rows = offsets ? 1 : batch.images;
  // A tile's slots are counted in 32 bits, and tiles may be padded.
  expect(batch.pixels < (int64_t{1} << 27), "points: expected less than 2^27");
  expect(options.threshold >= -1 && options.threshold <= 1,
         "threshold: expected a number in [-1, 1]");
  if (mask) {
    expect(mask->ndim == 2 && mask->shape[0] == rows && mask->shape[1] == batch.pixels,
           "mask: expected the points' shape without channels");
  }
  expect_contiguous(labels, DType::i64, rows * batch.pixels, "labels");
  mean_shift::Result result;
  result.channels = batch.channels;
  result.images.resize(batch.images);
  const auto run = [&](auto type) {
    using A = decltype(type);
    sphere::for_images(batch, threads, [&](int64_t b, int inner) {
      const Place place{batch, b};
      result.images[b] = group_image(Image<const A>(points, batch, b), mask, place, options,
                                     labels.as<int64_t>() + place.first(), inner);
    });
  };
  points.dtype == DType::f32 ? run(float{}) : run(double{});
  return result;
}

}  // namespace instembed::group_on_sphere
