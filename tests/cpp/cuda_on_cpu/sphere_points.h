// Points on the unit sphere in arrays of any layout, for tests.
#pragma once

#include <cmath>

#include "cuda_on_cpu/tests.h"

namespace instembed {

// Element (row, channel, column) of float32 or float64 (B, D, N), or of (B, N) with channel 0.
inline double element(const Array& array, int64_t row, int64_t channel, int64_t column) {
  const int64_t at = row * array.strides[0] + (array.ndim == 3 ? channel * array.strides[1] : 0) +
                     column * array.strides[array.ndim - 1];
  return array.dtype == DType::f64 ? array.as<double>()[at] : array.as<float>()[at];
}

inline void set_element(const Array& array, int64_t row, int64_t channel, int64_t column,
                        double value) {
  const int64_t at =
      row * array.strides[0] + channel * array.strides[1] + column * array.strides[2];
  if (array.dtype == DType::f64) {
    array.as<double>()[at] = value;
  } else {
    array.as<float>()[at] = static_cast<float>(value);
  }
}

// Unit vectors around so many directions, each in runs of about `run` columns; some that are zero
// or NaN, if `odd`.
inline void fill_units(const Array& array, int64_t clusters, int64_t run, double spread, bool odd) {
  std::normal_distribution<double> normal;
  const int64_t channels = array.shape[1];
  std::vector<double> centers(clusters * channels), point(channels);
  for (double& value : centers) value = normal(generator);
  for (int64_t row = 0; row < array.shape[0]; ++row) {
    int64_t own = 0;
    for (int64_t i = 0; i < array.shape[2]; ++i) {
      if (draw(1, run) == 1) own = draw(0, clusters - 1);
      double square = 0, length = 0;
      for (int64_t d = 0; d < channels; ++d) length += std::pow(centers[own * channels + d], 2);
      for (int64_t d = 0; d < channels; ++d) {
        point[d] = centers[own * channels + d] / std::sqrt(length) + spread * normal(generator);
        square += point[d] * point[d];
      }
      const int64_t kind = odd ? draw(0, 19) : 2;
      for (int64_t d = 0; d < channels; ++d) {
        set_element(array, row, d, i,
                    kind == 0             ? 0
                    : kind == 1 && d == 0 ? NAN
                                          : point[d] / std::sqrt(square));
      }
    }
  }
}

// The same values as float64, in the plain layout.
inline Buffer widened(const Array& array) {
  Buffer wide(DType::f64, {array.shape[0], array.shape[1], array.shape[2]});
  for (int64_t b = 0; b < array.shape[0]; ++b) {
    for (int64_t d = 0; d < array.shape[1]; ++d) {
      for (int64_t i = 0; i < array.shape[2]; ++i) {
        set_element(wide, b, d, i, element(array, b, d, i));
      }
    }
  }
  return wide;
}

// Within `tolerance` of the largest value expected; NaN where NaN is expected.
inline void check_close(const Array& got, const Array& expected, double tolerance) {
  const int64_t channels = got.ndim == 3 ? got.shape[1] : 1, columns = got.shape[got.ndim - 1];
  const auto for_all = [&](auto&& f) {
    for (int64_t b = 0; b < got.shape[0]; ++b) {
      for (int64_t d = 0; d < channels; ++d) {
        for (int64_t i = 0; i < columns; ++i) {
          f(b, d, i, element(got, b, d, i), element(expected, b, d, i));
        }
      }
    }
  };
  double largest = 0;
  for_all([&](int64_t, int64_t, int64_t, double, double e) {
    if (std::abs(e) > largest) largest = std::abs(e);
  });
  for_all([&](int64_t b, int64_t d, int64_t i, double g, double e) {
    const bool close = std::isnan(e) ? std::isnan(g) : std::abs(g - e) <= tolerance * largest;
    if (!close) {
      std::fprintf(stderr, "image %ld, channel %ld, point %ld: %.17g instead of %.17g\n",
                   static_cast<long>(b), static_cast<long>(d), static_cast<long>(i), g, e);
    }
    CHECK(close);
  });
}

// Bounds of images among `points` points, an empty one and one of a single point among them.
inline Buffer make_bounds(int64_t points) {
  Buffer bounds(DType::i64, {6});
  const int64_t values[] = {0, 0, points / 2 + 7, points / 2 + 7, points / 2 + 8, points};
  std::copy(values, values + 6, bounds.as<int64_t>());
  return bounds;
}

}  // namespace instembed
