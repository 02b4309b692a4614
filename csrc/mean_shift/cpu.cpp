// Mean-shift grouping on the CPU: images into blocks of points, blocks into clusters, clusters into
// labels.
#include <algorithm>
#include <cmath>

#include "common/batch.h"
#include "common/dtype.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "mean_shift/blocks.h"
#include "mean_shift/formula.h"
#include "mean_shift/groups.h"
#include "mean_shift/mean_shift.h"

namespace instembed::mean_shift {

namespace {

// Images below this many pixels are grouped side by side, larger ones one after the other by all
// threads.
constexpr int64_t kSmallImage = 1 << 16;

template <class S>
Instances group_image(const Array& embeddings, const Batch& batch, int64_t b,
                      const ClassMap& classes, const Options& options, int64_t* labels,
                      int threads) {
  Cloud<S> cloud =
      build_cloud<S>(embeddings, batch, b, classes, options.bandwidth, labels, threads);
  Instances result;
  for (BlockSet<S>& set : cloud.sets) {
    Ownership ownership(set.size());
    const Clusters clusters = options.seeding == Seeding::peel
                                  ? peel(&set, options, &ownership, threads)
                                  : all_points(set, options, &ownership, threads);
    const int64_t base = result.size();
    std::vector<int64_t> label_of_owner(clusters.size() + 1, 0);
    std::vector<double> kept;
    for (int64_t k = 0; k < clusters.size(); ++k) {
      if (!clusters.kept[k]) continue;
      result.counts.push_back(0);
      label_of_owner[k + 1] = result.size();
      kept.insert(kept.end(), clusters.centers.begin() + k * set.dims,
                  clusters.centers.begin() + (k + 1) * set.dims);
    }
    result.centers.insert(result.centers.end(), kept.begin(), kept.end());
    result.iterations = std::max(result.iterations, clusters.iterations);
    const NearestCenters nearest(kept, set.dims);
    write_labels(set, ownership, label_of_owner,
                 options.leftovers == Leftovers::nearest ? &nearest : nullptr, base, labels,
                 &result.counts, threads);
  }
  return result;
}

}  // namespace

int64_t Result::largest() const {
  int64_t most = 0;
  for (const Instances& image : images) most = std::max(most, image.size());
  return most;
}

void Result::copy(const Array& centers, const Array& counts, const Array& instances,
                  const Array& iterations) const {
  const auto n = static_cast<int64_t>(images.size());
  expect(centers.ndim == 3 && centers.shape[0] == n && centers.shape[2] == channels &&
             centers.shape[1] >= largest(),
         "centers: expected (images, capacity, channels) with capacity for every instance");
  const int64_t capacity = centers.shape[1];
  expect_contiguous(centers, centers.dtype, n * capacity * channels, "centers");
  expect_contiguous(counts, DType::i64, n * capacity, "counts");
  expect_contiguous(instances, DType::i64, n, "instances");
  expect_contiguous(iterations, DType::i64, n, "iterations");
  expect(centers.dtype == DType::f32 || centers.dtype == DType::f64,
         "centers: expected float32 or float64");
  for (int64_t b = 0; b < n; ++b) {
    const Instances& image = images[b];
    instances.as<int64_t>()[b] = image.size();
    iterations.as<int64_t>()[b] = image.iterations;
    for (int64_t k = 0; k < capacity; ++k) {
      counts.as<int64_t>()[b * capacity + k] = k < image.size() ? image.counts[k] : 0;
    }
    const auto values = static_cast<int64_t>(image.centers.size());
    for (int64_t i = 0; i < capacity * channels; ++i) {
      const double value = i < values ? image.centers[i] : 0.0;
      const int64_t at = b * capacity * channels + i;
      if (centers.dtype == DType::f32) {
        centers.as<float>()[at] = static_cast<float>(value);
      } else {
        centers.as<double>()[at] = value;
      }
    }
  }
}

Result group(const Array& embeddings, const Array* mask, const Array* offsets,
             const Options& options, const Array& labels, int threads) {
  expect(std::isfinite(options.bandwidth) && options.bandwidth > 0,
         "bandwidth: expected a positive number");
  const Batch batch = Batch::of_embeddings(embeddings, offsets);
  const int64_t rows = offsets ? 1 : batch.images;
  expect(labels.ndim == 2 && labels.shape[0] == rows && labels.shape[1] == batch.pixels,
         "labels: expected the embeddings' shape without channels");
  expect_contiguous(labels, DType::i64, rows * batch.pixels, "labels");
  if (mask) {
    expect(mask->ndim == 2 && mask->shape[0] == rows && mask->shape[1] == batch.pixels,
           "mask: expected the embeddings' shape without channels");
  }
  prefer_huge_pages(labels.data, labels.size() * sizeof(int64_t));
  const bool exact = embeddings.dtype == DType::f64 || !fits_float(options.bandwidth);
  Result result;
  result.channels = batch.channels;
  result.images.resize(batch.images);
  int64_t most = 0;
  for (int64_t b = 0; b < batch.images; ++b) most = std::max(most, batch.count(b));
  const bool side_by_side =
      batch.images > 1 && (most <= kSmallImage || batch.images >= 4 * threads);
  parallel_for(batch.images, side_by_side ? threads : 1, [&](int64_t b) {
    ClassMap classes{mask, 0, 1};
    if (mask) {
      classes.stride = mask->strides[1];
      classes.first = offsets ? batch.offsets[b] * classes.stride : b * mask->strides[0];
    }
    int64_t* to = labels.as<int64_t>() + (offsets ? batch.offsets[b] : b * batch.pixels);
    const int inner = side_by_side ? 1 : threads;
    result.images[b] = exact
                           ? group_image<double>(embeddings, batch, b, classes, options, to, inner)
                           : group_image<float>(embeddings, batch, b, classes, options, to, inner);
  });
  return result;
}

}  // namespace instembed::mean_shift
