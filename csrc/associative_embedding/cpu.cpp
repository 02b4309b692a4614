// Associative embedding on the CPU. Only the tags at joints are read, in double; a person's row of
// the push term is a loop over all other people, so that its gradient needs no sums across tasks.
#include <algorithm>
#include <string>
#include <vector>

#include "associative_embedding/associative_embedding.h"
#include "associative_embedding/sizes.h"
#include "common/dtype.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/points.h"

namespace instembed::associative_embedding {
namespace {

constexpr int64_t kPeople = 16;  // a task

// Runs f(image, person) for all of them.
template <class F>
void for_people(const Sizes& sizes, int threads, F&& f) {
  const int64_t blocks = (sizes.people + kPeople - 1) / kPeople;
  parallel_for(sizes.images * blocks, threads, [&](int64_t task) {
    const int64_t b = task / blocks, first = task % blocks * kPeople;
    for (int64_t n = first; n < std::min(first + kPeople, sizes.people); ++n) f(b, n);
  });
}

// Where the tag of a joint lies, in a map or gathered.
class Place {
 public:
  Place(const Array& array, const Sizes& sizes, bool gathered)
      : strides_(array.strides), gathered_(gathered), tag_(sizes.tag), width_(array.shape[3]) {}

  int64_t operator()(int64_t b, int64_t n, int64_t k, int64_t pixel) const {
    if (gathered_) return b * strides_[0] + n * strides_[1] + k * strides_[2];
    return b * strides_[0] + k * tag_ * strides_[1] + pixel / width_ * strides_[2] +
           pixel % width_ * strides_[3];
  }

  int64_t step() const { return strides_[gathered_ ? 3 : 1]; }  // between channels of a tag

 private:
  std::array<int64_t, Array::kMaxDims> strides_;
  bool gathered_;
  int64_t tag_, width_;
};

// The pixel of every joint that counts, -1 for the others.
class Locator {
 public:
  Locator(const Array& tags, const Array* keypoints, const Array& visible)
      : visible_(visible), is_visible_(reader(visible.dtype)), keypoints_(keypoints) {
    if (!keypoints) return;
    coordinate_ = reader(keypoints->dtype);
    height_ = tags.shape[2];
    width_ = tags.shape[3];
  }

  int64_t operator()(int64_t b, int64_t n, int64_t k) const {
    const auto& flag = visible_.strides;
    if (!(is_visible_(visible_.data, b * flag[0] + n * flag[1] + k * flag[2]) > 0)) return -1;
    if (!keypoints_) return 0;
    const auto& stride = keypoints_->strides;
    const int64_t at = b * stride[0] + n * stride[1] + k * stride[2];
    const int64_t x = nearest_pixel(coordinate_(keypoints_->data, at), width_);
    const int64_t y = nearest_pixel(coordinate_(keypoints_->data, at + stride[3]), height_);
    return x < 0 || y < 0 ? -1 : y * width_ + x;
  }

 private:
  const Array& visible_;
  Reader is_visible_;
  const Array* keypoints_;
  Reader coordinate_ = nullptr;
  int64_t height_ = 0, width_ = 0;
};

// Joints that count of each person, and people that have one of each image.
struct Counts {
  std::vector<int64_t> joints, people;

  Counts(const int64_t* pixels, const Sizes& sizes)
      : joints(sizes.images * sizes.people), people(sizes.images) {
    for (int64_t row = 0; row < static_cast<int64_t>(joints.size()); ++row) {
      const int64_t* of_person = pixels + row * sizes.joints;
      joints[row] = sizes.joints - std::count(of_person, of_person + sizes.joints, -1);
      people[row / sizes.people] += joints[row] > 0;
    }
  }
};

// The mean of a person's tags goes to `mean`; returns the mean square of their distances from it.
template <class T>
double pull(const T* tags, const Place& place, const Sizes& sizes, int64_t b, int64_t n,
            const int64_t* pixels, double* mean) {
  const int64_t step = place.step();
  std::fill_n(mean, sizes.tag, 0.0);
  int64_t count = 0;
  for (int64_t k = 0; k < sizes.joints; ++k) {
    if (pixels[k] < 0) continue;
    const T* tag = tags + place(b, n, k, pixels[k]);
    for (int64_t l = 0; l < sizes.tag; ++l) mean[l] += tag[l * step];
    ++count;
  }
  if (count == 0) return 0;
  for (int64_t l = 0; l < sizes.tag; ++l) mean[l] /= static_cast<double>(count);
  double sum = 0;
  for (int64_t k = 0; k < sizes.joints; ++k) {
    if (pixels[k] < 0) continue;
    const T* tag = tags + place(b, n, k, pixels[k]);
    for (int64_t l = 0; l < sizes.tag; ++l) {
      const double difference = tag[l * step] - mean[l];
      sum += difference * difference;
    }
  }
  return sum / static_cast<double>(count);
}

// What all others of the image push person n with; the gradient, of the sum over both orders of
// each pair, halved, goes to `gradient`.
double push_of(const Push& push, const Sizes& sizes, int64_t n, const double* means,
               const int64_t* joints, double* gradient) {
  const double* own = means + n * sizes.tag;
  double sum = 0;
  for (int64_t m = 0; m < sizes.people; ++m) {
    if (m == n || joints[m] == 0) continue;
    const double* other = means + m * sizes.tag;
    double square = 0;
    for (int64_t l = 0; l < sizes.tag; ++l) square += (own[l] - other[l]) * (own[l] - other[l]);
    const Push::Pair pair = push(square);
    sum += pair.value;
    for (int64_t l = 0; l < sizes.tag; ++l) gradient[l] += pair.slope * (own[l] - other[l]);
  }
  return sum;
}

}  // namespace

void forward(const Array& tags, const Array* keypoints, const Array& visible, const Push& push,
             const Array& terms, const State& state, int threads) {
  const Sizes sizes = checked_sizes(tags, visible, keypoints == nullptr);
  if (keypoints) {
    const auto& shape = keypoints->shape;
    expect(keypoints->ndim == 4 && shape[0] == sizes.images && shape[1] == sizes.people &&
               shape[2] == sizes.joints && shape[3] == 2,
           "keypoints: expected (images, people, joints, 2)");
  }
  check_state(state, sizes);
  const bool wide = tags.dtype == DType::f64;
  expect_contiguous(terms, wide ? DType::f64 : DType::f32, sizes.images * kTerms, "terms");

  const Locator locate(tags, keypoints, visible);
  const Place place(tags, sizes, keypoints == nullptr);
  auto* pixels = state.pixels.as<int64_t>();
  auto* means = state.means.as<double>();
  auto* gradients = state.pushes.as<double>();
  std::vector<double> pulls(sizes.images * sizes.people), pushes(pulls.size());

  dispatch_floating(tags.dtype, "tags", [&](auto type) {
    using T = decltype(type);
    for_people(sizes, threads, [&](int64_t b, int64_t n) {
      const int64_t row = b * sizes.people + n;
      int64_t* own = pixels + row * sizes.joints;
      for (int64_t k = 0; k < sizes.joints; ++k) own[k] = locate(b, n, k);
      pulls[row] = pull(tags.as<const T>(), place, sizes, b, n, own, means + row * sizes.tag);
    });
  });

  const Counts counts(pixels, sizes);
  for_people(sizes, threads, [&](int64_t b, int64_t n) {
    const int64_t first = b * sizes.people, row = first + n;
    double* gradient = gradients + row * sizes.tag;
    std::fill_n(gradient, sizes.tag, 0.0);
    if (counts.joints[row] == 0 || counts.people[b] < 2) return;
    pushes[row] =
        push_of(push, sizes, n, means + first * sizes.tag, &counts.joints[first], gradient);
    const auto people = static_cast<double>(counts.people[b]);
    for (int64_t l = 0; l < sizes.tag; ++l) gradient[l] /= people * (people - 1);
  });

  for (int64_t b = 0; b < sizes.images; ++b) {
    double values[kTerms] = {};
    for (int64_t n = 0; n < sizes.people; ++n) {
      values[0] += pulls[b * sizes.people + n];
      values[1] += pushes[b * sizes.people + n];
    }
    const auto people = static_cast<double>(counts.people[b]);
    if (people > 0) values[0] /= people;
    if (people > 1) values[1] *= 0.5 / (people * (people - 1));
    for (int t = 0; t < kTerms; ++t) {
      if (wide) {
        terms.as<double>()[b * kTerms + t] = values[t];
      } else {
        terms.as<float>()[b * kTerms + t] = static_cast<float>(values[t]);
      }
    }
  }
}

void backward(const Array& grad_terms, const Array& tags, const State& state, bool gathered,
              const Array& grad, int threads) {
  const Sizes sizes = checked_sizes(tags, state.pixels, gathered);
  check_state(state, sizes);
  const bool wide = tags.dtype == DType::f64;
  expect_contiguous(grad_terms, wide ? DType::f64 : DType::f32, sizes.images * kTerms,
                    "grad_terms");
  expect(grad.dtype == tags.dtype && grad.ndim == tags.ndim && grad.shape == tags.shape,
         "grad: expected the tags' shape and type");
  const auto* pixels = state.pixels.as<const int64_t>();
  const int64_t area = gathered ? 1 : tags.shape[2] * tags.shape[3];
  expect(std::all_of(pixels, pixels + state.pixels.size(),
                     [&](int64_t pixel) { return pixel >= -1 && pixel < area; }),
         "pixels: expected what the forward pass left");

  fill_zero(grad, threads);
  const Place place(tags, sizes, gathered), to(grad, sizes, gathered);
  const Counts counts(pixels, sizes);
  const Reader weight = reader(grad_terms.dtype);

  dispatch_floating(tags.dtype, "tags", [&](auto type) {
    using T = decltype(type);
    // One joint of one image: no other task writes to its channels.
    parallel_for(sizes.images * sizes.joints, threads, [&](int64_t task) {
      const int64_t b = task / sizes.joints, k = task % sizes.joints;
      const auto pixel_of = [&](int64_t n) {
        return pixels[(b * sizes.people + n) * sizes.joints + k];
      };
      // People side by side that share a pixel, so that its sum is rounded once.
      std::vector<int64_t> people;
      for (int64_t n = 0; n < sizes.people; ++n) {
        if (pixel_of(n) >= 0) people.push_back(n);
      }
      if (!gathered) {
        std::sort(people.begin(), people.end(), [&](int64_t m, int64_t n) {
          return pixel_of(m) != pixel_of(n) ? pixel_of(m) < pixel_of(n) : m < n;
        });
      }
      std::vector<double> sum(sizes.tag);
      for (size_t i = 0; i < people.size(); ++i) {
        const int64_t n = people[i], row = b * sizes.people + n, pixel = pixel_of(n);
        const T* tag = tags.as<const T>() + place(b, n, k, pixel);
        const double* mean = state.means.as<const double>() + row * sizes.tag;
        const double* push = state.pushes.as<const double>() + row * sizes.tag;
        const auto joints = static_cast<double>(counts.joints[row]);
        const double pull_weight = weight(grad_terms.data, b * kTerms) * 2 /
                                   (static_cast<double>(counts.people[b]) * joints);
        const double push_weight = weight(grad_terms.data, b * kTerms + 1) / joints;
        for (int64_t l = 0; l < sizes.tag; ++l) {
          sum[l] += pull_weight * (tag[l * place.step()] - mean[l]) + push_weight * push[l];
        }
        if (!gathered && i + 1 < people.size() && pixel_of(people[i + 1]) == pixel) continue;
        T* gradient = grad.as<T>() + to(b, n, k, pixel);
        for (int64_t l = 0; l < sizes.tag; ++l) gradient[l * to.step()] = rounded<T>(sum[l]);
        std::fill(sum.begin(), sum.end(), 0.0);
      }
    });
  });
}

}  // namespace instembed::associative_embedding
