// The simulator catches what it says it catches: each kernel here has one fault, and runs in a
// child process that must stop with the message that names it. The same kernel without its fault
// must not.
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "common/group_barrier.cuh"
#include "cuda_on_cpu/tests.h"

namespace instembed {

namespace {

using namespace cuda;

constexpr int kThreads = 64;

// Sums 64 numbers by a tree in shared memory.
void tree_kernel(const int* input, int* output, bool barrier) {
  INSTEMBED_SHARED(int, sums, kThreads);
  sums[threadIdx.x] = input[threadIdx.x];
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (barrier || half == kThreads / 2) __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += static_cast<int>(sums[threadIdx.x + half]);
  }
  if (threadIdx.x == 0) *output = sums[0];
}

void divergent_kernel(bool fault) {
  if (fault && threadIdx.x == 40) return;
  __syncthreads();
}

void two_barriers_kernel(bool fault) {
  if (fault && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void shared_bounds_kernel(int* output, int extra) {
  INSTEMBED_SHARED(int, values, kThreads);
  values[static_cast<int>(threadIdx.x) + extra] = 1;
  if (threadIdx.x == 0) *output = values[0 + extra];
}

void dynamic_bounds_kernel(int extra) {
  DynamicShared shared;
  shared.take<int>(kThreads + extra);
}

// An array of its own beside those of the launch.
void both_kinds_kernel() {
  INSTEMBED_SHARED(int, values, kThreads);
  values[threadIdx.x] = 1;
}

void global_bounds_kernel(int* output, int extra) {
  output[static_cast<int>(threadIdx.x) + extra] = 1;
}

void shuffle_kernel(int* output, int source) {
  if (threadIdx.x % 32 < 16) output[threadIdx.x] = __shfl_sync(0xffffu, 7, source);
}

void missing_lane_kernel(int* output, bool fault) {
  if (fault && threadIdx.x == 5) return;
  output[threadIdx.x] = __shfl_xor_sync(kAllLanes, 3, 1);
}

void uninitialised_kernel(int* output, bool fault) {
  INSTEMBED_SHARED(int, values, kThreads);
  if (!fault || threadIdx.x != 3) values[threadIdx.x] = 2;
  __syncthreads();
  output[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

// Counts threads by their last two bits; with a fault, one counts by hand, or reads too early.
void histogram_kernel(int* output, bool by_hand, bool early) {
  INSTEMBED_SHARED(int, counts, 4);
  if (threadIdx.x < 4) counts[threadIdx.x] = 0;
  __syncthreads();
  const SharedPtr<int> count = counts + threadIdx.x % 4;
  if (by_hand && threadIdx.x == 7) {
    count[0] += 1;
  } else {
    atomicAdd(count, 1);
  }
  if (!early) __syncthreads();
  if (threadIdx.x < 4) output[threadIdx.x] = counts[threadIdx.x];
}

// Each block writes a number and reads those of the others.
void group_kernel(unsigned long long* arrived, int* numbers, int* output, bool barrier,
                  int absent) {
  const int block = static_cast<int>(blockIdx.x);
  if (block == absent) return;
  if (threadIdx.x == 3) numbers[block] = 1;
  GroupBarrier group;
  if (barrier) group.wait(arrived, static_cast<int>(gridDim.x));
  if (threadIdx.x != 40) return;
  for (unsigned b = 0; b < gridDim.x; ++b) output[block] += numbers[b];
}

// The sum of what three blocks found.
int run_group(bool barrier, int absent, int64_t blocks = 3) {
  unsigned long long arrived = 0;
  std::vector<int> numbers(blocks), output(blocks);
  launch_together(group_kernel, "test", blocks, kThreads, 0, Stream{}, &arrived, numbers.data(),
                  output.data(), barrier, absent);
  return output[0] + output[1] + output[2];
}

template <class... P, class... A>
void start(void (*kernel)(P...), int64_t shared, A... arguments) {
  launch(kernel, "test", 1, kThreads, shared, Stream{}, arguments...);
}

// What the child said, and whether it ended well.
std::string run(const std::function<void()>& body, bool* well) {
  int ends[2];
  CHECK(pipe(ends) == 0);
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    close(ends[0]);
    body();
    _exit(0);
  }
  close(ends[1]);
  std::string said;
  char piece[4096];
  for (ssize_t n; (n = read(ends[0], piece, sizeof(piece))) > 0;) said.append(piece, n);
  close(ends[0]);
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  *well = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  return said;
}

void check(const char* what, const std::function<void()>& faulty,
           const std::function<void()>& sound, const std::vector<std::string>& words) {
  for (uint64_t seed = 0; seed < 3; ++seed) {
    simulator::options.seed = seed;
    bool well = true;
    const std::string said = run(faulty, &well);
    bool named = !well;
    for (const std::string& word : words) named = named && said.find(word) != std::string::npos;
    const std::string quiet = run(sound, &well);
    if (!named || !well) {
      std::fprintf(stderr, "simulator_test: %s: the fault gave\n%s\nand without it\n%s\n", what,
                   said.c_str(), quiet.c_str());
      std::exit(1);
    }
  }
}

}  // namespace

void test_simulator(int) {
  std::unique_ptr<int[]> input(new int[kThreads]), output(new int[kThreads]);
  for (int i = 0; i < kThreads; ++i) input[i] = i;
  int* in = input.get();
  int* out = output.get();
  check(
      "removed barrier", [&] { start(tree_kernel, 0, in, out, false); },
      [&] {
        start(tree_kernel, 0, in, out, true);
        CHECK(*out == kThreads * (kThreads - 1) / 2);
      },
      {"no barrier between", "thread "});
  check(
      "divergent barrier", [&] { start(divergent_kernel, 0, true); },
      [&] { start(divergent_kernel, 0, false); }, {"missing", "thread 40 has ended"});
  check(
      "different barriers", [&] { start(two_barriers_kernel, 0, true); },
      [&] { start(two_barriers_kernel, 0, false); }, {"divergent barrier"});
  check(
      "shared memory", [&] { start(shared_bounds_kernel, 0, out, 1); },
      [&] { start(shared_bounds_kernel, 0, out, 0); }, {"values[64] of 64"});
  check(
      "dynamic shared memory", [&] { start(dynamic_bounds_kernel, kThreads * 4, 1); },
      [&] { start(dynamic_bounds_kernel, kThreads * 4, 0); }, {"260 bytes of 256"});
  check(
      "more shared memory than a block may have",
      [&] { start(both_kinds_kernel, simulator::options.shared - kThreads * 4 + 16); },
      [&] { start(both_kinds_kernel, simulator::options.shared - kThreads * 4); },
      {"65552 bytes of shared memory, the device has 65536"});
  check(
      "shuffle from an inactive lane", [&] { start(shuffle_kernel, 0, out, 20); },
      [&] { start(shuffle_kernel, 0, out, 12); }, {"reads lane 20"});
  check(
      "lane missing in a shuffle", [&] { start(missing_lane_kernel, 0, out, true); },
      [&] { start(missing_lane_kernel, 0, out, false); }, {"missing", "thread 5 has ended"});
  check(
      "uninitialised shared memory", [&] { start(uninitialised_kernel, 0, out, true); },
      [&] { start(uninitialised_kernel, 0, out, false); }, {"values[3] is read before written"});
  const auto count = [&] {
    start(histogram_kernel, 0, out, false, false);
    for (int k = 0; k < 4; ++k) CHECK(out[k] == kThreads / 4);
  };
  check("a write beside atomics", [&] { start(histogram_kernel, 0, out, true, false); }, count,
        {"counts[3] is", "no barrier between"});
  check("a read beside atomics", [&] { start(histogram_kernel, 0, out, false, true); }, count,
        {"counts[", "no barrier between"});
  check(
      "blocks that wait for one that has ended", [&] { run_group(true, 1); },
      [&] { CHECK(run_group(true, -1) == 9); }, {"all blocks wait for each other"});
  check(
      "more blocks than the device holds", [&] { run_group(true, -1, 4); },
      [&] { run_group(true, -1); }, {"4 blocks, the device holds 3"});
  int without = 0;  // a missing barrier between blocks shows in some schedule
  for (uint64_t seed = 0; seed < 20; ++seed) {
    simulator::options.seed = seed;
    CHECK(run_group(true, -1) == 9);
    without += run_group(false, -1) != 9 ? 1 : 0;
  }
  CHECK(without > 0);
#if defined(__SANITIZE_ADDRESS__)
  check(
      "global memory", [&] { start(global_bounds_kernel, 0, out, 1); },
      [&] { start(global_bounds_kernel, 0, out, 0); }, {"heap-buffer-overflow"});
#else
  (void)global_bounds_kernel;  // AddressSanitizer's part: `make sanitize`
#endif
}

}  // namespace instembed
