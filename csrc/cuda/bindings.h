// The CUDA ops' lines of the door, one an op: for the extension, and for the tests' module that has them emulated.
#pragma once
#include "common/multiscale_ops.h"
#include "common/ops.h"
#include "cuda/mma_probe.h"
#include "door.h"

namespace tokenflow_ext {

namespace cuda {
TOKENFLOW_DECLARE_OPS TOKENFLOW_DECLARE_MULTISCALE_OPS
}

#define TOKENFLOW_CUDA_OP(name) def_op(m, #name, cuda::name, on_cuda)

inline void bind_cuda_ops(pybind11::module_& m) {
  TOKENFLOW_CUDA_OP(nearest_code);
  TOKENFLOW_CUDA_OP(normalize_rows);
  TOKENFLOW_CUDA_OP(normalize_rows_backward);
  TOKENFLOW_CUDA_OP(quantize);
  TOKENFLOW_CUDA_OP(quantize_backward);
  TOKENFLOW_CUDA_OP(entropy_loss);
  TOKENFLOW_CUDA_OP(entropy_loss_backward);
  TOKENFLOW_CUDA_OP(soft_quantize_backward);
  TOKENFLOW_CUDA_OP(lookup);
  TOKENFLOW_CUDA_OP(lookup_backward);
  TOKENFLOW_CUDA_OP(code_statistics);
  TOKENFLOW_CUDA_OP(ema_update);
  TOKENFLOW_CUDA_OP(multiscale_quantize);
  TOKENFLOW_CUDA_OP(multiscale_quantize_backward);
  TOKENFLOW_CUDA_OP(multiscale_rows);
  TOKENFLOW_CUDA_OP(multiscale_rows_backward);
  TOKENFLOW_CUDA_OP(multiscale_decode);
  TOKENFLOW_CUDA_OP(multiscale_decode_backward);
  TOKENFLOW_CUDA_OP(multiscale_chain);
  TOKENFLOW_CUDA_OP(multiscale_chain_backward);
  TOKENFLOW_CUDA_OP(mma_probe);
  m.def("certify", [](bool wanted) {  // returns what was
    std::swap(wanted, certified_on_cuda);
    return wanted;
  });
}

}  // namespace tokenflow_ext
