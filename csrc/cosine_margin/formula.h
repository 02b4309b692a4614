// What the loss computes (Kong and Fowlkes 2018, arXiv 1712.08273), for points x_i of an image with
// instances c = 1..C of N_c points each:
//
//   s_ij = (1 + x_i . x_j) / 2,  w_i = 1 / (C N_c)  for i in c: their sum is 1,
//   loss = sum_ij w_i w_j [ s_ij of one instance: 1 - s_ij; of two: h(s_ij) ],
//   h(s) = [s - margin]+, or its square.
//
// The first part is linear in s, and a sum over instances: with S_c = sum_i x_i and mu_c its mean,
//
//   sum_c 1 / (2 C^2 N_c) sum_i [ |x_i - mu_c|^2 + 1 - |x_i|^2 ],  gradient  -S_c / (C N_c)^2.
//
// The gradient of the second is w_i sum_j w_j h'(s_ij) x_j. With g_ij = x_i . x_j - (2 margin - 1),
// s_ij - margin is g_ij / 2.
#pragma once

#include "common/host_device.h"

namespace instembed::cosine_margin {

struct Rule {
  double margin = 0.5;
  bool squared = false;

  double least() const { return 2 * margin - 1; }  // x . y at the margin

  // sum_ij of [g_ij]+, or of its square, to the second part.
  double scale() const { return squared ? 0.25 : 0.5; }
};

// A length that differs from 1 by rounding counts as 1: 1 - |x|^2, or 0.
INSTEMBED_HOST_DEVICE inline double short_of_unit(double square, double rounding) {
  const double difference = 1 - square;
  return difference < rounding && -difference < rounding ? 0 : difference;
}

}  // namespace instembed::cosine_margin
