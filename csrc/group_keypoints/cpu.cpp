// Grouping of keypoints on the CPU: candidates of each map, people of each image, then the joints
// that are still missing, map by map.
#include <algorithm>
#include <string>

#include "common/dtype.h"
#include "common/parallel.h"
#include "group_keypoints/formula.h"
#include "group_keypoints/group_keypoints.h"
#include "group_keypoints/maps.h"
#include "group_keypoints/peaks.h"
#include "group_keypoints/people.h"
#include "group_keypoints/refine.h"

namespace instembed::group_keypoints {
namespace {

template <class A>
void write_image(const Maps& heatmaps, int64_t b, const std::vector<Person>& people,
                 const Options& options, const Poses& poses) {
  const int64_t joints = heatmaps.channels(), dims = poses.tags.shape[2];
  for (int64_t p = 0; p < static_cast<int64_t>(people.size()); ++p) {
    const int64_t row = b * options.max_people + p;
    poses.scores.as<A>()[row] = static_cast<A>(people[p].score);
    for (int64_t d = 0; d < dims; ++d) {
      poses.tags.as<A>()[row * dims + d] = static_cast<A>(people[p].tag[d]);
    }
    for (int64_t k = 0; k < joints; ++k) {
      const Peak& joint = people[p].joints[k];
      if (joint.pixel < 0) continue;
      const Point point = place([&](int64_t pixel) { return heatmaps.at(b, k, pixel); },
                                joint.pixel, heatmaps.height(), heatmaps.width(), options.adjust);
      const int64_t at = row * joints + k;
      poses.keypoints.as<A>()[2 * at] = static_cast<A>(point.x);
      poses.keypoints.as<A>()[2 * at + 1] = static_cast<A>(point.y);
      poses.keypoint_scores.as<A>()[at] = static_cast<A>(joint.score);
      poses.visibility.as<uint8_t>()[at] = people[p].visibility[k];
    }
  }
  poses.num_people.as<int64_t>()[b] = static_cast<int64_t>(people.size());
}

template <class A>
void group_image(const Maps& heatmaps, const Maps& tags, int64_t b, const Options& options,
                 const Poses& poses, int threads) {
  const int64_t joints = heatmaps.channels(), dims = tags.channels() / joints;
  std::vector<Candidates> candidates(joints);
  parallel_for(joints, threads,
               [&](int64_t k) { candidates[k] = find_candidates(heatmaps, tags, b, k, options); });
  std::vector<Person> people = group_people(candidates.data(), joints, dims, options);
  if (options.refine) {
    parallel_for(joints, threads, [&](int64_t k) {
      find_missing(heatmaps, tags, b, k, candidates[k].highest, &people);
    });
  }
  write_image<A>(heatmaps, b, people, options, poses);
}

template <class A>
void clear(const Array& array) {
  std::fill_n(array.as<A>(), array.size(), A(0));
}

void check_options(const Options& options, int64_t joints) {
  expect(options.max_people >= 1, "max_people: expected at least 1");
  expect(options.nms >= 1 && options.nms % 2 == 1, "nms: expected an odd number");
  expect(options.peak_threshold >= 0 && options.tag_threshold >= 0,
         "thresholds: expected numbers from 0 on");
  std::vector<int64_t> order = options.joint_order;
  std::sort(order.begin(), order.end());
  bool permutation = static_cast<int64_t>(order.size()) == joints;
  for (int64_t k = 0; permutation && k < joints; ++k) permutation = order[k] == k;
  expect(permutation, "joint_order: expected every joint once");
}

void check(const Array& heatmaps, const Array& tags, const Options& options, const Poses& poses) {
  expect(heatmaps.ndim == 4 && tags.ndim == 4, "maps: expected (images, channels, height, width)");
  const int64_t images = heatmaps.shape[0], joints = heatmaps.shape[1], people = options.max_people;
  expect(joints > 0, "heatmaps: expected at least one joint");
  expect(tags.shape[0] == images && tags.shape[1] > 0 && tags.shape[1] % joints == 0 &&
             tags.shape[2] == heatmaps.shape[2] && tags.shape[3] == heatmaps.shape[3],
         "tags: expected the heatmaps' shape, with one or more channels for each joint");
  for (const Array* maps : {&heatmaps, &tags}) {
    dispatch_floating(maps->dtype, "maps", [](auto) {});
  }
  check_options(options, joints);
  const DType type = heatmaps.dtype == DType::f64 ? DType::f64 : DType::f32;
  const int64_t rows = images * people;
  expect(poses.tags.ndim == 3 && poses.tags.shape[2] == tags.shape[1] / joints,
         "tags of people: expected (images, people, dimensions)");
  expect_contiguous(poses.keypoints, type, rows * joints * 2, "keypoints");
  expect_contiguous(poses.scores, type, rows, "scores");
  expect_contiguous(poses.tags, type, rows * poses.tags.shape[2], "tags of people");
  expect_contiguous(poses.num_people, DType::i64, images, "num_people");
  expect_contiguous(poses.keypoint_scores, type, rows * joints, "keypoint_scores");
  expect_contiguous(poses.visibility, DType::u8, rows * joints, "visibility");
}

}  // namespace

void group(const Array& heatmap_array, const Array& tag_array, const Options& options,
           const Poses& poses, int threads) {
  check(heatmap_array, tag_array, options, poses);
  const Maps heatmaps{heatmap_array}, tags{tag_array};
  const bool exact = heatmap_array.dtype == DType::f64;
  for (const Array* array :
       {&poses.keypoints, &poses.scores, &poses.tags, &poses.keypoint_scores}) {
    exact ? clear<double>(*array) : clear<float>(*array);
  }
  clear<uint8_t>(poses.visibility);
  // Images side by side, which keeps an image's maps in a core's cache; few images one after the
  // other, each by all threads.
  const int64_t images = heatmaps.images();
  const bool side_by_side = threads > 0 && (images % threads == 0 || images >= 4 * threads);
  parallel_for(images, side_by_side ? threads : 1, [&](int64_t b) {
    const int inner = side_by_side ? 1 : threads;
    exact ? group_image<double>(heatmaps, tags, b, options, poses, inner)
          : group_image<float>(heatmaps, tags, b, options, poses, inner);
  });
}

void group_candidates(const Array& candidates, const Options& options, const Array& pixels,
                      const Array& people, const Array& num_people, int threads) {
  expect(candidates.ndim == 4 && candidates.shape[3] >= 3,
         "candidates: expected (images, joints, candidates, 2 + dimensions of a tag)");
  const int64_t images = candidates.shape[0], joints = candidates.shape[1];
  const int64_t most = candidates.shape[2], row = candidates.shape[3], dims = row - 2;
  expect(joints > 0, "candidates: expected at least one joint");
  check_options(options, joints);
  const int64_t places = images * options.max_people;
  expect_contiguous(candidates, DType::f64, candidates.size(), "candidates");
  expect_contiguous(pixels, DType::i64, places * joints, "pixels");
  expect_contiguous(people, DType::f64, places * (1 + dims), "people");
  expect_contiguous(num_people, DType::i64, images, "num_people");
  std::fill_n(pixels.as<int64_t>(), pixels.size(), -1);
  clear<double>(people);
  parallel_for(images, threads, [&](int64_t b) {
    std::vector<Candidates> of_joints(joints);
    for (int64_t k = 0; k < joints; ++k) {
      const double* from = candidates.as<const double>() + (b * joints + k) * most * row;
      for (int64_t i = 0; i < most && from[1] >= 0; ++i, from += row) {
        of_joints[k].peaks.push_back({from[0], static_cast<int64_t>(from[1])});
        of_joints[k].tags.insert(of_joints[k].tags.end(), from + 2, from + row);
      }
    }
    const std::vector<Person> found = group_people(of_joints.data(), joints, dims, options);
    for (size_t p = 0; p < found.size(); ++p) {
      const int64_t at = b * options.max_people + static_cast<int64_t>(p);
      double* person = people.as<double>() + at * (1 + dims);
      person[0] = found[p].score;
      std::copy(found[p].tag.begin(), found[p].tag.end(), person + 1);
      for (int64_t k = 0; k < joints; ++k) {
        pixels.as<int64_t>()[at * joints + k] = found[p].joints[k].pixel;
      }
    }
    num_people.as<int64_t>()[b] = static_cast<int64_t>(found.size());
  });
}

}  // namespace instembed::group_keypoints
