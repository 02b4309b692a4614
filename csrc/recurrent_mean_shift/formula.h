// What an iteration computes (Kong and Fowlkes 2018, arXiv 1712.08273), for unit vectors x_i:
//
//   K_ij = exp((x_i . x_j - 1) / bandwidth^2),  d_i = sum_j K_ij,  y_i = sum_j K_ij x_j / d_i,
//   z_i  = step y_i + (1 - step) x_i,           x_i <- z_i / |z_i|.
//
// and its gradient, for a gradient g_i of the new x_i. With dz_i = (g_i - x_i (x_i . g_i)) / |z_i|,
// x_i the new one, a_i = step dz_i / d_i and b_i = a_i . y_i:
//
//   dx_i = (1 - step) dz_i + sum_j [ K_ij a_j + W_ij x_j ],
//   W_ij = K_ij (a_i . x_j + a_j . x_i - b_i - b_j) / bandwidth^2.
//
// Since dz_i . z_i = 0, b_i is (step - 1) dz_i . x_i / d_i: y need not be kept. K and W are
// symmetric.
#pragma once

#include <algorithm>
#include <cmath>

namespace instembed::recurrent_mean_shift {

// Vectors shorter than this have no direction: they become zero, and so does their gradient.
constexpr double kShortest = 1e-12;

struct Rule {
  double bandwidth;
  double step;
  double tolerance;  // what a tile of points may be short of, in a row of K; less than 1

  // 1 / bandwidth^2, a number in float and double for any bandwidth.
  double rate() const { return std::clamp(1 / (bandwidth * bandwidth), 1e-30, 1e30); }
};

}  // namespace instembed::recurrent_mean_shift
