// The extension module instembed._core: one binding an op. Arguments are checked in Python, where a
// message can name what the user wrote; see instembed/_native.py for how the module is found.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "associative_embedding/associative_embedding.h"
#include "cosine_margin/cosine_margin.h"
#include "detections/detections.h"
#include "discriminative/discriminative.h"
#include "gather_at/gather_at.h"
#include "group_keypoints/group_keypoints.h"
#include "group_on_sphere/group_on_sphere.h"
#include "instance_pool/instance_pool.h"
#include "label_statistics/label_statistics.h"
#include "mean_shift/mean_shift.h"
#include "pairwise_similarity/pairwise_similarity.h"
#include "python/array_caster.h"
#include "recurrent_mean_shift/recurrent_mean_shift.h"
#include "sample_pixels/sample_pixels.h"
#include "seeds/seeds.h"

#if defined(INSTEMBED_CUDA)
#include "python/cuda_bindings.h"
#endif

namespace py = pybind11;

namespace instembed {
namespace {

using OptionalArray = std::optional<Array>;

const Array* pointer(const OptionalArray& array) { return array ? &*array : nullptr; }

void bind_discriminative(py::module_& module) {
  using namespace discriminative;

  py::class_<Options>(module, "DiscriminativeOptions")
      .def(py::init([](double delta_var, double delta_dist, int norm, bool pooled_variance,
                       bool background_push, std::optional<int64_t> background,
                       std::optional<int64_t> ignore_index, int threads) {
             return Options{delta_var,       delta_dist,      norm,
                            pooled_variance, background_push, {background, ignore_index},
                            threads};
           }),
           py::kw_only(), py::arg("delta_var"), py::arg("delta_dist"), py::arg("norm"),
           py::arg("pooled_variance"), py::arg("background_push"), py::arg("background"),
           py::arg("ignore_index"), py::arg("threads"));

  module.def(
      "discriminative_forward",
      [](const Array& embeddings, const Array& labels, const OptionalArray& offsets,
         const Options& options, const Array& terms, const OptionalArray& first,
         const OptionalArray& counts, const OptionalArray& vectors, const OptionalArray& runs) {
        const py::gil_scoped_release release;
        if (!first || !counts || !vectors || !runs) {
          forward(embeddings, labels, pointer(offsets), options, terms, nullptr);
          return;
        }
        const State state{*first, *counts, *vectors, *runs};
        forward(embeddings, labels, pointer(offsets), options, terms, &state);
      },
      py::arg("embeddings"), py::arg("labels"), py::arg("offsets"), py::arg("options"),
      py::arg("terms"), py::arg("first") = py::none(), py::arg("counts") = py::none(),
      py::arg("vectors") = py::none(), py::arg("runs") = py::none());

  module.def(
      "discriminative_backward",
      [](const Array& embeddings, const Array& labels, const OptionalArray& offsets,
         const Options& options, const Array& grad_terms, const Array& first, const Array& counts,
         const Array& vectors, const Array& runs, const Array& grad) {
        const py::gil_scoped_release release;
        backward(embeddings, labels, pointer(offsets), options, grad_terms,
                 {first, counts, vectors, runs}, grad);
      },
      py::arg("embeddings"), py::arg("labels"), py::arg("offsets"), py::arg("options"),
      py::arg("grad_terms"), py::arg("first"), py::arg("counts"), py::arg("vectors"),
      py::arg("runs"), py::arg("grad"));
}

void bind_associative_embedding(py::module_& module) {
  using namespace associative_embedding;

  module.def(
      "associative_embedding_forward",
      [](const Array& tags, const OptionalArray& keypoints, const Array& visible,
         const Array& terms, const Array& pixels, const Array& means, const Array& pushes,
         bool hinge, double sigma, double margin, int threads) {
        const py::gil_scoped_release release;
        forward(tags, pointer(keypoints), visible, {hinge, sigma, margin}, terms,
                {pixels, means, pushes}, threads);
      },
      py::arg("tags"), py::arg("keypoints"), py::arg("visible"), py::arg("terms"),
      py::arg("pixels"), py::arg("means"), py::arg("pushes"), py::kw_only(), py::arg("hinge"),
      py::arg("sigma"), py::arg("margin"), py::arg("threads"));

  module.def(
      "associative_embedding_backward",
      [](const Array& grad_terms, const Array& tags, const Array& pixels, const Array& means,
         const Array& pushes, const Array& grad, bool gathered, int threads) {
        const py::gil_scoped_release release;
        backward(grad_terms, tags, {pixels, means, pushes}, gathered, grad, threads);
      },
      py::arg("grad_terms"), py::arg("tags"), py::arg("pixels"), py::arg("means"),
      py::arg("pushes"), py::arg("grad"), py::kw_only(), py::arg("gathered"), py::arg("threads"));
}

void bind_mean_shift(py::module_& module) {
  using namespace mean_shift;

  py::class_<Result>(module, "MeanShiftResult")
      .def_property_readonly("largest", &Result::largest)
      .def("copy", &Result::copy, py::arg("centers"), py::arg("counts"), py::arg("num_instances"),
           py::arg("num_iterations"));

  module.def(
      "mean_shift",
      [](const Array& embeddings, const OptionalArray& mask, const OptionalArray& offsets,
         const Array& labels, double bandwidth, bool all_points, bool nearest, int64_t min_size,
         int64_t max_iter, double tol, int threads) {
        const Options options{bandwidth,
                              all_points ? Seeding::all : Seeding::peel,
                              nearest ? Leftovers::nearest : Leftovers::noise,
                              min_size,
                              max_iter,
                              tol};
        const py::gil_scoped_release release;
        return group(embeddings, pointer(mask), pointer(offsets), options, labels, threads);
      },
      py::arg("embeddings"), py::arg("mask"), py::arg("offsets"), py::arg("labels"), py::kw_only(),
      py::arg("bandwidth"), py::arg("all_points"), py::arg("nearest"), py::arg("min_size"),
      py::arg("max_iter"), py::arg("tol"), py::arg("threads"));
}

void bind_recurrent_mean_shift(py::module_& module) {
  using namespace recurrent_mean_shift;

  module.def(
      "recurrent_mean_shift_forward",
      [](const Array& points, const OptionalArray& mask, const OptionalArray& offsets,
         const Array& shifted, const Array& norms, const Array& denominators, double bandwidth,
         double step, double tolerance, int threads) {
        const py::gil_scoped_release release;
        forward(points, pointer(mask), pointer(offsets), {bandwidth, step, tolerance}, shifted,
                {norms, denominators}, threads);
      },
      py::arg("points"), py::arg("mask"), py::arg("offsets"), py::arg("shifted"), py::arg("norms"),
      py::arg("denominators"), py::kw_only(), py::arg("bandwidth"), py::arg("step"),
      py::arg("tolerance"), py::arg("threads"));

  module.def(
      "recurrent_mean_shift_backward",
      [](const Array& grad_shifted, const Array& points, const OptionalArray& mask,
         const OptionalArray& offsets, const Array& shifted, const Array& norms,
         const Array& denominators, const Array& grad, double bandwidth, double step,
         double tolerance, int threads) {
        const py::gil_scoped_release release;
        backward(grad_shifted, points, shifted, pointer(mask), pointer(offsets),
                 {bandwidth, step, tolerance}, {norms, denominators}, grad, threads);
      },
      py::arg("grad_shifted"), py::arg("points"), py::arg("mask"), py::arg("offsets"),
      py::arg("shifted"), py::arg("norms"), py::arg("denominators"), py::arg("grad"), py::kw_only(),
      py::arg("bandwidth"), py::arg("step"), py::arg("tolerance"), py::arg("threads"));
}

void bind_cosine_margin(py::module_& module) {
  using namespace cosine_margin;

  module.def(
      "cosine_margin_forward",
      [](const Array& points, const Array& labels, const OptionalArray& offsets,
         const OptionalArray& keys, const Array& losses, const OptionalArray& gradient,
         double fraction, int64_t most, double margin, bool squared,
         std::optional<int64_t> background, std::optional<int64_t> ignore_index, int threads) {
        const py::gil_scoped_release release;
        const Options options{
            {margin, squared}, {background, ignore_index}, {fraction, most}, threads};
        forward(points, labels, pointer(offsets), pointer(keys), options, losses,
                pointer(gradient));
      },
      py::arg("points"), py::arg("labels"), py::arg("offsets"), py::arg("keys"), py::arg("losses"),
      py::arg("gradient"), py::kw_only(), py::arg("fraction"), py::arg("most"), py::arg("margin"),
      py::arg("squared"), py::arg("background"), py::arg("ignore_index"), py::arg("threads"));
}

void bind_group_on_sphere(py::module_& module) {
  using namespace group_on_sphere;

  module.def(
      "group_on_sphere",
      [](const Array& points, const OptionalArray& mask, const OptionalArray& offsets,
         const Array& labels, double threshold, int64_t min_size, bool nearest, int threads) {
        const py::gil_scoped_release release;
        return group(points, pointer(mask), pointer(offsets), {threshold, min_size, nearest},
                     labels, threads);
      },
      py::arg("points"), py::arg("mask"), py::arg("offsets"), py::arg("labels"), py::kw_only(),
      py::arg("threshold"), py::arg("min_size"), py::arg("nearest"), py::arg("threads"));
}

void bind_group_keypoints(py::module_& module) {
  using namespace group_keypoints;

  module.def(
      "group_keypoints",
      [](const Array& heatmaps, const Array& tags, int64_t max_people, double peak_threshold,
         double tag_threshold, int64_t nms, const std::vector<int64_t>& joint_order, bool adjust,
         bool refine, const Array& keypoints, const Array& scores, const Array& person_tags,
         const Array& num_people, const Array& keypoint_scores, const Array& visibility,
         int threads) {
        const Options options{max_people,  peak_threshold, tag_threshold, nms,
                              joint_order, adjust,         refine};
        const py::gil_scoped_release release;
        group(heatmaps, tags, options,
              {keypoints, scores, person_tags, num_people, keypoint_scores, visibility}, threads);
      },
      py::arg("heatmaps"), py::arg("tags"), py::arg("max_people"), py::arg("peak_threshold"),
      py::arg("tag_threshold"), py::arg("nms"), py::arg("joint_order"), py::arg("adjust"),
      py::arg("refine"), py::arg("keypoints"), py::arg("scores"), py::arg("person_tags"),
      py::arg("num_people"), py::arg("keypoint_scores"), py::arg("visibility"), py::kw_only(),
      py::arg("threads"));

  module.def("match_keypoints", &match, py::arg("distances"), py::arg("scores"),
             py::arg("tag_threshold"), py::call_guard<py::gil_scoped_release>());

  module.def(
      "group_candidates",
      [](const Array& candidates, int64_t max_people, double tag_threshold,
         const std::vector<int64_t>& joint_order, const Array& pixels, const Array& people,
         const Array& num_people, int threads) {
        Options options;
        options.max_people = max_people;
        options.tag_threshold = tag_threshold;
        options.joint_order = joint_order;
        const py::gil_scoped_release release;
        group_candidates(candidates, options, pixels, people, num_people, threads);
      },
      py::arg("candidates"), py::arg("max_people"), py::arg("tag_threshold"),
      py::arg("joint_order"), py::arg("pixels"), py::arg("people"), py::arg("num_people"),
      py::kw_only(), py::arg("threads"));
}

void bind_label_statistics(py::module_& module) {
  using namespace label_statistics;

  py::class_<Result>(module, "LabelStatisticsResult")
      .def_property_readonly("largest", &Result::largest)
      .def("copy", &Result::copy, py::arg("ids"), py::arg("boxes"), py::arg("areas"),
           py::arg("centroids"), py::arg("num_instances"));

  module.def(
      "label_statistics",
      [](const Array& labels, std::optional<int64_t> background,
         std::optional<int64_t> ignore_index, int threads) {
        const py::gil_scoped_release release;
        return measure(labels, {background, ignore_index}, threads);
      },
      py::arg("labels"), py::kw_only(), py::arg("background"), py::arg("ignore_index"),
      py::arg("threads"));
}

void bind_instance_pool(py::module_& module) {
  using namespace instance_pool;

  py::enum_<Reduce>(module, "Reduce")
      .value("mean", Reduce::mean)
      .value("sum", Reduce::sum)
      .value("max", Reduce::max);

  py::class_<Instances>(module, "PoolInstances")
      .def(py::init([](const Array& labels, const OptionalArray& offsets,
                       std::optional<int64_t> background, std::optional<int64_t> ignore_index,
                       int threads) {
             const py::gil_scoped_release release;
             return std::make_unique<Instances>(labels, pointer(offsets),
                                                LabelRules{background, ignore_index}, threads);
           }),
           py::arg("labels"), py::arg("offsets"), py::kw_only(), py::arg("background"),
           py::arg("ignore_index"), py::arg("threads"))
      .def_property_readonly("largest", &Instances::largest)
      .def(
          "pool",
          [](const Instances& self, const Array& features, const OptionalArray& offsets,
             Reduce reduce, const Array& pooled, const Array& valid, const Array& ids,
             const Array& counts, const OptionalArray& argmax, int threads) {
            const py::gil_scoped_release release;
            self.pool(features, pointer(offsets), reduce,
                      {pooled, valid, ids, counts, pointer(argmax)}, threads);
          },
          py::arg("features"), py::arg("offsets"), py::arg("reduce"), py::arg("pooled"),
          py::arg("valid"), py::arg("ids"), py::arg("counts"), py::arg("argmax"), py::kw_only(),
          py::arg("threads"))
      .def(
          "spread",
          [](const Instances& self, const Array& grad, const OptionalArray& offsets, Reduce reduce,
             const Array& grad_features, int threads) {
            const py::gil_scoped_release release;
            self.spread(grad, pointer(offsets), reduce, grad_features, threads);
          },
          py::arg("grad"), py::arg("offsets"), py::arg("reduce"), py::arg("grad_features"),
          py::kw_only(), py::arg("threads"));

  module.def(
      "spread_max",
      [](const Array& grad, const Array& argmax, const OptionalArray& offsets,
         const Array& grad_features, int threads) {
        const py::gil_scoped_release release;
        spread_max(grad, argmax, pointer(offsets), grad_features, threads);
      },
      py::arg("grad"), py::arg("argmax"), py::arg("offsets"), py::arg("grad_features"),
      py::kw_only(), py::arg("threads"));
}

void bind_detections(py::module_& module) {
  using namespace detections;

  module.def("fill_masks", &fill_masks, py::arg("labels"), py::arg("ids"), py::arg("masks"),
             py::kw_only(), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  module.def(
      "encode_masks",
      [](const Array& labels, const Array& ids, int threads) {
        std::vector<std::string> texts;
        {
          const py::gil_scoped_release release;
          texts = encode_masks(labels, ids, threads);
        }
        py::list counts;
        for (const std::string& text : texts) counts.append(py::bytes(text));
        return counts;
      },
      py::arg("labels"), py::arg("ids"), py::kw_only(), py::arg("threads"));
}

void bind_gather_at(py::module_& module) {
  using namespace gather_at;

  module.def(
      "gather_at_forward",
      [](const Array& features, const Array& points, const OptionalArray& valid,
         const Array& values, bool linear, int threads) {
        const py::gil_scoped_release release;
        forward(features, {points, pointer(valid), linear}, values, threads);
      },
      py::arg("features"), py::arg("points"), py::arg("valid"), py::arg("values"), py::kw_only(),
      py::arg("linear"), py::arg("threads"));

  module.def(
      "gather_at_backward",
      [](const Array& grad_values, const Array& features, const Array& points,
         const OptionalArray& valid, const OptionalArray& grad_features,
         const OptionalArray& grad_points, bool linear, int threads) {
        const py::gil_scoped_release release;
        backward(grad_values, features, {points, pointer(valid), linear}, pointer(grad_features),
                 pointer(grad_points), threads);
      },
      py::arg("grad_values"), py::arg("features"), py::arg("points"), py::arg("valid"),
      py::arg("grad_features"), py::arg("grad_points"), py::kw_only(), py::arg("linear"),
      py::arg("threads"));
}

void bind_sample_pixels(py::module_& module) {
  using namespace sample_pixels;

  py::class_<Instances>(module, "SampleInstances")
      .def(py::init([](const Array& labels, const OptionalArray& offsets,
                       std::optional<int64_t> background, std::optional<int64_t> ignore_index,
                       int threads) {
             const py::gil_scoped_release release;
             return std::make_unique<Instances>(labels, pointer(offsets),
                                                LabelRules{background, ignore_index}, threads);
           }),
           py::arg("labels"), py::arg("offsets"), py::kw_only(), py::arg("background"),
           py::arg("ignore_index"), py::arg("threads"))
      .def_property_readonly("largest", &Instances::largest)
      .def("sample", &Instances::sample, py::arg("words"), py::arg("indices"), py::arg("valid"),
           py::kw_only(), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

void bind_pairwise_similarity(py::module_& module) {
  using namespace pairwise_similarity;

  module.def(
      "pairwise_similarity_forward",
      [](const Array& embeddings, const Array& indices, const Array& losses,
         const OptionalArray& slopes, int threads) {
        const py::gil_scoped_release release;
        forward(embeddings, indices, losses, pointer(slopes), threads);
      },
      py::arg("embeddings"), py::arg("indices"), py::arg("losses"), py::arg("slopes"),
      py::kw_only(), py::arg("threads"));

  module.def("pairwise_similarity_backward", &backward, py::arg("grad_losses"), py::arg("slopes"),
             py::arg("indices"), py::arg("grad"), py::kw_only(), py::arg("threads"),
             py::call_guard<py::gil_scoped_release>());
}

void bind_seeds(py::module_& module) {
  module.def(
      "seed_mask_iou",
      [](const Array& embeddings, const Array& labels, const Array& seeds,
         const std::vector<double>& squared_radii, const Array& iou,
         std::optional<int64_t> background, std::optional<int64_t> ignore_index, int threads) {
        const py::gil_scoped_release release;
        seeds::mask_iou(embeddings, labels, seeds, squared_radii, {background, ignore_index}, iou,
                        threads);
      },
      py::arg("embeddings"), py::arg("labels"), py::arg("seeds"), py::arg("squared_radii"),
      py::arg("iou"), py::kw_only(), py::arg("background"), py::arg("ignore_index"),
      py::arg("threads"));

  module.def(
      "select_seeds",
      [](const Array& embeddings, const Array& seediness, const OptionalArray& mask,
         const Array& indices, const Array& scores, double diversity, double min_seediness,
         int threads) {
        const py::gil_scoped_release release;
        seeds::select(embeddings, seediness, pointer(mask), {diversity, min_seediness}, indices,
                      scores, threads);
      },
      py::arg("embeddings"), py::arg("seediness"), py::arg("mask"), py::arg("indices"),
      py::arg("scores"), py::kw_only(), py::arg("diversity"), py::arg("min_seediness"),
      py::arg("threads"));

  module.def(
      "grow_seeds",
      [](const Array& embeddings, const OptionalArray& mask, const Array& seeds,
         const Array& scores, const Array& squared_radii, const Array& labels, const Array& order,
         const Array& counts, const Array& num_instances, int64_t min_size, double overlap,
         int threads) {
        const py::gil_scoped_release release;
        seeds::grow(embeddings, pointer(mask), seeds, scores, squared_radii, {min_size, overlap},
                    labels, order, counts, num_instances, threads);
      },
      py::arg("embeddings"), py::arg("mask"), py::arg("seeds"), py::arg("scores"),
      py::arg("squared_radii"), py::arg("labels"), py::arg("order"), py::arg("counts"),
      py::arg("num_instances"), py::kw_only(), py::arg("min_size"), py::arg("overlap"),
      py::arg("threads"));
}

}  // namespace

PYBIND11_MODULE(_core, module, py::mod_gil_not_used()) {
  module.doc() = "The native core of instembed. Private: use the functions of the package.";
  module.attr("version") = INSTEMBED_VERSION;
#if defined(INSTEMBED_CUDA)
  module.attr("cuda") = true;
  python::bind_cuda(module);
#else
  module.attr("cuda") = false;
#endif
  bind_associative_embedding(module);
  bind_discriminative(module);
  bind_mean_shift(module);
  bind_cosine_margin(module);
  bind_recurrent_mean_shift(module);
  bind_group_on_sphere(module);
  bind_group_keypoints(module);
  bind_label_statistics(module);
  bind_instance_pool(module);
  bind_detections(module);
  bind_gather_at(module);
  bind_sample_pixels(module);
  bind_pairwise_similarity(module);
  bind_seeds(module);
}

}  // namespace instembed
