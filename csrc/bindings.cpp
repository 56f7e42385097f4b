// The only door to Python: one line per op, and build_info(). Kernels run without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "common/multiscale_ops.h"
#include "common/ops.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace tokenflow_ext {
namespace baseline { TOKENFLOW_DECLARE_OPS TOKENFLOW_DECLARE_MULTISCALE_OPS }
#ifdef TOKENFLOW_X86
namespace avx2 { TOKENFLOW_DECLARE_OPS TOKENFLOW_DECLARE_MULTISCALE_OPS }
namespace avx512 { TOKENFLOW_DECLARE_OPS TOKENFLOW_DECLARE_MULTISCALE_OPS }
#define TOKENFLOW_OP(name) def_op(m, #name, isa == 2 ? avx512::name : isa == 1 ? avx2::name : baseline::name)
#else
#define TOKENFLOW_OP(name) def_op(m, #name, baseline::name)
#endif
}  // namespace tokenflow_ext

namespace pybind11::detail {

// (pointer, type, shape, strides, device) or None; built by tokenflow_ext.ops._native.view.
template <>
struct type_caster<tokenflow_ext::View> {
  PYBIND11_TYPE_CASTER(tokenflow_ext::View, const_name("View"));
  bool load(handle src, bool) {
    value = {nullptr, tokenflow_ext::kNone, 0, -1, true, {}};
    if (src.is_none()) return true;
    if (!PyTuple_Check(src.ptr()) || PyTuple_GET_SIZE(src.ptr()) != 5) return false;
    auto t = reinterpret_borrow<tuple>(src);
    auto shape = reinterpret_borrow<tuple>(t[2]), strides = reinterpret_borrow<tuple>(t[3]);
    if (!PyTuple_Check(shape.ptr()) || !PyTuple_Check(strides.ptr()) || shape.size() != strides.size() ||
        shape.size() > tokenflow_ext::kMaxRank)
      return false;
    value.data = reinterpret_cast<void*>(t[0].cast<uintptr_t>());
    value.type = static_cast<tokenflow_ext::Type>(t[1].cast<int>());
    value.rank = static_cast<int>(shape.size());
    value.device = t[4].cast<int>();
    int64_t run = 1;
    for (int i = value.rank - 1; i >= 0; --i) {
      value.shape[i] = shape[i].cast<int64_t>();
      if (value.shape[i] != 1 && strides[i].cast<int64_t>() != run) value.contiguous = false;
      run *= value.shape[i];
    }
    if (run == 0) value.contiguous = true;
    return true;
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

}  // namespace tokenflow_ext

PYBIND11_MODULE(_C, m) {
  using namespace tokenflow_ext;
  const char* error = nullptr;
  const int isa = choose_isa(&error);
  if (error) throw py::import_error(error);

  TOKENFLOW_OP(normalize_rows);
  TOKENFLOW_OP(normalize_rows_backward);
  TOKENFLOW_OP(nearest_code);
  TOKENFLOW_OP(quantize);
  TOKENFLOW_OP(quantize_backward);
  TOKENFLOW_OP(lookup);
  TOKENFLOW_OP(lookup_backward);
  TOKENFLOW_OP(code_statistics);
  TOKENFLOW_OP(ema_update);
  TOKENFLOW_OP(multiscale_quantize);
  TOKENFLOW_OP(multiscale_quantize_backward);
  TOKENFLOW_OP(multiscale_rows);
  TOKENFLOW_OP(multiscale_rows_backward);
  TOKENFLOW_OP(multiscale_decode);
  TOKENFLOW_OP(multiscale_decode_backward);
  TOKENFLOW_OP(multiscale_chain);
  TOKENFLOW_OP(multiscale_chain_backward);

  m.def("build_info", [isa] {
    py::dict info;
    info["version"] = TOKENFLOW_EXT_VERSION;
    info["compiler"] = __VERSION__;
    py::list built;
#ifdef TOKENFLOW_X86
    for (const char* name : kIsaNames) built.append(name);
#else
    built.append(kIsaNames[0]);
#endif
    info["instruction_sets"] = built;
    info["instruction_set"] = kIsaNames[isa];
    info["cuda"] = false;
    return info;
  });
}
