// The only door to Python: one line per op, and build_info(). Kernels run without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "common/multiscale_ops.h"
#include "common/ops.h"
#include "cpu/isa.h"
#include "cpu/search_state.h"
#include "door.h"
#ifdef TOKENFLOW_CUDA
#include "cuda/bindings.h"
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace tokenflow_ext {
namespace baseline {
TOKENFLOW_DECLARE_OPS TOKENFLOW_DECLARE_MULTISCALE_OPS
}
#ifdef TOKENFLOW_X86
namespace avx2 {
TOKENFLOW_DECLARE_OPS TOKENFLOW_DECLARE_MULTISCALE_OPS
}
namespace avx512 {
TOKENFLOW_DECLARE_OPS TOKENFLOW_DECLARE_MULTISCALE_OPS
}
#define TOKENFLOW_PICK(name) (isa == 2 ? avx512::name : isa == 1 ? avx2::name : baseline::name)
#else
#define TOKENFLOW_PICK(name) (baseline::name)
#endif
#define TOKENFLOW_OP(name) def_op(m, #name, TOKENFLOW_PICK(name), on_cpu)
}  // namespace tokenflow_ext

PYBIND11_MODULE(_C, m) {
  using namespace tokenflow_ext;
  std::string error;
  const int isa = choose_isa(&error);

  TOKENFLOW_OP(normalize_rows);
  TOKENFLOW_OP(normalize_rows_backward);
  TOKENFLOW_OP(nearest_code);
  TOKENFLOW_OP(quantize);
  TOKENFLOW_OP(quantize_backward);
  TOKENFLOW_OP(lookup);
  TOKENFLOW_OP(lookup_backward);
  TOKENFLOW_OP(code_statistics);
  TOKENFLOW_OP(ema_update);
  TOKENFLOW_OP(entropy_loss);
  TOKENFLOW_OP(entropy_loss_backward);
  TOKENFLOW_OP(soft_quantize_backward);
  TOKENFLOW_OP(multiscale_quantize);
  TOKENFLOW_OP(multiscale_quantize_backward);
  TOKENFLOW_OP(multiscale_rows);
  TOKENFLOW_OP(multiscale_rows_backward);
  TOKENFLOW_OP(multiscale_decode);
  TOKENFLOW_OP(multiscale_decode_backward);
  TOKENFLOW_OP(multiscale_chain);
  TOKENFLOW_OP(multiscale_chain_backward);
  TOKENFLOW_OP(peaks);

  py::list architectures;
#ifdef TOKENFLOW_CUDA
  py::module_ cuda = m.def_submodule("cuda", "The ops on CUDA tensors.");
  bind_cuda_ops(cuda);
  cuda.def("check", [](int device) {
    if (const char* problem = device_problem(device)) throw std::runtime_error(problem);
  });
  for (const int architecture : {TOKENFLOW_CUDA}) architectures.append("sm_" + std::to_string(architecture));
#endif

  m.def("connect", [error](py::type tensor, py::object api, py::object to_dlpack, py::object empty) {
    if (!error.empty()) throw py::value_error(error);
    connect(tensor, api, to_dlpack, empty);
  });
  m.def("search_precision", [](int precision) {
    std::swap(precision, search_state.precision);
    return precision;
  });
  m.def("search_counts", [] {
    py::dict counts;
    counts["int8"] = search_state.int8_rows;
    counts["full"] = search_state.float_rows;
    counts["fallback"] = search_state.fallback_rows;
    counts["rescored"] = search_state.rescored;
    return counts;
  });

  m.def("build_info", [isa, architectures] {
    py::dict info;
    info["version"] = TOKENFLOW_EXT_VERSION;
    info["compiler"] = __VERSION__;
    py::list built;
    for (int i = 0; i < kIsaCount; ++i) built.append(kIsaNames[i]);
    info["instruction_sets"] = built;
    info["instruction_set"] = kIsaNames[isa];
    info["certified_search"] = isa == 1 || (isa == 2 && search_state.has_int8_dot) ? "int8" : "none";
    info["cuda"] = architectures;
    return info;
  });
}
