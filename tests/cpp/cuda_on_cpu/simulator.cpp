#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>

#include "common/cuda.h"
#include "common/cuda_devices.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace instembed::cuda::simulator {
namespace {

constexpr size_t kStack = 256 * 1024;

enum class State { ready, at_barrier, in_warp, done };

struct Fiber {
  ucontext_t context{};
  void* stack = nullptr;
  State state = State::ready;
  int64_t epoch = 0;  // barriers passed
  int64_t step = 0;   // warp operations passed
  const char* file = "";
  int line = 0;
  unsigned mask = 0;
  const char* operation = "";
  uint64_t value = 0;
  Exchange exchange{};
  bool vote = false;
  int votes = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
int threads = 0, current = -1;
int64_t shared_limit = 0;
ucontext_t scheduler;
const std::function<void()>* body = nullptr;
std::map<const void*, std::unique_ptr<Array>> arrays;
std::map<int64_t, std::unique_ptr<Array>> dynamic_arrays;
std::mt19937_64 generator;

std::string describe(int thread) {
  return "block " + std::to_string(block_index.x) + ", thread " + std::to_string(thread);
}

std::string place(const Fiber& fiber) {
  switch (fiber.state) {
    case State::at_barrier:
      return "waits at the barrier of " + std::string(fiber.file) + ":" +
             std::to_string(fiber.line);
    case State::in_warp:
      return "waits in " + std::string(fiber.operation);
    case State::done:
      return "has ended";
    default:
      return "runs";
  }
}

// AddressSanitizer must know of every change of stacks.
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_size = 0;
void enter_fiber() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size); }
void to_scheduler(bool last) {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, scheduler_stack, scheduler_size);
  swapcontext(&fibers[current]->context, &scheduler);
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
}
void to_fiber(Fiber* fiber) {
  __sanitizer_start_switch_fiber(&scheduler_fake, fiber->stack, kStack);
  swapcontext(&scheduler, &fiber->context);
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
}
#else
void enter_fiber() {}
void to_scheduler(bool) { swapcontext(&fibers[current]->context, &scheduler); }
void to_fiber(Fiber* fiber) { swapcontext(&scheduler, &fiber->context); }
#endif

void entry() {
  enter_fiber();
  (*body)();
  fibers[current]->state = State::done;
  to_scheduler(true);
}

void start(Fiber* fiber) {
  if (!fiber->stack) {
    fiber->stack =
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fiber->stack == MAP_FAILED) fail("no memory for stacks");
  }
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = &scheduler;
  makecontext(&fiber->context, entry, 0);
  fiber->state = State::ready;
  fiber->epoch = fiber->step = 0;
}

// Lets the threads of the block go on if all of them are at one barrier.
bool release_barrier() {
  int votes = 0;
  for (int t = 0; t < threads; ++t) {
    if (fibers[t]->state != State::at_barrier) return false;
    votes += fibers[t]->vote;
  }
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = *fibers[t];
    if (fiber.file != fibers[0]->file || fiber.line != fibers[0]->line) {
      fail("divergent barrier: " + describe(t) + " " + place(fiber) + ", thread 0 " +
           place(*fibers[0]));
    }
    fiber.votes = votes;
    fiber.state = State::ready;
    ++fiber.epoch;
  }
  return true;
}

// Lets the lanes of a mask go on if all of them are in the same operation.
void release_warp(int thread) {
  const Fiber& asked = *fibers[thread];
  const int first = thread / 32 * 32;
  Exchange all{};
  for (int lane = 0; lane < 32; ++lane) {
    if (!(asked.mask >> lane & 1)) continue;
    if (first + lane >= threads) {
      fail(std::string(asked.operation) + ": " + describe(thread) + " names lane " +
           std::to_string(lane) + ", which the block does not have");
    }
    const Fiber& fiber = *fibers[first + lane];
    if (fiber.state != State::in_warp || fiber.mask != asked.mask) return;
    if (std::strcmp(fiber.operation, asked.operation) != 0) return;
    all.values[lane] = fiber.value;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(asked.mask >> lane & 1)) continue;
    Fiber& fiber = *fibers[first + lane];
    fiber.exchange = all;
    fiber.state = State::ready;
    ++fiber.step;
  }
}

void run_block() {
  arrays.clear();
  dynamic_arrays.clear();
  for (int t = 0; t < threads; ++t) start(fibers[t].get());
  std::vector<int> ready;
  while (true) {
    ready.clear();
    int done = 0;
    for (int t = 0; t < threads; ++t) {
      if (fibers[t]->state == State::ready) ready.push_back(t);
      done += fibers[t]->state == State::done;
    }
    if (done == threads) return;
    if (ready.empty()) {
      if (release_barrier()) continue;
      int waiting = -1, missing = -1;
      for (int t = 0; t < threads; ++t) {
        const Fiber& fiber = *fibers[t];
        if (fiber.state == State::in_warp || (fiber.state == State::at_barrier && waiting < 0)) {
          waiting = t;
        }
      }
      const Fiber& waits = *fibers[waiting];
      for (int t = 0; t < threads && missing < 0; ++t) {
        const bool wanted = waits.state == State::at_barrier ||
                            (t / 32 == waiting / 32 && (waits.mask >> (t % 32) & 1));
        const Fiber& fiber = *fibers[t];
        const bool there = fiber.state == waits.state && fiber.mask == waits.mask;
        if (wanted &&
            !(waits.state == State::at_barrier ? fiber.state == State::at_barrier : there))
          missing = t;
      }
      fail("missing: " + describe(waiting) + " " + place(waits) + ", but " +
           (missing < 0 ? std::string("a lane is in another operation")
                        : "thread " + std::to_string(missing) + " " + place(*fibers[missing])));
    }
    std::shuffle(ready.begin(), ready.end(), generator);
    for (const int t : ready) {
      current = t;
      thread_index = {static_cast<unsigned>(t), 0, 0};
      to_fiber(fibers[t].get());
      if (fibers[t]->state == State::in_warp) release_warp(t);
    }
  }
}

bool ordered(int thread, int64_t step) {
  return thread >= 0 && thread / 32 == current / 32 && step < fibers[current]->step;
}

void check_index(const Array* array, int64_t index) {
  if (index < 0 || index >= array->size) {
    fail("shared memory: " + array->name + "[" + std::to_string(index) + "] of " +
         std::to_string(array->size) + " elements");
  }
}

[[noreturn]] void race(const Array* array, int64_t index, const char* what, int other) {
  fail("shared memory: " + array->name + "[" + std::to_string(index) + "] is " + what +
       (other >= 0 ? " thread " + std::to_string(other) : " several threads") +
       " with no barrier between");
}

std::unique_ptr<Array> new_array(std::string name, int64_t n, int64_t element) {
  auto array = std::make_unique<Array>();
  array->name = std::move(name);
  array->size = n;
  array->bytes.assign(n * element, 0xa5);
  array->shadows.assign(n, {});
  return array;
}

}  // namespace

void fail(const std::string& what) {
  std::fprintf(stderr, "simulator: %s: %s\n", current >= 0 ? describe(current).c_str() : "host",
               what.c_str());
  std::fflush(stderr);
  std::_Exit(86);
}

void run(int64_t blocks, int count, int64_t shared_bytes, const std::function<void()>& kernel) {
  threads = count;
  shared_limit = shared_bytes;
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  body = &kernel;
  block_dim = {static_cast<unsigned>(threads), 1, 1};
  grid_dim = {static_cast<unsigned>(blocks), 1, 1};
  generator.seed(options.seed);
  std::vector<int64_t> order(blocks);
  for (int64_t b = 0; b < blocks; ++b) order[b] = b;
  std::shuffle(order.begin(), order.end(), generator);
  for (const int64_t b : order) {
    block_index = {static_cast<unsigned>(b), 0, 0};
    run_block();
  }
  current = -1;
}

void barrier(const char* file, int line) { barrier_count(false, file, line); }

int barrier_count(bool value, const char* file, int line) {
  Fiber& fiber = *fibers[current];
  fiber.file = file;
  fiber.line = line;
  fiber.vote = value;
  fiber.state = State::at_barrier;
  to_scheduler(false);
  return fiber.votes;
}

int lane() { return current % 32; }

void warp(unsigned mask, const char* operation, uint64_t value, Exchange* all) {
  if (!(mask >> lane() & 1)) fail(std::string(operation) + ": the lane is not in its own mask");
  Fiber& fiber = *fibers[current];
  fiber.mask = mask;
  fiber.operation = operation;
  fiber.value = value;
  fiber.state = State::in_warp;
  to_scheduler(false);
  *all = fiber.exchange;
}

Array* shared_array(const void* key, const char* name, int64_t n, int64_t element) {
  auto& array = arrays[key];
  if (!array) array = new_array(name, n, element);
  return array.get();
}

Array* dynamic_array(int64_t offset, int64_t n, int64_t element) {
  if (offset + n * element > shared_limit) {
    fail("dynamic shared memory: " + std::to_string(offset + n * element) + " bytes of " +
         std::to_string(shared_limit));
  }
  auto& array = dynamic_arrays[offset];
  if (!array) array = new_array("dynamic@" + std::to_string(offset), n, element);
  return array.get();
}

void on_read(Array* array, int64_t index) {
  check_index(array, index);
  Shadow& shadow = array->shadows[index];
  const Fiber& fiber = *fibers[current];
  if (!shadow.written) {
    fail("shared memory: " + array->name + "[" + std::to_string(index) +
         "] is read before written");
  }
  if (shadow.writer != current && shadow.write_epoch == fiber.epoch &&
      !ordered(shadow.writer, shadow.write_step)) {
    race(array, index, "read here and written by", shadow.writer);
  }
  if (shadow.read_epoch != fiber.epoch) {
    shadow.reader = current;
    shadow.reader_warp = current / 32;
  } else {
    if (shadow.reader != current) shadow.reader = -2;
    if (shadow.reader_warp != current / 32) shadow.reader_warp = -2;
  }
  shadow.read_step =
      shadow.read_epoch == fiber.epoch ? std::max(shadow.read_step, fiber.step) : fiber.step;
  shadow.read_epoch = fiber.epoch;
}

void on_write(Array* array, int64_t index) {
  check_index(array, index);
  Shadow& shadow = array->shadows[index];
  const Fiber& fiber = *fibers[current];
  if (shadow.written && shadow.writer != current && shadow.write_epoch == fiber.epoch &&
      !ordered(shadow.writer, shadow.write_step)) {
    race(array, index, "written here and by", shadow.writer);
  }
  if (shadow.read_epoch == fiber.epoch && shadow.reader != current) {
    const bool same_warp = shadow.reader_warp == current / 32;
    if (!same_warp || shadow.read_step >= fiber.step) {
      race(array, index, "written here and read by", shadow.reader);
    }
  }
  shadow.written = true;
  shadow.writer = current;
  shadow.write_epoch = fiber.epoch;
  shadow.write_step = fiber.step;
}

}  // namespace instembed::cuda::simulator

namespace instembed::cuda {

int visible_devices() { return device_count(); }

}  // namespace instembed::cuda
