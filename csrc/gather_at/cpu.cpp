// Gathering on the CPU. Points are turned into reads first: offsets and weights of up to 8 pixels
// each. For the gradient of the features these are sorted by pixel, so that what several points
// send to one pixel is added up in double, in the order of the points, and written once.
#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "common/dtype.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/points.h"
#include "gather_at/gather_at.h"

namespace instembed::gather_at {
namespace {

constexpr int64_t kPoints = 256;   // a task
constexpr int64_t kChannels = 64;  // a task of the features' gradient

// Extents and strides of the axes x, y, z of a map.
struct Grid {
  int axes;
  std::array<int64_t, 3> size, stride;

  explicit Grid(const Array& features) : axes(features.ndim - 3), size{}, stride{} {
    for (int axis = 0; axis < axes; ++axis) {
      size[axis] = features.shape[features.ndim - 1 - axis];
      stride[axis] = features.strides[features.ndim - 1 - axis];
    }
  }
};

struct Sizes {
  int64_t images, groups, channels, points;

  int64_t maps() const { return images * groups; }
  // The first of a point's channels in (B, N, G, C).
  int64_t row(int64_t map, int64_t n) const {
    return ((map / groups * points + n) * groups + map % groups) * channels;
  }
};

Sizes checked_sizes(const Array& features, const Query& query, const Array& values) {
  expect(features.ndim >= 4 && features.ndim <= 6,
         "features: expected (images, groups, channels, *spatial) with 1 to 3 spatial dimensions");
  const Sizes sizes{features.shape[0], features.shape[1], features.shape[2], query.points.shape[1]};
  const auto fits = [&](const Array& array, int64_t last) {
    return array.ndim == 4 && array.shape[0] == sizes.images && array.shape[1] == sizes.points &&
           array.shape[2] == sizes.groups && array.shape[3] == last;
  };
  expect(fits(query.points, features.ndim - 3),
         "points: expected (images, points, groups, spatial dimensions)");
  if (query.valid) {
    expect(query.valid->ndim == 3 && query.valid->shape[0] == sizes.images &&
               query.valid->shape[1] == sizes.points && query.valid->shape[2] == sizes.groups,
           "valid: expected (images, points, groups)");
  }
  expect(values.dtype == features.dtype && values.contiguous() && fits(values, sizes.channels),
         "values: expected a contiguous (images, points, groups, channels) of the features' type");
  return sizes;
}

// A point's place along one axis: pixels low and low + 1, or low alone where `share` is 0.
struct Between {
  int64_t low;
  double share;    // of low + 1
  bool is_inside;  // between the outermost centres, where the value changes with the point
};

Between between(double x, int64_t size) {
  const auto last = static_cast<double>(size - 1);
  if (!(x >= 0)) return {0, 0, false};
  if (x >= last) return {size - 1, 0, false};
  const double low = std::floor(x);
  return {static_cast<int64_t>(low), x - low, true};
}

// Finds what the points of a map read.
class Reads {
 public:
  Reads(const Grid& grid, const Query& query)
      : grid_(grid),
        points_(query.points),
        valid_(query.valid),
        linear_(query.linear),
        coordinate_(reader(query.points.dtype)),
        is_valid_(query.valid ? reader(query.valid->dtype) : nullptr) {}

  // Calls f(corner, weight, slopes) for each pixel that the point reads: its place (x, y, z), and
  // the weight's derivatives to x, y, z.
  template <class F>
  void operator()(int64_t b, int64_t g, int64_t n, F&& f) const {
    if (valid_) {
      const auto& s = valid_->strides;
      if (!(is_valid_(valid_->data, b * s[0] + n * s[1] + g * s[2]) > 0)) return;
    }
    const auto& s = points_.strides;
    const int64_t first = b * s[0] + n * s[1] + g * s[2];
    std::array<int64_t, 3> pixel{};
    std::array<Between, 3> place{};
    for (int axis = 0; axis < grid_.axes; ++axis) {
      const double x = coordinate_(points_.data, first + axis * s[3]);
      pixel[axis] = nearest_pixel(x, grid_.size[axis]);
      if (pixel[axis] < 0) return;
      if (linear_) place[axis] = between(x, grid_.size[axis]);
    }
    if (!linear_) return f(pixel, 1.0, std::array<double, 3>{});
    for (int corner = 0; corner < 1 << grid_.axes; ++corner) {
      double weight = 1;
      std::array<double, 3> slopes{1, 1, 1};
      bool is_read = true;
      for (int axis = 0; axis < grid_.axes; ++axis) {
        const Between& at = place[axis];
        const bool high = corner >> axis & 1;
        is_read = is_read && !(high && !at.is_inside);
        const double share = high ? at.share : 1 - at.share;
        const double slope = at.is_inside ? (high ? 1 : -1) : 0;
        pixel[axis] = at.low + high;
        weight *= share;
        for (int other = 0; other < grid_.axes; ++other) {
          slopes[other] *= other == axis ? slope : share;
        }
      }
      if (is_read) f(pixel, weight, slopes);
    }
  }

 private:
  const Grid& grid_;
  const Array& points_;
  const Array* valid_;
  bool linear_;
  Reader coordinate_, is_valid_;
};

int64_t offset(const Grid& grid, const std::array<int64_t, 3>& pixel) {
  return pixel[0] * grid.stride[0] + pixel[1] * grid.stride[1] + pixel[2] * grid.stride[2];
}

// Runs f(map, image, group, first point, last point).
template <class F>
void for_points(const Sizes& sizes, int threads, F&& f) {
  const int64_t blocks = (sizes.points + kPoints - 1) / kPoints;
  parallel_for(sizes.maps() * blocks, threads, [&](int64_t task) {
    const int64_t map = task / blocks, first = task % blocks * kPoints;
    f(map, map / sizes.groups, map % sizes.groups, first, std::min(first + kPoints, sizes.points));
  });
}

template <class T>
void add_to_features(const Array& grad_values, const Query& query, const Sizes& sizes,
                     const Array& grad, int threads) {
  struct Share {
    int64_t to;  // offset of a pixel in a map
    int64_t point;
    double weight;
  };
  const Grid grid(grad);
  const Reads reads(grid, query);
  std::vector<std::vector<Share>> shares(sizes.maps());
  parallel_for(sizes.maps(), threads, [&](int64_t map) {
    std::vector<Share>& own = shares[map];
    for (int64_t n = 0; n < sizes.points; ++n) {
      reads(map / sizes.groups, map % sizes.groups, n,
            [&](const auto& pixel, double weight, const auto&) {
              own.push_back({offset(grid, pixel), n, weight});
            });
    }
    std::sort(own.begin(), own.end(), [](const Share& a, const Share& b) {
      return a.to != b.to ? a.to < b.to : a.point < b.point;
    });
  });

  const int64_t blocks = (sizes.channels + kChannels - 1) / kChannels, step = grad.strides[2];
  const T* values = grad_values.as<const T>();
  parallel_for(sizes.maps() * blocks, threads, [&](int64_t task) {
    const int64_t map = task / blocks, first = task % blocks * kChannels;
    const int64_t channels = std::min(kChannels, sizes.channels - first);
    T* gradient = grad.as<T>() + map / sizes.groups * grad.strides[0] +
                  map % sizes.groups * grad.strides[1] + first * step;
    double sum[kChannels] = {};
    const std::vector<Share>& own = shares[map];
    for (size_t i = 0; i < own.size(); ++i) {
      const T* value = values + sizes.row(map, own[i].point) + first;
      for (int64_t c = 0; c < channels; ++c) sum[c] += own[i].weight * value[c];
      if (i + 1 < own.size() && own[i + 1].to == own[i].to) continue;
      T* to = gradient + own[i].to;
      for (int64_t c = 0; c < channels; ++c) to[c * step] = rounded<T>(sum[c]);
      std::fill_n(sum, channels, 0.0);
    }
  });
}

template <class T>
void fill_points_gradient(const Array& grad_values, const Array& features, const Query& query,
                          const Sizes& sizes, const Array& grad, int threads) {
  const Grid grid(features);
  const Reads reads(grid, query);
  const int64_t step = features.strides[2];
  dispatch_floating(grad.dtype, "grad_points", [&](auto type) {
    using P = decltype(type);
    for_points(sizes, threads, [&](int64_t map, int64_t b, int64_t g, int64_t first, int64_t last) {
      const T* base = features.as<const T>() + b * features.strides[0] + g * features.strides[1];
      for (int64_t n = first; n < last; ++n) {
        const T* value = grad_values.as<const T>() + sizes.row(map, n);
        double sums[3] = {};
        reads(b, g, n, [&](const auto& pixel, double, const auto& slopes) {
          const T* at = base + offset(grid, pixel);
          double dot = 0;
          for (int64_t c = 0; c < sizes.channels; ++c) dot += double{value[c]} * at[c * step];
          for (int axis = 0; axis < grid.axes; ++axis) {
            if (slopes[axis] != 0) sums[axis] += slopes[axis] * dot;
          }
        });
        P* to = grad.as<P>() + ((b * sizes.points + n) * sizes.groups + g) * grid.axes;
        for (int axis = 0; axis < grid.axes; ++axis) to[axis] = rounded<P>(sums[axis]);
      }
    });
  });
}

}  // namespace

void forward(const Array& features, const Query& query, const Array& values, int threads) {
  const Sizes sizes = checked_sizes(features, query, values);
  const Grid grid(features);
  const Reads reads(grid, query);
  const int64_t step = features.strides[2];
  dispatch_floating(features.dtype, "features", [&](auto type) {
    using T = decltype(type);
    for_points(sizes, threads, [&](int64_t map, int64_t b, int64_t g, int64_t first, int64_t last) {
      const T* base = features.as<const T>() + b * features.strides[0] + g * features.strides[1];
      std::vector<double> sum(query.linear ? sizes.channels : 0);
      for (int64_t n = first; n < last; ++n) {
        T* to = values.as<T>() + sizes.row(map, n);
        std::fill_n(to, sizes.channels, T{});
        std::fill(sum.begin(), sum.end(), 0.0);
        bool is_read = false;
        reads(b, g, n, [&](const auto& pixel, double weight, const auto&) {
          const T* at = base + offset(grid, pixel);
          is_read = true;
          if (!query.linear) {
            for (int64_t c = 0; c < sizes.channels; ++c) to[c] = at[c * step];
          } else {
            for (int64_t c = 0; c < sizes.channels; ++c) sum[c] += weight * at[c * step];
          }
        });
        if (query.linear && is_read) {
          for (int64_t c = 0; c < sizes.channels; ++c) to[c] = rounded<T>(sum[c]);
        }
      }
    });
  });
}

void backward(const Array& grad_values, const Array& features, const Query& query,
              const Array* grad_features, const Array* grad_points, int threads) {
  const Sizes sizes = checked_sizes(features, query, grad_values);
  if (grad_features) {
    expect(grad_features->dtype == features.dtype && grad_features->ndim == features.ndim &&
               grad_features->shape == features.shape,
           "grad_features: expected the features' shape and type");
    fill_zero(*grad_features, threads);
  }
  if (grad_points) {
    expect_contiguous(*grad_points, query.points.dtype, query.points.size(), "grad_points");
  }
  dispatch_floating(features.dtype, "features", [&](auto type) {
    using T = decltype(type);
    if (grad_features) {
      add_to_features<T>(grad_values, query, sizes, *grad_features, threads);
    }
    if (grad_points) {
      fill_points_gradient<T>(grad_values, features, query, sizes, *grad_points, threads);
    }
  });
}

}  // namespace instembed::gather_at
