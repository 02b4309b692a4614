// The associative embedding loss on the simulated device against the CPU kernel in float64, which
// the Python tests hold to its reference.
#include "associative_embedding/cuda.h"
#include "cuda_on_cpu/tests.h"

namespace instembed {

namespace {

using namespace associative_embedding;

struct Case {
  DType dtype = DType::f32;
  int64_t images = 2, people = 5, joints = 4, tag = 1, height = 7, width = 9;
  bool gathered = false, strided = false, hinge = false;
};

void check(const Case& c, int schedules) {
  const std::vector<int64_t> shape =
      c.gathered ? std::vector<int64_t>{c.images, c.people, c.joints, c.tag}
                 : std::vector<int64_t>{c.images, c.joints * c.tag, c.height, c.width};
  const std::vector<int> layout =
      c.strided ? std::vector<int>{0, 2, 3, 1} : std::vector<int>{0, 1, 2, 3};
  Buffer tags(c.dtype, shape, layout), exact(DType::f64, shape, layout);
  fill_normal(tags, c.dtype);
  for (int64_t i = 0; i < tags.size(); ++i) exact.as<double>()[i] = value(tags, c.dtype, i);
  Buffer keypoints(DType::f32, {c.images, c.people, c.joints, 2});
  for (int64_t i = 0; i < keypoints.size(); ++i) {  // few pixels: some are shared, some outside
    keypoints.as<float>()[i] = static_cast<float>(draw(-2, 7)) / 2;
  }
  Buffer visible(DType::u8, {c.images, c.people, c.joints});
  for (int64_t i = 0; i < visible.size(); ++i) visible.as<uint8_t>()[i] = draw(0, 2);
  const Array* places = c.gathered ? nullptr : &keypoints;
  const Push push(c.hinge, 0.6, 1.3);

  const std::vector<int64_t> rows = {c.images, c.people, c.tag};
  Buffer pixels(DType::i64, {c.images, c.people, c.joints});
  Buffer means(DType::f64, rows), pushes(DType::f64, rows);
  Buffer expected(DType::f64, {c.images, kTerms}), weights(DType::f64, {c.images, kTerms});
  forward(exact, places, visible, push, expected, {pixels, means, pushes}, 1);
  fill_normal(weights, DType::f64);
  const DType sums = sums_of(c.dtype);
  Buffer grad_terms(sums, {c.images, kTerms});
  fill_as(weights, sums, grad_terms);
  Buffer expected_grad(DType::f64, shape, layout);
  backward(weights, exact, {pixels, means, pushes}, c.gathered, expected_grad, 1);

  std::vector<char> bits;
  for_schedules(schedules, [&] {
    Buffer own_pixels(DType::i64, {c.images, c.people, c.joints});
    Buffer own_means(DType::f64, rows), own_pushes(DType::f64, rows);
    const State state{own_pixels, own_means, own_pushes};
    Buffer terms(sums, {c.images, kTerms}), grad(c.dtype, shape, layout);
    Buffer workspace(DType::u8, {cuda_workspace(c.images, c.people)});
    forward_cuda(tags, places, visible, push, terms, state, workspace, 0);
    Buffer again(DType::u8, {cuda_workspace(c.images, c.people)});
    backward_cuda(grad_terms, tags, state, c.gathered, grad, again, 0);
    CHECK(same_bits(own_pixels, pixels));
    check_close(terms, sums, expected, sums == DType::f64 ? 1e-13 : 1e-6);
    check_close(grad, c.dtype, expected_grad, tolerance_of(c.dtype));
    std::vector<char> now(terms.raw(), terms.raw() + terms.bytes());
    now.insert(now.end(), grad.raw(), grad.raw() + grad.bytes());
    if (bits.empty()) bits = now;
    CHECK(bits == now);  // whatever the schedule
  });
}

}  // namespace

void test_associative_embedding(int schedules) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    for (const bool gathered : {false, true}) {
      Case c;
      c.dtype = dtype;
      c.gathered = gathered;
      c.hinge = gathered;
      check(c, schedules);
      c.tag = 3;
      c.strided = true;
      c.hinge = !gathered;
      check(c, schedules);
    }
  }
  for (const int64_t people : {0, 1, 2, 33, 70}) {
    Case c;
    c.people = people;
    check(c, schedules);
  }
  for (const int64_t joints : {1, 33, 40}) {
    Case c;
    c.joints = joints;
    c.tag = joints == 33 ? 40 : 2;
    check(c, schedules);
  }
  Case none;
  none.images = 0;
  check(none, schedules);
  none.images = 2;
  none.height = 0;
  check(none, schedules);
}

}  // namespace instembed
