// The sizes that all arrays of the loss have in common, and their check.
#pragma once

#include "associative_embedding/associative_embedding.h"

namespace instembed::associative_embedding {

struct Sizes {
  int64_t images, people, joints, tag;  // B, P, K, L
};

inline Sizes checked_sizes(const Array& tags, const Array& pixels, bool gathered) {
  expect(pixels.ndim == 3, "visible: expected (images, people, joints)");
  expect(tags.ndim == 4, "tags: expected 4 dimensions");
  Sizes sizes{pixels.shape[0], pixels.shape[1], pixels.shape[2], 0};
  expect(tags.shape[0] == sizes.images, "tags: expected as many images as there are of people");
  expect(sizes.joints >= 1, "visible: expected at least one joint");
  if (gathered) {
    expect(tags.shape[1] == sizes.people && tags.shape[2] == sizes.joints,
           "tags: expected (images, people, joints, tag)");
    sizes.tag = tags.shape[3];
  } else {
    expect(tags.shape[1] % sizes.joints == 0, "tags: expected whole tags for every joint");
    sizes.tag = tags.shape[1] / sizes.joints;
  }
  expect(sizes.tag >= 1, "tags: expected at least one channel a joint");
  return sizes;
}

inline void check_state(const State& state, const Sizes& sizes) {
  expect_contiguous(state.pixels, DType::i64, sizes.images * sizes.people * sizes.joints, "pixels");
  expect_contiguous(state.means, DType::f64, sizes.images * sizes.people * sizes.tag, "means");
  expect_contiguous(state.pushes, DType::f64, sizes.images * sizes.people * sizes.tag, "pushes");
}

}  // namespace instembed::associative_embedding
