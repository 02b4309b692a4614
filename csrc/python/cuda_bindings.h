// The bindings of the CUDA kernels. A stream is the integer that torch calls `cuda_stream`.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "associative_embedding/cuda.h"
#include "common/cuda_devices.h"
#include "cosine_margin/cuda.h"
#include "discriminative/cuda.h"
#include "gather_at/cuda.h"
#include "group_keypoints/cuda.h"
#include "group_on_sphere/cuda.h"
#include "instance_pool/cuda.h"
#include "label_statistics/cuda.h"
#include "mean_shift/cuda.h"
#include "pairwise_similarity/cuda.h"
#include "python/array_caster.h"
#include "recurrent_mean_shift/cuda.h"
#include "sample_pixels/cuda.h"
#include "seeds/cuda.h"

namespace instembed::python {

inline void bind_associative_embedding_cuda(py::module_& module) {
  using namespace associative_embedding;
  using OptionalArray = std::optional<Array>;

  module.def("associative_embedding_cuda_workspace", &cuda_workspace, py::arg("images"),
             py::arg("people"));

  module.def(
      "associative_embedding_forward_cuda",
      [](const Array& tags, const OptionalArray& keypoints, const Array& visible,
         const Array& terms, const Array& pixels, const Array& means, const Array& pushes,
         const Array& workspace, bool hinge, double sigma, double margin, int64_t stream) {
        const py::gil_scoped_release release;
        forward_cuda(tags, keypoints ? &*keypoints : nullptr, visible, Push(hinge, sigma, margin),
                     terms, {pixels, means, pushes}, workspace, stream);
      },
      py::arg("tags"), py::arg("keypoints"), py::arg("visible"), py::arg("terms"),
      py::arg("pixels"), py::arg("means"), py::arg("pushes"), py::arg("workspace"), py::kw_only(),
      py::arg("hinge"), py::arg("sigma"), py::arg("margin"), py::arg("stream"));

  module.def(
      "associative_embedding_backward_cuda",
      [](const Array& grad_terms, const Array& tags, const Array& pixels, const Array& means,
         const Array& pushes, const Array& grad, const Array& workspace, bool gathered,
         int64_t stream) {
        const py::gil_scoped_release release;
        backward_cuda(grad_terms, tags, {pixels, means, pushes}, gathered, grad, workspace, stream);
      },
      py::arg("grad_terms"), py::arg("tags"), py::arg("pixels"), py::arg("means"),
      py::arg("pushes"), py::arg("grad"), py::arg("workspace"), py::kw_only(), py::arg("gathered"),
      py::arg("stream"));
}

inline void bind_cosine_margin_cuda(py::module_& module) {
  using namespace cosine_margin;
  using OptionalArray = std::optional<Array>;

  module.def(
      "cosine_margin_cuda_workspace",
      [](const Array& points, const OptionalArray& offsets, const OptionalArray& keys,
         double fraction, int64_t most, bool gradient) {
        return cuda_workspace(points, offsets ? &*offsets : nullptr, keys ? &*keys : nullptr,
                              {fraction, most}, gradient);
      },
      py::arg("points"), py::arg("offsets"), py::arg("keys"), py::kw_only(), py::arg("fraction"),
      py::arg("most"), py::arg("gradient"));

  module.def(
      "cosine_margin_forward_cuda",
      [](const Array& points, const Array& labels, const OptionalArray& offsets,
         const OptionalArray& keys, const Array& losses, const OptionalArray& gradient,
         const Array& workspace, double fraction, int64_t most, double margin, bool squared,
         std::optional<int64_t> background, std::optional<int64_t> ignore_index, int64_t stream) {
        const py::gil_scoped_release release;
        forward_cuda(points, labels, offsets ? &*offsets : nullptr, keys ? &*keys : nullptr,
                     {{margin, squared}, {background, ignore_index}, {fraction, most}}, losses,
                     gradient ? &*gradient : nullptr, workspace, stream);
      },
      py::arg("points"), py::arg("labels"), py::arg("offsets"), py::arg("keys"), py::arg("losses"),
      py::arg("gradient"), py::arg("workspace"), py::kw_only(), py::arg("fraction"),
      py::arg("most"), py::arg("margin"), py::arg("squared"), py::arg("background"),
      py::arg("ignore_index"), py::arg("stream"));
}

inline void bind_discriminative_cuda(py::module_& module) {
  using namespace discriminative;
  using OptionalArray = std::optional<Array>;

  module.def(
      "discriminative_cuda_workspace",
      [](const Array& embeddings, const OptionalArray& offsets, const Options& options,
         int64_t capacity, bool backward) {
        return cuda_workspace(embeddings, offsets ? &*offsets : nullptr, options, capacity,
                              backward);
      },
      py::arg("embeddings"), py::arg("offsets"), py::arg("options"), py::arg("capacity"),
      py::kw_only(), py::arg("backward"));

  module.def(
      "discriminative_forward_cuda",
      [](const Array& embeddings, const Array& labels, const OptionalArray& offsets,
         const Options& options, const Array& terms, const Array& images, const Array& counts,
         const Array& vectors, const Array& slots, const Array& workspace, int64_t stream) {
        const py::gil_scoped_release release;
        forward_cuda(embeddings, labels, offsets ? &*offsets : nullptr, options, terms,
                     {images, counts, vectors, slots}, workspace, stream);
      },
      py::arg("embeddings"), py::arg("labels"), py::arg("offsets"), py::arg("options"),
      py::arg("terms"), py::arg("images"), py::arg("counts"), py::arg("vectors"), py::arg("slots"),
      py::arg("workspace"), py::kw_only(), py::arg("stream"));

  module.def(
      "discriminative_backward_cuda",
      [](const Array& embeddings, const OptionalArray& offsets, const Options& options,
         const Array& grad_terms, const Array& images, const Array& counts, const Array& vectors,
         const Array& slots, const Array& grad, const Array& workspace, int64_t stream) {
        const py::gil_scoped_release release;
        backward_cuda(embeddings, offsets ? &*offsets : nullptr, options, grad_terms,
                      {images, counts, vectors, slots}, grad, workspace, stream);
      },
      py::arg("embeddings"), py::arg("offsets"), py::arg("options"), py::arg("grad_terms"),
      py::arg("images"), py::arg("counts"), py::arg("vectors"), py::arg("slots"), py::arg("grad"),
      py::arg("workspace"), py::kw_only(), py::arg("stream"));
}

inline void bind_gather_at_cuda(py::module_& module) {
  using namespace gather_at;
  using OptionalArray = std::optional<Array>;

  module.def(
      "gather_at_forward_cuda",
      [](const Array& features, const Array& points, const OptionalArray& valid,
         const Array& values, bool linear, int64_t stream) {
        const py::gil_scoped_release release;
        forward_cuda(features, {points, valid ? &*valid : nullptr, linear}, values, stream);
      },
      py::arg("features"), py::arg("points"), py::arg("valid"), py::arg("values"), py::kw_only(),
      py::arg("linear"), py::arg("stream"));

  module.def(
      "gather_at_cuda_workspace",
      [](const Array& features, const Array& points, const OptionalArray& valid, bool linear) {
        return cuda_workspace(features, {points, valid ? &*valid : nullptr, linear});
      },
      py::arg("features"), py::arg("points"), py::arg("valid"), py::kw_only(), py::arg("linear"));

  module.def(
      "gather_at_backward_cuda",
      [](const Array& grad_values, const Array& features, const Array& points,
         const OptionalArray& valid, const OptionalArray& grad_features,
         const OptionalArray& grad_points, const Array& workspace, bool linear, int64_t stream) {
        const py::gil_scoped_release release;
        backward_cuda(grad_values, features, {points, valid ? &*valid : nullptr, linear},
                      grad_features ? &*grad_features : nullptr,
                      grad_points ? &*grad_points : nullptr, workspace, stream);
      },
      py::arg("grad_values"), py::arg("features"), py::arg("points"), py::arg("valid"),
      py::arg("grad_features"), py::arg("grad_points"), py::arg("workspace"), py::kw_only(),
      py::arg("linear"), py::arg("stream"));
}

inline void bind_group_keypoints_cuda(py::module_& module) {
  using namespace group_keypoints;

  module.def("group_keypoints_cuda_workspace", &cuda_workspace, py::arg("heatmaps"));

  module.def(
      "find_candidates_cuda",
      [](const Array& heatmaps, const Array& tags, int64_t max_people, double peak_threshold,
         int64_t nms, const Array& candidates, const Array& workspace, int64_t stream) {
        Options options;
        options.max_people = max_people;
        options.peak_threshold = peak_threshold;
        options.nms = nms;
        const py::gil_scoped_release release;
        find_candidates_cuda(heatmaps, tags, options, candidates, workspace, stream);
      },
      py::arg("heatmaps"), py::arg("tags"), py::arg("max_people"), py::arg("peak_threshold"),
      py::arg("nms"), py::arg("candidates"), py::arg("workspace"), py::kw_only(),
      py::arg("stream"));

  module.def(
      "finish_people_cuda",
      [](const Array& heatmaps, const Array& tags, int64_t max_people, bool adjust, bool refine,
         const Array& pixels, const Array& people, const Array& num_people, const Array& keypoints,
         const Array& keypoint_scores, const Array& visibility, int64_t stream) {
        Options options;
        options.max_people = max_people;
        options.adjust = adjust;
        options.refine = refine;
        const py::gil_scoped_release release;
        finish_cuda(heatmaps, tags, options, pixels, people, num_people, keypoints, keypoint_scores,
                    visibility, stream);
      },
      py::arg("heatmaps"), py::arg("tags"), py::arg("max_people"), py::arg("adjust"),
      py::arg("refine"), py::arg("pixels"), py::arg("people"), py::arg("num_people"),
      py::arg("keypoints"), py::arg("keypoint_scores"), py::arg("visibility"), py::kw_only(),
      py::arg("stream"));
}

inline void bind_group_on_sphere_cuda(py::module_& module) {
  using namespace group_on_sphere;
  using OptionalArray = std::optional<Array>;

  module.def(
      "group_on_sphere_cuda_workspace",
      [](const Array& points, const OptionalArray& offsets) {
        return cuda_workspace(points, offsets ? &*offsets : nullptr);
      },
      py::arg("points"), py::arg("offsets"));

  module.def(
      "group_on_sphere_cuda",
      [](const Array& points, const OptionalArray& mask, const OptionalArray& offsets,
         const Array& labels, const Array& centers, const Array& counts, const Array& num_instances,
         const Array& workspace, double threshold, int64_t min_size, bool nearest, int64_t stream) {
        const py::gil_scoped_release release;
        group_cuda(points, mask ? &*mask : nullptr, offsets ? &*offsets : nullptr,
                   {threshold, min_size, nearest}, {labels, centers, counts, num_instances},
                   workspace, stream);
      },
      py::arg("points"), py::arg("mask"), py::arg("offsets"), py::arg("labels"), py::arg("centers"),
      py::arg("counts"), py::arg("num_instances"), py::arg("workspace"), py::kw_only(),
      py::arg("threshold"), py::arg("min_size"), py::arg("nearest"), py::arg("stream"));
}

inline void bind_instance_pool_cuda(py::module_& module) {
  using namespace instance_pool;
  using OptionalArray = std::optional<Array>;

  module.def(
      "instance_pool_workspace",
      [](const Array& features, const OptionalArray& offsets, Reduce reduce, int64_t capacity) {
        return pool_workspace(features, offsets ? &*offsets : nullptr, reduce, capacity);
      },
      py::arg("features"), py::arg("offsets"), py::arg("reduce"), py::arg("capacity"));

  module.def(
      "instance_pool_cuda",
      [](const Array& features, const Array& labels, const OptionalArray& offsets, Reduce reduce,
         const Array& pooled, const Array& valid, const Array& ids, const Array& counts,
         const OptionalArray& argmax, const Array& num_instances, const Array& workspace,
         std::optional<int64_t> background, std::optional<int64_t> ignore_index, int64_t stream) {
        const py::gil_scoped_release release;
        pool_cuda(features, labels, offsets ? &*offsets : nullptr, {background, ignore_index},
                  reduce, {pooled, valid, ids, counts, argmax ? &*argmax : nullptr}, num_instances,
                  workspace, stream);
      },
      py::arg("features"), py::arg("labels"), py::arg("offsets"), py::arg("reduce"),
      py::arg("pooled"), py::arg("valid"), py::arg("ids"), py::arg("counts"), py::arg("argmax"),
      py::arg("num_instances"), py::arg("workspace"), py::kw_only(), py::arg("background"),
      py::arg("ignore_index"), py::arg("stream"));

  module.def(
      "instance_spread_workspace",
      [](const Array& features, const OptionalArray& offsets, int64_t capacity) {
        return spread_workspace(features, offsets ? &*offsets : nullptr, capacity);
      },
      py::arg("features"), py::arg("offsets"), py::arg("capacity"));

  module.def(
      "instance_spread_cuda",
      [](const Array& grad, const Array& labels, const OptionalArray& offsets, Reduce reduce,
         const Array& grad_features, const Array& workspace, std::optional<int64_t> background,
         std::optional<int64_t> ignore_index, int64_t stream) {
        const py::gil_scoped_release release;
        spread_cuda(grad, labels, offsets ? &*offsets : nullptr, {background, ignore_index}, reduce,
                    grad_features, workspace, stream);
      },
      py::arg("grad"), py::arg("labels"), py::arg("offsets"), py::arg("reduce"),
      py::arg("grad_features"), py::arg("workspace"), py::kw_only(), py::arg("background"),
      py::arg("ignore_index"), py::arg("stream"));

  module.def(
      "instance_spread_max_cuda",
      [](const Array& grad, const Array& argmax, const OptionalArray& offsets,
         const Array& grad_features, int64_t stream) {
        const py::gil_scoped_release release;
        spread_max_cuda(grad, argmax, offsets ? &*offsets : nullptr, grad_features, stream);
      },
      py::arg("grad"), py::arg("argmax"), py::arg("offsets"), py::arg("grad_features"),
      py::kw_only(), py::arg("stream"));
}

inline void bind_label_statistics_cuda(py::module_& module) {
  using namespace label_statistics;

  module.def("label_statistics_cuda_workspace", &cuda_workspace, py::arg("labels"),
             py::arg("capacity"));

  module.def(
      "label_statistics_cuda",
      [](const Array& labels, const Array& ids, const Array& boxes, const Array& areas,
         const Array& centroids, const Array& num_instances, const Array& workspace,
         std::optional<int64_t> background, std::optional<int64_t> ignore_index, int64_t stream) {
        const py::gil_scoped_release release;
        measure_cuda(labels, {background, ignore_index}, ids, boxes, areas, centroids,
                     num_instances, workspace, stream);
      },
      py::arg("labels"), py::arg("ids"), py::arg("boxes"), py::arg("areas"), py::arg("centroids"),
      py::arg("num_instances"), py::arg("workspace"), py::kw_only(), py::arg("background"),
      py::arg("ignore_index"), py::arg("stream"));
}

inline void bind_mean_shift_cuda(py::module_& module) {
  using namespace mean_shift;
  using OptionalArray = std::optional<Array>;

  module.def(
      "mean_shift_cuda_workspace",
      [](const Array& embeddings, const OptionalArray& mask, const OptionalArray& offsets,
         int64_t capacity, bool all_points) {
        Options options;
        options.seeding = all_points ? Seeding::all : Seeding::peel;
        return cuda_workspace(embeddings, mask ? &*mask : nullptr, offsets ? &*offsets : nullptr,
                              options, capacity);
      },
      py::arg("embeddings"), py::arg("mask"), py::arg("offsets"), py::arg("capacity"),
      py::kw_only(), py::arg("all_points"));

  module.def(
      "mean_shift_cuda",
      [](const Array& embeddings, const OptionalArray& mask, const OptionalArray& offsets,
         const Array& labels, const Array& centers, const Array& counts, const Array& num_instances,
         const Array& iterations, const Array& workspace, double bandwidth, bool all_points,
         bool nearest, int64_t min_size, int64_t max_iter, double tol, int64_t stream) {
        const Options options{bandwidth,
                              all_points ? Seeding::all : Seeding::peel,
                              nearest ? Leftovers::nearest : Leftovers::noise,
                              min_size,
                              max_iter,
                              tol};
        const py::gil_scoped_release release;
        group_cuda(embeddings, mask ? &*mask : nullptr, offsets ? &*offsets : nullptr, options,
                   {labels, centers, counts, num_instances, iterations}, workspace, stream);
      },
      py::arg("embeddings"), py::arg("mask"), py::arg("offsets"), py::arg("labels"),
      py::arg("centers"), py::arg("counts"), py::arg("num_instances"), py::arg("iterations"),
      py::arg("workspace"), py::kw_only(), py::arg("bandwidth"), py::arg("all_points"),
      py::arg("nearest"), py::arg("min_size"), py::arg("max_iter"), py::arg("tol"),
      py::arg("stream"));
}

inline void bind_pairwise_similarity_cuda(py::module_& module) {
  using namespace pairwise_similarity;

  module.def("pairwise_similarity_cuda_workspace", &cuda_workspace, py::arg("embeddings"),
             py::arg("indices"));

  module.def(
      "pairwise_similarity_forward_cuda",
      [](const Array& embeddings, const Array& indices, const Array& losses,
         const std::optional<Array>& slopes, const Array& workspace, int64_t stream) {
        const py::gil_scoped_release release;
        forward_cuda(embeddings, indices, losses, slopes ? &*slopes : nullptr, workspace, stream);
      },
      py::arg("embeddings"), py::arg("indices"), py::arg("losses"), py::arg("slopes"),
      py::arg("workspace"), py::kw_only(), py::arg("stream"));

  module.def(
      "pairwise_similarity_backward_cuda",
      [](const Array& grad_losses, const Array& slopes, const Array& indices, const Array& grad,
         int64_t stream) {
        const py::gil_scoped_release release;
        backward_cuda(grad_losses, slopes, indices, grad, stream);
      },
      py::arg("grad_losses"), py::arg("slopes"), py::arg("indices"), py::arg("grad"), py::kw_only(),
      py::arg("stream"));
}

inline void bind_recurrent_mean_shift_cuda(py::module_& module) {
  using namespace recurrent_mean_shift;
  using OptionalArray = std::optional<Array>;

  module.def(
      "recurrent_mean_shift_cuda_workspace",
      [](const Array& points, const OptionalArray& offsets, bool backward) {
        return cuda_workspace(points, offsets ? &*offsets : nullptr, backward);
      },
      py::arg("points"), py::arg("offsets"), py::kw_only(), py::arg("backward"));

  module.def(
      "recurrent_mean_shift_forward_cuda",
      [](const Array& points, const OptionalArray& mask, const OptionalArray& offsets,
         const Array& shifted, const Array& norms, const Array& denominators,
         const Array& workspace, double bandwidth, double step, double tolerance, int64_t stream) {
        const py::gil_scoped_release release;
        forward_cuda(points, mask ? &*mask : nullptr, offsets ? &*offsets : nullptr,
                     {bandwidth, step, tolerance}, shifted, {norms, denominators}, workspace,
                     stream);
      },
      py::arg("points"), py::arg("mask"), py::arg("offsets"), py::arg("shifted"), py::arg("norms"),
      py::arg("denominators"), py::arg("workspace"), py::kw_only(), py::arg("bandwidth"),
      py::arg("step"), py::arg("tolerance"), py::arg("stream"));

  module.def(
      "recurrent_mean_shift_backward_cuda",
      [](const Array& grad_shifted, const Array& points, const OptionalArray& mask,
         const OptionalArray& offsets, const Array& shifted, const Array& norms,
         const Array& denominators, const Array& grad, const Array& workspace, double bandwidth,
         double step, double tolerance, int64_t stream) {
        const py::gil_scoped_release release;
        backward_cuda(grad_shifted, points, shifted, mask ? &*mask : nullptr,
                      offsets ? &*offsets : nullptr, {bandwidth, step, tolerance},
                      {norms, denominators}, grad, workspace, stream);
      },
      py::arg("grad_shifted"), py::arg("points"), py::arg("mask"), py::arg("offsets"),
      py::arg("shifted"), py::arg("norms"), py::arg("denominators"), py::arg("grad"),
      py::arg("workspace"), py::kw_only(), py::arg("bandwidth"), py::arg("step"),
      py::arg("tolerance"), py::arg("stream"));
}

inline void bind_sample_pixels_cuda(py::module_& module) {
  using namespace sample_pixels;
  using OptionalArray = std::optional<Array>;

  module.def(
      "sample_pixels_cuda_workspace",
      [](const Array& labels, const OptionalArray& offsets, int64_t capacity, int64_t samples) {
        return cuda_workspace(labels, offsets ? &*offsets : nullptr, capacity, samples);
      },
      py::arg("labels"), py::arg("offsets"), py::arg("capacity"), py::arg("samples"));

  module.def(
      "sample_pixels_cuda",
      [](const Array& labels, const OptionalArray& offsets, const Array& words,
         const Array& indices, const Array& valid, const Array& workspace,
         std::optional<int64_t> background, std::optional<int64_t> ignore_index, int64_t stream) {
        const py::gil_scoped_release release;
        sample_cuda(labels, offsets ? &*offsets : nullptr, {background, ignore_index}, words,
                    indices, valid, workspace, stream);
      },
      py::arg("labels"), py::arg("offsets"), py::arg("words"), py::arg("indices"), py::arg("valid"),
      py::arg("workspace"), py::kw_only(), py::arg("background"), py::arg("ignore_index"),
      py::arg("stream"));
}

inline void bind_seeds_cuda(py::module_& module) {
  using namespace seeds;
  using OptionalArray = std::optional<Array>;

  module.def("seed_mask_iou_cuda_workspace", &mask_iou_cuda_workspace, py::arg("embeddings"),
             py::arg("seeds"));

  module.def(
      "seed_mask_iou_cuda",
      [](const Array& embeddings, const Array& labels, const Array& pixels,
         const std::vector<double>& squared_radii, const Array& iou, const Array& workspace,
         std::optional<int64_t> background, std::optional<int64_t> ignore_index, int64_t stream) {
        const py::gil_scoped_release release;
        mask_iou_cuda(embeddings, labels, pixels, squared_radii, {background, ignore_index}, iou,
                      workspace, stream);
      },
      py::arg("embeddings"), py::arg("labels"), py::arg("seeds"), py::arg("squared_radii"),
      py::arg("iou"), py::arg("workspace"), py::kw_only(), py::arg("background"),
      py::arg("ignore_index"), py::arg("stream"));

  module.def("select_seeds_cuda_workspace", &select_cuda_workspace, py::arg("embeddings"));

  module.def(
      "select_seeds_cuda",
      [](const Array& embeddings, const Array& seediness, const OptionalArray& mask,
         const Array& indices, const Array& scores, const Array& workspace, double diversity,
         double min_seediness, int64_t stream) {
        const py::gil_scoped_release release;
        select_cuda(embeddings, seediness, mask ? &*mask : nullptr, {diversity, min_seediness},
                    indices, scores, workspace, stream);
      },
      py::arg("embeddings"), py::arg("seediness"), py::arg("mask"), py::arg("indices"),
      py::arg("scores"), py::arg("workspace"), py::kw_only(), py::arg("diversity"),
      py::arg("min_seediness"), py::arg("stream"));

  module.def("grow_seeds_cuda_workspace", &grow_cuda_workspace, py::arg("embeddings"),
             py::arg("seeds"));

  module.def(
      "grow_seeds_cuda",
      [](const Array& embeddings, const OptionalArray& mask, const Array& pixels,
         const Array& scores, const Array& squared_radii, const Array& labels, const Array& order,
         const Array& counts, const Array& num_instances, const Array& workspace, int64_t min_size,
         double overlap, int64_t stream) {
        const py::gil_scoped_release release;
        grow_cuda(embeddings, mask ? &*mask : nullptr, pixels, scores, squared_radii,
                  {min_size, overlap}, labels, order, counts, num_instances, workspace, stream);
      },
      py::arg("embeddings"), py::arg("mask"), py::arg("seeds"), py::arg("scores"),
      py::arg("squared_radii"), py::arg("labels"), py::arg("order"), py::arg("counts"),
      py::arg("num_instances"), py::arg("workspace"), py::kw_only(), py::arg("min_size"),
      py::arg("overlap"), py::arg("stream"));
}

inline void bind_cuda(py::module_& module) {
  module.def("cuda_device_count", &cuda::visible_devices);
  bind_associative_embedding_cuda(module);
  bind_cosine_margin_cuda(module);
  bind_discriminative_cuda(module);
  bind_gather_at_cuda(module);
  bind_group_keypoints_cuda(module);
  bind_group_on_sphere_cuda(module);
  bind_instance_pool_cuda(module);
  bind_label_statistics_cuda(module);
  bind_mean_shift_cuda(module);
  bind_pairwise_similarity_cuda(module);
  bind_recurrent_mean_shift_cuda(module);
  bind_sample_pixels_cuda(module);
  bind_seeds_cuda(module);
}

}  // namespace instembed::python
