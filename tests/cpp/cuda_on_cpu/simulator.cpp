#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>

#include "common/cuda.h"
#include "common/cuda_devices.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Changes stacks. swapcontext() would do, but it also asks the kernel for the signal mask, which
// costs more than everything else here.
extern "C" void instembed_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl instembed_switch
instembed_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#define INSTEMBED_OWN_SWITCH 1
#endif

namespace instembed::cuda::simulator {
namespace {

constexpr size_t kStack = 256 * 1024;
// Stacks begin at different places of a page: else the tops of all of them would want the same few
// lines of the cache, and a change of stacks would cost more than all that the kernels do.
constexpr size_t kColours = 61, kColour = 256;

enum class State { ready, at_barrier, in_warp, done };  // ready: maybe by spin()

struct Fiber {
  void* pointer = nullptr;  // of its stack, while it does not run
  char* stack = nullptr;
  State state = State::ready;
  int32_t epoch = 0;  // barriers passed
  int32_t step = 0;   // warp operations passed
  const char* file = "";
  int line = 0;
  unsigned mask = 0;
  const char* operation = "";
  uint64_t value = 0;
  int source = 0;
  Given given{};
  bool vote = false;
  bool spun = false;  // it gave way to others, and may find that nothing has changed
  int votes = 0;
#if !defined(INSTEMBED_OWN_SWITCH)
  ucontext_t context{};
#endif
};

// A block that runs, or waits beside others that do.
struct Block {
  int64_t index = 0;
  int first = 0;                  // of its fibers
  int stuck = 0;                  // turns in which all its threads did was to look again
  std::array<int, 32> in_warp{};  // threads of each warp that wait in an operation
  std::map<const void*, std::unique_ptr<Array>> arrays;
  int64_t fixed_bytes = 0;  // of shared memory, in `arrays`
  std::map<int64_t, std::unique_ptr<Array>> dynamic_arrays;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Block> blocks;                     // that are resident
int threads = 0, current = -1, resident = -1;  // `current` in block `resident`
int64_t shared_limit = 0;
[[maybe_unused]] ucontext_t scheduler;
[[maybe_unused]] void* scheduler_pointer = nullptr;
const std::function<void()>* body = nullptr;
std::mt19937_64 generator;

Fiber& running() { return *fibers[blocks[resident].first + current]; }

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

#if defined(INSTEMBED_OWN_SWITCH)
void leave(Fiber* fiber) { instembed_switch(&fiber->pointer, scheduler_pointer); }
void enter(Fiber* fiber) { instembed_switch(&scheduler_pointer, fiber->pointer); }
#else
void leave(Fiber* fiber) { swapcontext(&fiber->context, &scheduler); }
void enter(Fiber* fiber) { swapcontext(&scheduler, &fiber->context); }
#endif

// AddressSanitizer must know of every change of stacks.
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_size = 0;
void enter_fiber() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size); }
void to_scheduler(bool last) {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, scheduler_stack, scheduler_size);
  leave(&running());
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
}
void to_fiber(Fiber* fiber) {
  __sanitizer_start_switch_fiber(&scheduler_fake, fiber->stack, kStack);
  enter(fiber);
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
}
#else
void enter_fiber() {}
void to_scheduler(bool) { leave(&running()); }
void to_fiber(Fiber* fiber) { enter(fiber); }
#endif

void entry() {
  enter_fiber();
  (*body)();
  running().state = State::done;
  to_scheduler(true);
}

void start(Fiber* fiber) {
  if (!fiber->stack) {
    static size_t made = 0;
    constexpr size_t bytes = kStack + kColours * kColour;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for stacks");
    fiber->stack = static_cast<char*>(memory) + made++ % kColours * kColour;
  }
#if defined(INSTEMBED_OWN_SWITCH)
  // What instembed_switch pops: six registers, then where to go; above it a return address of none.
  void** top = reinterpret_cast<void**>(fiber->stack + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int k = 0; k < 6; ++k) *--top = nullptr;
  fiber->pointer = top;
#else
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = &scheduler;
  makecontext(&fiber->context, entry, 0);
#endif
  fiber->state = State::ready;
  fiber->epoch = fiber->step = 0;
}

Fiber& thread_of(const Block& block, int thread) { return *fibers[block.first + thread]; }

// Lets the threads of a block go on if all of them are at one barrier.
bool release_barrier(const Block& block) {
  int votes = 0;
  for (int t = 0; t < threads; ++t) {
    if (thread_of(block, t).state != State::at_barrier) return false;
    votes += thread_of(block, t).vote;
  }
  const Fiber& zero = thread_of(block, 0);
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = thread_of(block, t);
    if (fiber.file != zero.file || fiber.line != zero.line) {
      fail("divergent barrier: " + describe(t) + " " + place(fiber) + ", thread 0 " + place(zero));
    }
    fiber.votes = votes;
    fiber.state = State::ready;
    ++fiber.epoch;
  }
  ++operations;
  return true;
}

// Lets the lanes of a mask go on if all of them are in the same operation.
void release_warp(Block* own, int thread) {
  const Block& block = *own;
  const Fiber& asked = thread_of(block, thread);
  const int first = thread / 32 * 32;
  const int wanted = asked.mask == 0xffffffffu ? 32 : __builtin_popcount(asked.mask);
  int& waiting = own->in_warp[thread / 32];
  if (++waiting < wanted) return;
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(asked.mask >> lane & 1)) continue;
    const Fiber& fiber = thread_of(block, first + lane);
    if (fiber.state != State::in_warp || fiber.mask != asked.mask) return;
    if (fiber.operation != asked.operation && std::strcmp(fiber.operation, asked.operation) != 0) {
      return;
    }
    votes |= (fiber.value != 0 ? 1u : 0u) << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(asked.mask >> lane & 1)) continue;
    Fiber& fiber = thread_of(block, first + lane);
    const bool has = asked.mask >> fiber.source & 1;
    fiber.given = {has ? thread_of(block, first + fiber.source).value : 0, votes};
    fiber.state = State::ready;
    ++fiber.step;
  }
  ++operations;
  waiting -= wanted;
}

// Nothing in the block can go on: says which thread waits for which.
[[noreturn]] void report_missing(const Block& block) {
  int waiting = -1, missing = -1;
  for (int t = 0; t < threads; ++t) {
    const Fiber& fiber = thread_of(block, t);
    if (fiber.state == State::in_warp || (fiber.state == State::at_barrier && waiting < 0)) {
      waiting = t;
    }
  }
  const Fiber& waits = thread_of(block, waiting);
  for (int t = 0; t < threads && missing < 0; ++t) {
    const bool wanted = waits.state == State::at_barrier ||
                        (t / 32 == waiting / 32 && (waits.mask >> (t % 32) & 1));
    const Fiber& fiber = thread_of(block, t);
    const bool there = fiber.state == waits.state && fiber.mask == waits.mask;
    if (wanted && !(waits.state == State::at_barrier ? fiber.state == State::at_barrier : there)) {
      missing = t;
    }
  }
  fail("missing: " + describe(waiting) + " " + place(waits) + ", but " +
       (missing < 0
            ? std::string("a lane is in another operation")
            : "thread " + std::to_string(missing) + " " + place(thread_of(block, missing))));
}

void select(int block) {
  resident = block;
  block_index = {static_cast<unsigned>(blocks[block].index), 0, 0};
}

enum class Turn { ended, went_on, spun };

// Gives every thread of a block that can run one turn, in a random order.
Turn turn(int b) {
  Block& block = blocks[b];
  select(b);
  static std::vector<int> ready;
  ready.clear();
  int done = 0;
  for (int t = 0; t < threads; ++t) {
    if (thread_of(block, t).state == State::ready) ready.push_back(t);
    done += thread_of(block, t).state == State::done;
  }
  if (done == threads) return Turn::ended;
  if (ready.empty()) {
    if (!release_barrier(block)) report_missing(block);
    return Turn::went_on;
  }
  std::shuffle(ready.begin(), ready.end(), generator);
  bool went_on = false;
  for (const int t : ready) {
    current = t;
    thread_index = {static_cast<unsigned>(t), 0, 0};
    Fiber& fiber = thread_of(block, t);
    fiber.spun = false;
    to_fiber(&fiber);
    went_on = went_on || !fiber.spun;
    if (fiber.state == State::in_warp) release_warp(&block, t);
  }
  return went_on ? Turn::went_on : Turn::spun;
}

// Runs blocks side by side. One at a time has a random number of turns, so that they drift apart.
void run_blocks(const int64_t* indices, int count) {
  blocks.clear();
  blocks.resize(count);
  while (static_cast<int>(fibers.size()) < count * threads) {
    fibers.push_back(std::make_unique<Fiber>());
  }
  std::vector<int> left(count);
  for (int b = 0; b < count; ++b) {
    blocks[b].index = indices[b];
    blocks[b].first = b * threads;
    left[b] = b;
    for (int t = 0; t < threads; ++t) start(&thread_of(blocks[b], t));
  }
  while (!left.empty()) {
    const size_t drawn = left.size() > 1 ? generator() % left.size() : 0;
    const int b = left[drawn];
    for (uint64_t turns = count > 1 ? generator() % 64 : UINT64_MAX; turns > 0; --turns) {
      const Turn result = turn(b);
      if (result == Turn::ended) {
        left.erase(left.begin() + static_cast<int64_t>(drawn));
        break;
      }
      if (result == Turn::spun) {
        ++blocks[b].stuck;
        bool all = true;  // twice: what it waits for may have come after it looked
        for (const int other : left) all = all && blocks[other].stuck >= 2;
        if (all) fail("spin: all blocks wait for each other");
        break;
      }
      for (const int other : left) blocks[other].stuck = 0;
    }
  }
}

bool ordered(int thread, int32_t step) {
  return thread >= 0 && thread / 32 == current / 32 && step < running().step;
}

void check_index(const Array* array, int64_t index) {
  if (index < 0 || index >= array->size) {
    fail("shared memory: " + array->name + "[" + std::to_string(index) + "] of " +
         std::to_string(array->size) + " elements");
  }
}

[[noreturn]] void unwritten(const Array* array, int64_t index) {
  fail("shared memory: " + array->name + "[" + std::to_string(index) + "] is read before written");
}

// What a block needs, all arrays together.
void check_shared(int64_t bytes) {
  if (bytes > device_info().shared) {
    fail(std::to_string(bytes) + " bytes of shared memory, the device has " +
         std::to_string(device_info().shared));
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

void run(int64_t number, int count, int64_t shared_bytes, bool cooperative,
         const std::function<void()>& kernel) {
  check_shared(shared_bytes);
  threads = count;
  shared_limit = shared_bytes;
  body = &kernel;
  block_dim = {static_cast<unsigned>(threads), 1, 1};
  grid_dim = {static_cast<unsigned>(number), 1, 1};
  generator.seed(options.seed);
  operations = 0;
  std::vector<int64_t> order(number);
  for (int64_t b = 0; b < number; ++b) order[b] = b;
  std::shuffle(order.begin(), order.end(), generator);
  if (cooperative) {
    if (number > options.resident) {
      fail("cooperative launch: " + std::to_string(number) + " blocks, the device holds " +
           std::to_string(options.resident));
    }
    run_blocks(order.data(), static_cast<int>(number));
  } else {
    for (const int64_t& b : order) run_blocks(&b, 1);
  }
  current = -1;
}

void spin() {
  running().spun = true;
  to_scheduler(false);
}

void barrier(const char* file, int line) { barrier_count(false, file, line); }

int barrier_count(bool value, const char* file, int line) {
  Fiber& fiber = running();
  fiber.file = file;
  fiber.line = line;
  fiber.vote = value;
  fiber.state = State::at_barrier;
  to_scheduler(false);
  return fiber.votes;
}

int lane() { return current % 32; }

Given warp(unsigned mask, const char* operation, uint64_t value, int source) {
  if (!(mask >> lane() & 1)) fail(std::string(operation) + ": the lane is not in its own mask");
  const int lanes = threads - current / 32 * 32;
  if (lanes < 32 && mask >> lanes != 0) {
    fail(std::string(operation) + ": the mask names lanes that the block does not have");
  }
  Fiber& fiber = running();
  fiber.mask = mask;
  fiber.operation = operation;
  fiber.value = value;
  fiber.source = source;
  fiber.state = State::in_warp;
  to_scheduler(false);
  return fiber.given;
}

Array* shared_array(const void* key, const char* name, int64_t n, int64_t element) {
  Block& block = blocks[resident];
  auto& array = block.arrays[key];
  if (!array) {
    array = new_array(name, n, element);
    block.fixed_bytes += n * element;
    check_shared(block.fixed_bytes + shared_limit);
  }
  return array.get();
}

Array* dynamic_array(int64_t offset, int64_t n, int64_t element) {
  if (offset + n * element > shared_limit) {
    fail("dynamic shared memory: " + std::to_string(offset + n * element) + " bytes of " +
         std::to_string(shared_limit));
  }
  auto& array = blocks[resident].dynamic_arrays[offset];
  if (!array) array = new_array("dynamic@" + std::to_string(offset), n, element);
  return array.get();
}

void on_read(Array* array, int64_t index) {
  check_index(array, index);
  Shadow& shadow = array->shadows[index];
  const Fiber& fiber = running();
  if (!shadow.written) unwritten(array, index);
  if (shadow.writer != current && shadow.write_epoch == fiber.epoch &&
      !ordered(shadow.writer, shadow.write_step)) {
    race(array, index, "read here and written by", shadow.writer);
  }
  const bool one_warp = shadow.reader_warp == current / 32;
  if (shadow.read_epoch != fiber.epoch || (one_warp && shadow.read_step < fiber.step)) {
    // Reads before are over, here by a warp operation: who writes now need not wait for them.
    shadow.reader = static_cast<int16_t>(current);
    shadow.reader_warp = static_cast<int16_t>(current / 32);
    shadow.read_step = fiber.step;
  } else {
    if (shadow.reader != current) shadow.reader = -2;
    if (!one_warp) shadow.reader_warp = -2;
    shadow.read_step = std::max(shadow.read_step, fiber.step);
  }
  shadow.read_epoch = fiber.epoch;
}

void on_write(Array* array, int64_t index) {
  check_index(array, index);
  Shadow& shadow = array->shadows[index];
  const Fiber& fiber = running();
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
  shadow.atomic = false;
  shadow.writer = static_cast<int16_t>(current);
  shadow.write_epoch = fiber.epoch;
  shadow.write_step = fiber.step;
}

void on_atomic(Array* array, int64_t index) {
  check_index(array, index);
  Shadow& shadow = array->shadows[index];
  if (!shadow.written) unwritten(array, index);
  // Atomics are in the way of reads and writes, and not of each other.
  const bool others = shadow.atomic && shadow.write_epoch == running().epoch &&
                      shadow.writer != static_cast<int16_t>(current);
  if (others) shadow.writer = static_cast<int16_t>(current);
  on_write(array, index);
  shadow.atomic = true;
  if (others) shadow.writer = -2;
}

}  // namespace instembed::cuda::simulator

namespace instembed::cuda {

int visible_devices() { return device_count(); }

}  // namespace instembed::cuda
