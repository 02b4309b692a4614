// Runs CUDA kernels on the simulated device. Arguments: the number of schedules a case, and the
// tests to run (default: all).
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda_on_cpu/tests.h"

namespace instembed {
namespace {

struct Test {
  std::string name;
  void (*run)(int schedules);
};

const std::vector<Test> kTests = {{"simulator", test_simulator},
                                  {"associative_embedding", test_associative_embedding},
                                  {"cosine_margin", test_cosine_margin},
                                  {"discriminative", test_discriminative},
                                  {"gather_at", test_gather_at},
                                  {"group_keypoints", test_group_keypoints},
                                  {"group_on_sphere", test_group_on_sphere},
                                  {"instance_pool", test_instance_pool},
                                  {"label_statistics", test_label_statistics},
                                  {"mean_shift", test_mean_shift},
                                  {"pairwise_similarity", test_pairwise_similarity},
                                  {"recurrent_mean_shift", test_recurrent_mean_shift},
                                  {"sample_pixels", test_sample_pixels},
                                  {"seeds", test_seeds}};

int run(int schedules, const std::vector<std::string>& names) {
  size_t found = 0;
  for (const Test& test : kTests) {
    if (!names.empty() && std::find(names.begin(), names.end(), test.name) == names.end()) continue;
    ++found;
    const auto start = std::chrono::steady_clock::now();
    test.run(schedules);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    std::printf("simulator: %s, %d schedules a case: %.1f s\n", test.name.c_str(), schedules,
                took.count());
  }
  if (found == (names.empty() ? kTests.size() : names.size())) return 0;
  std::fprintf(stderr, "unknown test among the arguments\n");
  return 1;
}

}  // namespace
}  // namespace instembed

int main(int argc, char** argv) {
  std::setbuf(stdout, nullptr);
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const int schedules = arguments.empty() ? 20 : std::atoi(arguments[0].c_str());
  return instembed::run(schedules, {arguments.begin() + !arguments.empty(), arguments.end()});
}
