// Sampled pixels on the simulated device against the CPU kernel, which the Python tests hold to its
// reference.
#include <numeric>

#include "cuda_on_cpu/tests.h"
#include "sample_pixels/cuda.h"
#include "sample_pixels/formula.h"

namespace instembed {

namespace {

using namespace sample_pixels;

struct Sample {
  Buffer indices, valid;

  Sample(int64_t images, int64_t capacity, int64_t samples)
      : indices(DType::i64, {images, capacity, samples}),
        valid(DType::u8, {images, capacity, samples}) {}
};

Sample sample(const Array& labels, const Array* offsets, const LabelRules& rules,
              const Buffer& words, int64_t capacity, int64_t samples) {
  Sample result(words.size(), capacity, samples);
  Buffer workspace(DType::u8, {cuda_workspace(labels, offsets, capacity, samples)});
  sample_cuda(labels, offsets, rules, words, result.indices, result.valid, workspace, 0);
  return result;
}

Buffer draw_words(int64_t images) {
  Buffer words(DType::i64, {images});
  for (int64_t b = 0; b < images; ++b) words.as<uint64_t>()[b] = generator();
  return words;
}

// `spare`: capacity beyond the instances, which is at least 1.
void check(const Array& labels, const Array* offsets, const LabelRules& rules, const Buffer& words,
           int64_t samples, int64_t spare, int schedules) {
  const Instances instances(labels, offsets, rules, 1);
  const int64_t capacity = std::max<int64_t>(instances.largest() + spare, 1);
  Sample expected(words.size(), capacity, samples);
  instances.sample(words, expected.indices, expected.valid, 1);
  for_schedules(schedules, [&] {
    const Sample got = sample(labels, offsets, rules, words, capacity, samples);
    CHECK(same_bits(got.indices, expected.indices));
    CHECK(same_bits(got.valid, expected.valid));
  });
}

// Labels 1 at the pixels with the smallest keys of all, or the largest, and 2 elsewhere: more
// candidates than a sample makes one expect, or too few.
void check_unlikely(bool smallest, int64_t samples, int schedules) {
  constexpr int64_t kPixels = 2000, kOwn = 400;
  Buffer words = draw_words(2), labels(DType::u8, {2, kPixels});
  for (int64_t b = 0; b < 2; ++b) {
    const uint64_t word = words.as<uint64_t>()[b];
    std::vector<int64_t> order(kPixels);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
      return smallest ? key(word, i) < key(word, j) : key(word, i) > key(word, j);
    });
    for (int64_t k = 0; k < kPixels; ++k) {
      labels.as<uint8_t>()[b * kPixels + order[k]] = k < kOwn ? 1 : 2;
    }
  }
  check(labels, nullptr, {}, words, samples, 0, schedules);
}

}  // namespace

void test_sample_pixels(int schedules) {
  for (const auto& shape :
       std::vector<std::vector<int64_t>>{{2, 1}, {1, 33}, {3, 700}, {1, 3000}, {0, 9}, {2, 0}}) {
    for (const int64_t run : {1, 20}) {
      for (const int64_t samples : {1, 16, 300}) {
        const Buffer labels = make_labels(shape, draw(1, 30), run);
        check(labels, nullptr, {0, std::nullopt}, draw_words(shape[0]), samples, draw(0, 2),
              schedules);
      }
    }
  }
  const Buffer labels = make_labels({1, 2000}, 6, 9);
  Buffer offsets(DType::i64, {6});
  const int64_t bounds[] = {0, 0, 45, 45, 1500, 2000};
  std::copy(bounds, bounds + 6, offsets.as<int64_t>());
  check(labels, &offsets, {std::nullopt, int64_t{1} << 40}, draw_words(5), 12, 3, schedules);

  for (const DType type : {DType::i8, DType::i16, DType::i32, DType::u8, DType::u16, DType::u32}) {
    Buffer small(type, {2, 300});
    std::memset(small.as<char>(), 0, small.bytes());
    for (int64_t i = 0; i < small.size(); ++i) {
      small.as<uint8_t>()[(i + 1) * item_size(type) - 1] = static_cast<uint8_t>(draw(124, 132));
    }
    check(small, nullptr, {}, draw_words(2), 16, 0, schedules);
  }
  Array view = labels;  // every other pixel
  view.shape[1] /= 2;
  view.strides[1] = 2;
  check(view, nullptr, {0, std::nullopt}, draw_words(1), 16, 0, schedules);

  check_unlikely(true, 1, schedules);
  check_unlikely(true, 16, schedules);
  check_unlikely(false, 16, schedules);

  const Buffer many = make_labels({2, 500}, 100000, 1);
  for_schedules(schedules, [&] {
    const Sample got = sample(many, nullptr, {}, draw_words(2), 100, 4);
    for (int64_t k = 0; k < got.indices.size(); ++k) {
      CHECK(static_cast<const Array&>(got.indices).as<int64_t>()[k] == kTooMany);
      CHECK(static_cast<const Array&>(got.valid).as<uint8_t>()[k] == 0);
    }
  });
  offsets.as<int64_t>()[2] = 2001;
  for_schedules(schedules, [&] {
    const Sample got = sample(labels, &offsets, {}, draw_words(5), 10, 4);
    for (int64_t k = 0; k < got.indices.size(); ++k) {
      CHECK(static_cast<const Array&>(got.indices).as<int64_t>()[k] == kTooMany);
    }
  });
}

}  // namespace instembed
