#include "common/parallel.h"

#include <pthread.h>

namespace instembed {
namespace {

bool in_forked_child = false;

[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

}  // namespace

bool forked() { return in_forked_child; }

}  // namespace instembed
