// Clusters become instances: the tables of an image, and the labels of its pixels.
#pragma once

#include "mean_shift/group.cuh"

namespace instembed::mean_shift::device {

constexpr int32_t kNobody = -1;  // the owner of points that belong to no cluster

// What is kept until the labels are written. Owners are clusters, 1, 2, ..., in the order found.
struct Clusters {
  int32_t* label_of_owner = nullptr;  // (pixels of all images): 0 for a cluster that is dropped
  double* centers = nullptr;          // (images, capacity, channels)
  int64_t* classes = nullptr;         // (images, capacity), ascending

  void take(Workspace* workspace, const Images& images, int64_t channels, int64_t capacity) {
    label_of_owner = workspace->take<int32_t>(images.total);
    centers = workspace->take<double>(images.images * capacity * channels);
    classes = workspace->take<int64_t>(images.images * capacity);
  }
};

// The instances of one image, as all its blocks know them. The group's first block writes.
template <class T, class S>
struct Instances {
  const Cloud<T, S>& cloud;
  const Clusters& clusters;
  const Output& out;
  int64_t image;
  int32_t owners = 0, kept = 0;

  __device__ bool overflow() const { return kept > out.capacity; }

  // Until finish() labels are owners.
  __device__ void give(int64_t i, int32_t owner) const { out.labels[cloud.start + i] = owner; }

  // The next owner owns `count` points.
  template <class Center>
  __device__ void add(bool writes, bool keep, int64_t count, int64_t label_class,
                      const Center& center) {
    ++owners;
    if (keep) ++kept;
    if (!writes || overflow()) return;
    const int tid = static_cast<int>(threadIdx.x);
    if (tid == 0) {
      clusters.label_of_owner[cloud.start + owners - 1] = keep ? kept : 0;
    }
    if (!keep) return;
    const int64_t row = image * out.capacity + kept - 1;
    for_channels(cloud.channels, tid, kThreads, [&](int d) {
      const double value = center[d];
      clusters.centers[row * cloud.channels + d] = value;
      if (out.wide) {
        static_cast<double*>(out.centers)[row * cloud.channels + d] = value;
      } else {
        static_cast<float*>(out.centers)[row * cloud.channels + d] = static_cast<float>(value);
      }
    });
    if (tid == 0) {
      out.counts[row] = count;
      clusters.classes[row] = label_class;
    }
  }

  // The label of the nearest centre of a point's class, the first of equals; 0 if there is none.
  __device__ int64_t nearest(int64_t i) const {
    const int64_t* classes = clusters.classes + image * out.capacity;
    const int64_t label_class = cloud.class_of(i);
    int64_t low = 0, high = kept;  // the first row of at least that class
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (classes[middle] < label_class) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    int64_t label = 0;
    double best = 0;
    for (int64_t k = low; k < kept && classes[k] == label_class; ++k) {
      const double* center =
          clusters.centers + (image * out.capacity + k) * int64_t{cloud.channels};
      const double squared =
          squared_distance(cloud.point(i), cloud.channel(), center, cloud.channels);
      if (label == 0 || squared < best) {
        label = k + 1;
        best = squared;
      }
    }
    return label;
  }

  // Owners to labels. `noise`: some points may be of kNobody.
  __device__ void finish(Group* group, bool noise, bool give_to_nearest, const int64_t* invalid) {
    const int tid = static_cast<int>(threadIdx.x);
    if (noise || kept < owners || overflow()) {
      group->wait();
      group->for_pixels(cloud.pixels, [&](int64_t i) {
        int64_t* label = out.labels + cloud.start + i;
        const int64_t owner = *label;
        if (owner == 0) return;
        int64_t found = 0;
        if (!overflow()) {
          if (owner != kNobody) found = clusters.label_of_owner[cloud.start + owner - 1];
          if (found == 0 && give_to_nearest) {
            found = nearest(i);
            if (found > 0) {
              atomicAdd(reinterpret_cast<unsigned long long*>(out.counts + image * out.capacity +
                                                              found - 1),
                        1ull);
            }
          }
        }
        *label = found;
      });
    }
    if (group->block != 0) return;
    if (overflow()) {
      for (int64_t k = tid; k < out.capacity * cloud.channels; k += kThreads) {
        const int64_t at = image * out.capacity * cloud.channels + k;
        if (out.wide) {
          static_cast<double*>(out.centers)[at] = 0;
        } else {
          static_cast<float*>(out.centers)[at] = 0;
        }
      }
      for (int64_t k = tid; k < out.capacity; k += kThreads) {
        out.counts[image * out.capacity + k] = 0;
      }
    }
    if (tid == 0) {
      out.instances[image] = invalid && *invalid ? -1
                             : overflow()        ? out.capacity + 1
                                                 : int64_t{kept};
    }
  }
};

}  // namespace instembed::mean_shift::device
