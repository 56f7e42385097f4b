// The only door to Python: one line per op, and build_info(). Kernels run without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "common/multiscale_ops.h"
#include "common/ops.h"
#include "cpu/isa.h"
#include "cpu/search_state.h"
#include "tensors.h"

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
#define TOKENFLOW_OP(name) def_op(m, #name, TOKENFLOW_PICK(name))
}  // namespace tokenflow_ext

namespace pybind11::detail {

// A torch tensor, or None.
template <>
struct type_caster<tokenflow_ext::View> {
  PYBIND11_TYPE_CASTER(tokenflow_ext::View, const_name("torch.Tensor | None"));
  bool load(handle src, bool) {
    value = {nullptr, tokenflow_ext::kNone, 0, -1, true, {}};
    return src.is_none() || tokenflow_ext::read(src.ptr(), &value);
  }
};

// (widths, weights, l2, unit, unit_codes)
template <>
struct type_caster<tokenflow_ext::Tables> {
  PYBIND11_TYPE_CASTER(tokenflow_ext::Tables, const_name("Tables"));
  bool load(handle src, bool) {
    if (!PyTuple_Check(src.ptr()) || PyTuple_GET_SIZE(src.ptr()) != 5) return false;
    auto t = reinterpret_borrow<tuple>(src);
    auto widths = reinterpret_borrow<sequence>(t[0]), weights = reinterpret_borrow<sequence>(t[1]);
    value = {static_cast<int>(widths.size()), t[2].cast<bool>(), t[3].cast<bool>(), t[4].cast<bool>(), {}, {}};
    if (value.count < 1 || value.count > tokenflow_ext::kMaxTables || weights.size() != widths.size()) return false;
    for (int i = 0; i < value.count; ++i) {
      value.width[i] = widths[i].cast<int64_t>();
      value.weight[i] = weights[i].cast<double>();
    }
    return true;
  }
};

}  // namespace pybind11::detail

namespace tokenflow_ext {

template <class... Args>
static void def_op(py::module_& m, const char* name, Error (*op)(Args...) noexcept) {
  m.def(name, [op](Args... args) {
    Error error;
    {
      py::gil_scoped_release release;
      error = op(args...);
    }
    if (error) throw py::value_error(error);
  });
}

// An op with scratch runs twice: first it counts what it takes, then it has it. Returns (ids outside, rows not finite).
template <class... Args>
static void def_op(py::module_& m, const char* name, Error (*op)(Call&, Args...) noexcept) {
  m.def(name, [op](Args... args) {
    Call call = {};
    call.counting = true;
    const Error error = op(call, args...);
    if (error) throw py::value_error(error);
    const Scratch scratch(call.taken);
    call = {scratch.data(), call.taken, 0, false, 0, 0};
    {
      py::gil_scoped_release release;
      op(call, args...);
    }
    return std::make_pair(call.ids_outside, call.rows_not_finite);
  });
}

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

  m.def("connect", [error](py::type tensor, py::object api, py::object to_dlpack, py::object empty) {
    if (!error.empty()) throw py::value_error(error);
    connect(tensor, api, to_dlpack, empty);
  });
  m.def("search_bytes", TOKENFLOW_PICK(search_bytes));
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

  m.def("build_info", [isa] {
    py::dict info;
    info["version"] = TOKENFLOW_EXT_VERSION;
    info["compiler"] = __VERSION__;
    py::list built;
    for (int i = 0; i < kIsaCount; ++i) built.append(kIsaNames[i]);
    info["instruction_sets"] = built;
    info["instruction_set"] = kIsaNames[isa];
    info["certified_search"] = isa == 2 && search_state.has_int8_dot ? "int8" : "none";
    info["cuda"] = false;
    return info;
  });
}
