// How an op becomes a Python function, for every backend: what its arguments are read from, the two runs, the errors.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <utility>

#include "tensors.h"

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

// Where an op runs is what Python passes last: the threads of the CPU,
inline Call on_cpu(int threads) {
  Call call = {};
  call.threads = threads;
  call.device = -1;
  return call;
}

// Whether searches on CUDA that begin now are certified (cuda/certified.cuh): for the whole process, as on the CPU.
inline bool certified_on_cuda = false;

// or a CUDA device (-1: emulated), its stream, and what it counts: int64 [2], [5] while searches are traced, or none.
inline Call on_cuda(int device, int64_t stream, View counts) {
  if (counts.type != kNone &&
      (counts.type != kInt64 || counts.rank != 1 || (counts.shape[0] != 2 && counts.shape[0] != 5)))
    throw pybind11::value_error("counts: wanted int64 [2], [5] or None");
  Call call = {};
  call.device = device;
  call.stream = reinterpret_cast<void*>(stream);
  call.counts = static_cast<int64_t*>(counts.data);
  call.searched = counts.type != kNone && counts.shape[0] == 5 ? call.counts + 2 : nullptr;
  call.certified = certified_on_cuda;
  return call;
}

// op(args..., where...) in Python. It runs twice: first it counts the scratch that it takes, then it has it. Returns
// (ids outside, rows not finite), as far as they were counted by then.
template <class... Args, class... Where>
void def_op(pybind11::module_& m, const char* name, Error (*op)(Call&, Args...) noexcept, Call (*at)(Where...)) {
  m.def(name, [op, at](Args... args, Where... where) {
    Call call = at(where...);
    call.counting = true;
    if (const Error error = op(call, args...)) throw pybind11::value_error(error);
    const Scratch scratch(call.taken, call.device);
    call.scratch = scratch.data();
    call.size = call.taken;
    call.taken = 0;
    call.counting = false;
    {
      pybind11::gil_scoped_release release;
      op(call, args...);
    }
    if (call.failure) throw std::runtime_error(call.failure);
    return std::make_pair(call.ids_outside, call.rows_not_finite);
  });
}

}  // namespace tokenflow_ext
