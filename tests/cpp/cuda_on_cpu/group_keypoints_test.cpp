// Grouping of keypoints on the simulated device against the CPU's, which the Python tests hold to
// its reference: the same bits.
#include <numeric>

#include "cuda_on_cpu/tests.h"
#include "group_keypoints/cuda.h"

namespace instembed {

namespace {

using namespace group_keypoints;

struct Case {
  DType heat = DType::f32, tag = DType::f32;
  int64_t images = 2, joints = 4, dims = 1, height = 13, width = 17;
  bool strided = false, bad = false;
  Options options;
};

struct Found {
  Buffer keypoints, scores, tags, num_people, keypoint_scores, visibility;

  Found(const Case& c, DType type)
      : keypoints(type, {c.images, c.options.max_people, c.joints, 2}),
        scores(type, {c.images, c.options.max_people}),
        tags(type, {c.images, c.options.max_people, c.dims}),
        num_people(DType::i64, {c.images}),
        keypoint_scores(type, {c.images, c.options.max_people, c.joints}),
        visibility(DType::u8, {c.images, c.options.max_people, c.joints}) {}
};

void fill(Buffer& maps, DType dtype, double low, double step, int64_t steps, bool bad) {
  dispatch_floating(dtype, "test", [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < maps.size(); ++i) {
      double number = low + step * static_cast<double>(draw(0, steps));
      if (bad && draw(0, 20) == 0) number = draw(0, 1) ? std::nan("") : -1 / 0.0 * draw(-1, 1);
      maps.as<T>()[i] = ::instembed::rounded<T>(number);
    }
  });
}

void check(const Case& c, int schedules) {
  const std::vector<int> layout =
      c.strided ? std::vector<int>{2, 0, 3, 1} : std::vector<int>{0, 1, 2, 3};
  Buffer heatmaps(c.heat, {c.images, c.joints, c.height, c.width}, layout);
  Buffer tags(c.tag, {c.images, c.joints * c.dims, c.height, c.width}, layout);
  fill(heatmaps, c.heat, -0.4, 0.1, 13, c.bad);  // few values: many are equal
  fill(tags, c.tag, 0, 0.5, 5, c.bad);
  Options options = c.options;
  options.joint_order.resize(c.joints);
  std::iota(options.joint_order.rbegin(), options.joint_order.rend(), 0);

  const DType type = sums_of(c.heat);
  Found expected(c, type);
  group(heatmaps, tags, options,
        {expected.keypoints, expected.scores, expected.tags, expected.num_people,
         expected.keypoint_scores, expected.visibility},
        1);

  const int64_t people_of_all = c.images * options.max_people;
  for_schedules(schedules, [&] {
    Found got(c, type);
    Buffer candidates(DType::f64, {c.images, c.joints, options.max_people, 2 + c.dims});
    Buffer workspace(DType::u8, {cuda_workspace(heatmaps)});
    find_candidates_cuda(heatmaps, tags, options, candidates, workspace, 0);
    Buffer pixels(DType::i64, {people_of_all * c.joints});
    Buffer people(DType::f64, {people_of_all * (1 + c.dims)});
    group_candidates(candidates, options, pixels, people, got.num_people, 1);
    finish_cuda(heatmaps, tags, options, pixels, people, got.num_people, got.keypoints,
                got.keypoint_scores, got.visibility, 0);
    CHECK(same_bits(got.num_people, expected.num_people));
    CHECK(same_bits(got.visibility, expected.visibility));
    CHECK(same_bits(got.keypoints, expected.keypoints));
    CHECK(same_bits(got.keypoint_scores, expected.keypoint_scores));
    for (int64_t row = 0; row < people_of_all; ++row) {
      const double* person = people.as<double>() + row * (1 + c.dims);
      const double score = value(expected.scores, type, row);
      CHECK(type == DType::f64 ? person[0] == score : static_cast<float>(person[0]) == score);
    }
  });
}

}  // namespace

void test_group_keypoints(int schedules) {
  for (const DType heat : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    for (const bool bad : {false, true}) {
      Case c;
      c.heat = heat;
      c.tag = bad ? DType::f16 : DType::f64;
      c.dims = bad ? 3 : 1;
      c.strided = bad;
      c.bad = bad;
      check(c, schedules);
    }
  }
  for (const int64_t nms : {1, 3, 99}) {
    Case c;
    c.options.nms = nms;
    c.options.peak_threshold = 0.8;
    c.options.max_people = nms == 1 ? 300 : 5;  // more candidates than threads
    c.images = nms == 1 ? 1 : 2;
    c.joints = nms == 1 ? 2 : 4;
    check(c, schedules);
  }
  for (const int64_t people : {1, 31, 33, 70}) {  // groups of people and of warps
    Case c;
    c.options.max_people = people;
    c.options.tag_threshold = 0.3;
    c.options.refine = people != 31;
    c.options.adjust = people != 33;
    check(c, schedules);
  }
  for (const int64_t width : {1, 300}) {
    Case c;
    c.height = width == 1 ? 40 : 1;
    c.width = width;
    c.joints = 1;
    check(c, schedules);
  }
  Case large;  // several pixels a thread, of all warps
  large.images = 1;
  large.height = 19;
  large.width = 27;
  large.dims = 2;
  large.options.max_people = 7;
  check(large, schedules);
  Case nothing;
  nothing.options.peak_threshold = 5;
  check(nothing, schedules);
  nothing.height = 0;
  check(nothing, schedules);
  nothing.images = 0;
  check(nothing, schedules);
}

}  // namespace instembed
