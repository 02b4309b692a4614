#include "sphere/pairs.h"

namespace instembed::sphere {

#if defined(__x86_64__) && defined(__GNUC__)
const bool kManyRegisters = __builtin_cpu_supports("avx512f");
#else
const bool kManyRegisters = true;
#endif

}  // namespace instembed::sphere
