// Parallel loops whose result does not depend on the number of threads.
//
// Work is cut into tasks of a size that the data decides, never the thread count; a task writes
// only what is its own, and partial sums are combined afterwards in task order. So 1 and 16 threads
// give the same bits.
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>

namespace instembed {

// True in a process that was forked from one that had loaded the core: an OpenMP runtime does not
// survive a fork, so such a process (a DataLoader worker, say) runs every loop on the calling
// thread.
bool forked();

// Runs task(i) for i in [0, count), each once, on at most `threads` threads, in no particular
// order. The first exception is rethrown on the calling thread when all tasks have ended.
template <class Task>
void parallel_for(int64_t count, int threads, Task&& task) {
  if (count <= 1 || threads <= 1 || forked()) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::exception_ptr error;
  std::mutex mutex;
  const int team = static_cast<int>(count < threads ? count : threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int64_t i = 0; i < count; ++i) {
    try {
      task(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  }
  (void)team;
  if (error) std::rethrow_exception(error);
}

}  // namespace instembed
