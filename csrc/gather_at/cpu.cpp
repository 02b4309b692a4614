// Gathering on the CPU. Points are turned into reads first: offsets and weights of the pixels
// around each. Channels go in blocks of a cache line, so that a planar map is not a page a channel.
// For the gradient of the features the reads are sorted by pixel: what several points send to one
// pixel is added up in double, in the order of the points, and written once.
#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "common/dtype.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/points.h"
#include "gather_at/formula.h"
#include "gather_at/gather_at.h"

namespace instembed::gather_at {
namespace {

constexpr int64_t kPoints = 256;  // a task
constexpr int64_t kChannels = 16;
constexpr int64_t kNowhere = std::numeric_limits<int64_t>::min();

struct Sizes {
  int64_t images, groups, channels, points;
  int axes;

  int64_t maps() const { return images * groups; }
  int64_t point_blocks() const { return (points + kPoints - 1) / kPoints; }
  int64_t channel_blocks() const { return (channels + kChannels - 1) / kChannels; }

  // The first of a point's channels in (B, N, G, C).
  int64_t row(int64_t map, int64_t n) const {
    return ((map / groups * points + n) * groups + map % groups) * channels;
  }
};

Sizes checked_sizes(const Array& features, const Query& query, const Array& values) {
  expect(features.ndim >= 4 && features.ndim <= 6,
         "features: expected (images, groups, channels, *spatial) with 1 to 3 spatial dimensions");
  const Sizes sizes{features.shape[0], features.shape[1], features.shape[2], query.points.shape[1],
                    features.ndim - 3};
  const auto fits = [&](const Array& array, int64_t last) {
    return array.ndim == 4 && array.shape[0] == sizes.images && array.shape[1] == sizes.points &&
           array.shape[2] == sizes.groups && array.shape[3] == last;
  };
  expect(fits(query.points, sizes.axes),
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

struct Read {
  int64_t offset;  // in a channel of the map
  double weight;
};

// Finds what the points read of `array`, which has the shape of the features.
class Locator {
 public:
  Locator(const Array& array, const Query& query)
      : query_(query),
        axes_(array.ndim - 3),
        coordinate_(reader(query.points.dtype)),
        is_valid_(query.valid ? reader(query.valid->dtype) : nullptr) {
    for (int axis = 0; axis < axes_; ++axis) {
      size_[axis] = array.shape[array.ndim - 1 - axis];
      stride_[axis] = array.strides[array.ndim - 1 - axis];
    }
  }

  int reads() const { return query_.linear ? 1 << axes_ : 1; }  // a point

  // The point's reads, and for each of the axes the derivatives of their weights, if asked for.
  // False if the point does not count.
  bool locate(int64_t b, int64_t n, int64_t g, Read* reads, std::array<double, 3>* slopes) const {
    if (query_.valid) {
      const auto& s = query_.valid->strides;
      if (!(is_valid_(query_.valid->data, b * s[0] + n * s[1] + g * s[2]) > 0)) return false;
    }
    const auto& s = query_.points.strides;
    const int64_t at = b * s[0] + n * s[1] + g * s[2];
    Cell cell;
    for (int axis = 0; axis < axes_; ++axis) {
      const double x = coordinate_(query_.points.data, at + axis * s[3]);
      const int64_t pixel = nearest_pixel(x, size_[axis]);
      if (pixel < 0) return false;
      cell.on[axis] = query_.linear ? between(x, size_[axis]) : on_pixel(pixel);
    }
    for (int corner = 0; corner < this->reads(); ++corner) {
      reads[corner] = {cell.offset(corner, stride_.data()), cell.weight(corner)};
      for (int axis = 0; slopes && axis < axes_; ++axis) {
        slopes[corner][axis] = cell.slope(corner, axis);
      }
    }
    return true;
  }

 private:
  const Query& query_;
  int axes_;
  std::array<int64_t, 3> size_{}, stride_{};  // of the axes x, y, z
  Reader coordinate_, is_valid_;
};

// Runs f(map, first point, last point).
template <class F>
void for_points(const Sizes& sizes, int threads, F&& f) {
  const int64_t blocks = sizes.point_blocks();
  parallel_for(sizes.maps() * blocks, threads, [&](int64_t task) {
    const int64_t first = task % blocks * kPoints;
    f(task / blocks, first, std::min(first + kPoints, sizes.points));
  });
}

// Runs f(first channel, number of channels).
template <class F>
void for_channels(const Sizes& sizes, F&& f) {
  for (int64_t first = 0; first < sizes.channels; first += kChannels) {
    f(first, std::min(kChannels, sizes.channels - first));
  }
}

template <class T>
T* map_of(const Array& array, const Sizes& sizes, int64_t map) {
  return array.as<T>() + map / sizes.groups * array.strides[0] +
         map % sizes.groups * array.strides[1];
}

// The sum of a point's reads of a block of channels.
template <class T>
void read_channels(const T* from, int64_t step, const Read* reads, int count, int64_t channels,
                   bool linear, T* to) {
  if (!linear) {
    for (int64_t c = 0; c < channels; ++c) to[c] = from[reads->offset + c * step];
    return;
  }
  accumulator_t<T> sum[kChannels] = {};
  for (int k = 0; k < count; ++k) {
    const auto weight = static_cast<accumulator_t<T>>(reads[k].weight);
    const T* at = from + reads[k].offset;
    for (int64_t c = 0; c < channels; ++c) sum[c] += weight * at[c * step];
  }
  for (int64_t c = 0; c < channels; ++c) to[c] = rounded<T>(sum[c]);
}

// What a point sends to a pixel.
struct Share {
  int64_t to;
  int64_t point;
  double weight;
};

// By pixel, in the order of the points: a stable sort by digits, since there are often as many
// shares as pixels.
void sort_by_pixel(std::vector<Share>* shares) {
  constexpr int kBits = 8;
  int64_t highest = 0;
  for (const Share& share : *shares) highest = std::max(highest, share.to);
  std::vector<Share> next(shares->size());
  for (int shift = 0; highest >> shift > 0; shift += kBits) {
    std::array<int64_t, (1 << kBits) + 1> begin{};
    const auto digit = [&](const Share& share) { return share.to >> shift & ((1 << kBits) - 1); };
    for (const Share& share : *shares) ++begin[digit(share) + 1];
    for (size_t k = 1; k < begin.size(); ++k) begin[k] += begin[k - 1];
    for (const Share& share : *shares) next[begin[digit(share)]++] = share;
    shares->swap(next);
  }
}

template <class T>
void add_to_features(const Array& grad_values, const Query& query, const Sizes& sizes,
                     const Array& grad, int threads) {
  const Locator locator(grad, query);
  std::vector<std::vector<Share>> shares(sizes.maps());
  parallel_for(sizes.maps(), threads, [&](int64_t map) {
    Read reads[8];
    for (int64_t n = 0; n < sizes.points; ++n) {
      if (!locator.locate(map / sizes.groups, n, map % sizes.groups, reads, nullptr)) continue;
      for (int k = 0; k < locator.reads(); ++k) {
        shares[map].push_back({reads[k].offset, n, reads[k].weight});
      }
    }
    sort_by_pixel(&shares[map]);
  });

  const int64_t blocks = sizes.channel_blocks(), step = grad.strides[2];
  parallel_for(sizes.maps() * blocks, threads, [&](int64_t task) {
    const int64_t map = task / blocks, first = task % blocks * kChannels;
    const int64_t channels = std::min(kChannels, sizes.channels - first);
    T* gradient = map_of<T>(grad, sizes, map) + first * step;
    double sum[kChannels] = {};
    const std::vector<Share>& own = shares[map];
    for (size_t i = 0; i < own.size(); ++i) {
      const T* value = grad_values.as<const T>() + sizes.row(map, own[i].point) + first;
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
  const Locator locator(features, query);
  const int64_t step = features.strides[2];
  dispatch_floating(grad.dtype, "grad_points", [&](auto type) {
    using P = decltype(type);
    for_points(sizes, threads, [&](int64_t map, int64_t first, int64_t last) {
      const int64_t b = map / sizes.groups, g = map % sizes.groups;
      const T* from = map_of<const T>(features, sizes, map);
      for (int64_t n = first; n < last; ++n) {
        Read reads[8];
        std::array<double, 3> slopes[8] = {}, sum{};
        if (query.linear && locator.locate(b, n, g, reads, slopes)) {
          const T* value = grad_values.as<const T>() + sizes.row(map, n);
          for (int k = 0; k < locator.reads(); ++k) {
            const T* at = from + reads[k].offset;
            double dot = 0;
            for (int64_t c = 0; c < sizes.channels; ++c) dot += double{value[c]} * at[c * step];
            for (int axis = 0; axis < sizes.axes; ++axis) sum[axis] += slopes[k][axis] * dot;
          }
        }
        P* to = grad.as<P>() + ((b * sizes.points + n) * sizes.groups + g) * sizes.axes;
        for (int axis = 0; axis < sizes.axes; ++axis) to[axis] = rounded<P>(sum[axis]);
      }
    });
  });
}

}  // namespace

void forward(const Array& features, const Query& query, const Array& values, int threads) {
  const Sizes sizes = checked_sizes(features, query, values);
  const Locator locator(features, query);
  const int64_t step = features.strides[2];
  const int count = locator.reads();
  dispatch_floating(features.dtype, "features", [&](auto type) {
    using T = decltype(type);
    for_points(sizes, threads, [&](int64_t map, int64_t first, int64_t last) {
      std::vector<Read> reads((last - first) * count);
      for (int64_t n = first; n < last; ++n) {
        Read* own = &reads[(n - first) * count];
        if (!locator.locate(map / sizes.groups, n, map % sizes.groups, own, nullptr)) {
          own->offset = kNowhere;
        }
      }
      for_channels(sizes, [&](int64_t channel, int64_t channels) {
        const T* from = map_of<const T>(features, sizes, map) + channel * step;
        for (int64_t n = first; n < last; ++n) {
          const Read* own = &reads[(n - first) * count];
          T* to = values.as<T>() + sizes.row(map, n) + channel;
          if (own->offset == kNowhere) {
            std::fill_n(to, channels, T{});
          } else {
            read_channels(from, step, own, count, channels, query.linear, to);
          }
        }
      });
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
