// The one op of CUDA alone (mma_probe.cu).
#pragma once
#include "common/view.h"

namespace tokenflow_ext::cuda {

Error mma_probe(Call& call, View a /*[N, 32, 8] bfloat16*/, View b /*[N, 32, 4] bfloat16*/,
                View c /*[N, 32, 4] float32*/, View d /*[N, 32, 4] float32*/) noexcept;

}  // namespace tokenflow_ext::cuda
