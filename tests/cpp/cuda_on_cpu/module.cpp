// The bindings of the CUDA kernels over the simulated device, for pytest --simulated-core. Other
// types than arrays are those that instembed._core registers.
#include "common/cuda.h"
#include "python/cuda_bindings.h"

PYBIND11_MODULE(simulated_core, module) {
  module.attr("cuda") = true;
  module.def("set_schedule",
             [](uint64_t seed) { instembed::cuda::simulator::options.seed = seed; });
  instembed::python::bind_cuda(module);
}
