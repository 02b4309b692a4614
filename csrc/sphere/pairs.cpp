#include "sphere/pairs.h"

namespace instembed::sphere {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__)
const bool kWideVectors = __builtin_cpu_supports("x86-64-v4");
#else
const bool kWideVectors = false;
#endif

}  // namespace instembed::sphere
