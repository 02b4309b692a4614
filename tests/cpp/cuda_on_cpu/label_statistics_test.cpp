// Label statistics on the simulated device against the CPU kernel, which the Python tests hold to
// its reference.
#include "cuda_on_cpu/tests.h"
#include "label_statistics/cuda.h"

namespace instembed {

namespace {

constexpr uint64_t kEmptyKey = 0x7fff2d6b9c4e1a85u;  // of common/id_table.cuh

struct Tables {
  Buffer ids, boxes, areas, centroids, num_instances;

  Tables(int64_t images, int64_t capacity, int64_t axes)
      : ids(DType::i64, {images, capacity}),
        boxes(DType::f32, {images, capacity, 2 * axes}),
        areas(DType::i64, {images, capacity}),
        centroids(DType::f32, {images, capacity, axes}),
        num_instances(DType::i64, {images}) {}

  bool operator==(const Tables& other) const {
    return same_bits(ids, other.ids) && same_bits(boxes, other.boxes) &&
           same_bits(areas, other.areas) && same_bits(centroids, other.centroids) &&
           same_bits(num_instances, other.num_instances);
  }
};

Tables measure(const Array& labels, const LabelRules& rules, int64_t capacity) {
  Tables result(labels.shape[0], capacity, labels.ndim - 1);
  Buffer workspace(DType::u8, {label_statistics::cuda_workspace(labels, capacity)});
  label_statistics::measure_cuda(labels, rules, result.ids, result.boxes, result.areas,
                                 result.centroids, result.num_instances, workspace, 0);
  return result;
}

void check(const Array& labels, const LabelRules& rules, int64_t spare, int schedules) {
  const auto found = label_statistics::measure(labels, rules, 1);
  const int64_t capacity = std::max<int64_t>(found.largest() + spare, 1);
  if (capacity < found.largest()) return;
  Tables expected(labels.shape[0], capacity, labels.ndim - 1);
  found.copy(expected.ids, expected.boxes, expected.areas, expected.centroids,
             expected.num_instances);
  for_schedules(schedules, [&] { CHECK(measure(labels, rules, capacity) == expected); });
}

}  // namespace

void test_label_statistics(int schedules) {
  for (const auto& shape : std::vector<std::vector<int64_t>>{{2, 1},
                                                             {1, 33},
                                                             {2, 5000},
                                                             {3, 7, 31},
                                                             {1, 1, 64},
                                                             {1, 64, 1},
                                                             {2, 40, 130},
                                                             {1, 3, 5, 9},
                                                             {1, 20, 11, 12},
                                                             {0, 3, 4},
                                                             {2, 0, 4}}) {
    for (const int64_t run : {1, 7, 400}) {
      Buffer labels = make_labels(shape, draw(1, 30), run);
      check(labels, {0, std::nullopt}, draw(0, 2) * 20, schedules);
    }
  }
  Buffer many = make_labels({1, 60, 70}, 100000, 1);
  check(many, {std::nullopt, std::nullopt}, 0, schedules);

  Buffer hard(DType::i64, {2, 9, 50});  // the id of an empty place, and ids at the ends
  const int64_t ids[] = {static_cast<int64_t>(kEmptyKey),
                         ~static_cast<int64_t>(kEmptyKey),
                         INT64_MIN,
                         INT64_MAX,
                         -1,
                         0,
                         1};
  for (int64_t i = 0; i < hard.size(); ++i) hard.as<int64_t>()[i] = ids[draw(0, 6)];
  check(hard, {0, -1}, 3, schedules);
  check(hard, {static_cast<int64_t>(kEmptyKey), std::nullopt}, 0, schedules);

  for (const DType type : {DType::i8, DType::i16, DType::i32, DType::u8, DType::u16, DType::u32}) {
    Buffer small(type, {1, 13, 17});
    std::memset(small.as<char>(), 0, small.bytes());
    const int64_t width = item_size(type);
    for (int64_t i = 0; i < small.size(); ++i) {
      small.as<uint8_t>()[i * width + draw(0, width - 1)] = static_cast<uint8_t>(draw(0, 255));
    }
    check(small, {0, std::nullopt}, 0, schedules);
  }

  Buffer whole = make_labels({2, 20, 33}, 9, 5);  // rows of a transposed, cropped view
  Array view = whole;
  view.shape = {2, 30, 19};
  std::swap(view.strides[1], view.strides[2]);
  check(view, {0, std::nullopt}, 0, schedules);

  const auto overflow = label_statistics::measure(many, {}, 1).largest();
  for_schedules(schedules, [&] {
    Tables result = measure(many, {}, overflow - 1);
    CHECK(result.num_instances.as<int64_t>()[0] == overflow);
    for (int64_t k = 0; k < result.areas.size(); ++k) CHECK(result.areas.as<int64_t>()[k] == 0);
  });
  for_schedules(schedules, [&] {
    Tables result = measure(many, {}, 3);
    CHECK(result.num_instances.as<int64_t>()[0] == 4);
  });
}

}  // namespace instembed
