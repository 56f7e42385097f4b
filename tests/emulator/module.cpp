// The CUDA kernels as a Python module of the tests: the same ops, emulated; registered as backend="emulated".
#include <pybind11/stl.h>

#include "cuda/bindings.h"
#include "cuda_emulator.h"

namespace py = pybind11;

PYBIND11_MODULE(_emulated, m) {
  using namespace tokenflow_ext;
  bind_cuda_ops(m);
  m.def("connect", connect);
  m.def("configure", [](int schedule, uint64_t seed, int architecture, int tensor_cores) {
    cuda_emulator::config() = {static_cast<cuda_emulator::Schedule>(schedule), seed, architecture, true,
                               static_cast<cuda_emulator::TensorCores>(tensor_cores)};
  });
  // (kernel, grid, block, dynamic shared bytes, static shared bytes) of every launch since the last call.
  m.def("take_launches", [] {
    py::list launches;
    const auto size = [](dim3 d) { return py::make_tuple(d.x, d.y, d.z); };
    for (const auto& l : cuda_emulator::take_launches())
      launches.append(py::make_tuple(l.kernel, size(l.grid), size(l.block), l.dynamic_shared, l.static_shared));
    return launches;
  });
}
