// Runs every CUDA kernel on the simulated device. The argument is the number of schedules a case.
#include <chrono>
#include <cstdlib>

#include "cuda_on_cpu/tests.h"

namespace instembed {
namespace {

void run(const char* name, void (*test)(int), int schedules) {
  const auto start = std::chrono::steady_clock::now();
  test(schedules);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("simulator: %s, %d schedules a case: %.1f s\n", name, schedules, took.count());
}

}  // namespace
}  // namespace instembed

int main(int argc, char** argv) {
  const int schedules = argc > 1 ? std::atoi(argv[1]) : 20;
  using namespace instembed;
  std::setbuf(stdout, nullptr);
  run("simulator", test_simulator, schedules);
  run("discriminative", test_discriminative, schedules);
  run("label_statistics", test_label_statistics, schedules);
  run("mean_shift", test_mean_shift, schedules);
  return 0;
}
