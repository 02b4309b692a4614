// Grouping of keypoints on the CPU: candidates of each map, people of each image, then the joints
// that are still missing, map by map.
#include <algorithm>
#include <string>

#include "common/dtype.h"
#include "common/parallel.h"
#include "group_keypoints/group_keypoints.h"
#include "group_keypoints/maps.h"
#include "group_keypoints/peaks.h"
#include "group_keypoints/people.h"
#include "group_keypoints/refine.h"

namespace instembed::group_keypoints {
namespace {

// A quarter of a pixel towards the higher of two neighbours.
double quarter(double before, double after) {
  if (!std::isfinite(before) || !std::isfinite(after) || before == after) return 0;
  return after > before ? 0.25 : -0.25;
}

struct Point {
  double x, y;
};

Point place(const Maps& maps, int64_t b, int64_t k, int64_t pixel, bool adjust) {
  const int64_t width = maps.width(), x = pixel % width, y = pixel / width;
  Point point{static_cast<double>(x), static_cast<double>(y)};
  if (adjust && x > 0 && x + 1 < width) {
    point.x += quarter(maps.at(b, k, pixel - 1), maps.at(b, k, pixel + 1));
  }
  if (adjust && y > 0 && y + 1 < maps.height()) {
    point.y += quarter(maps.at(b, k, pixel - width), maps.at(b, k, pixel + width));
  }
  return point;
}

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
      const Point point = place(heatmaps, b, k, joint.pixel, options.adjust);
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
  expect(people >= 1, "max_people: expected at least 1");
  expect(options.nms >= 1 && options.nms % 2 == 1, "nms: expected an odd number");
  expect(options.peak_threshold >= 0 && options.tag_threshold >= 0,
         "thresholds: expected numbers from 0 on");
  std::vector<int64_t> order = options.joint_order;
  std::sort(order.begin(), order.end());
  bool permutation = static_cast<int64_t>(order.size()) == joints;
  for (int64_t k = 0; permutation && k < joints; ++k) permutation = order[k] == k;
  expect(permutation, "joint_order: expected every joint once");
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

}  // namespace instembed::group_keypoints
