// How torch's tensors reach the core without a torch header: as DLPack, the C interface that array libraries share.
// torch >= 2.10 fills a DLTensor in place and allocates on request (torch.Tensor.__dlpack_c_exchange_api__); older ones
// wrap a DLTensor in a capsule. Source: dmlc/dlpack, include/dlpack/dlpack.h 1.3, whose ABI the structs of `dl`
// restate.
#pragma once
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <new>

#include "common/view.h"

namespace tokenflow_ext {

namespace dl {

struct Tensor {
  void* data;
  int32_t device_type, device;  // type 1: CPU, 2: CUDA
  int32_t rank;
  uint8_t code, bits;  // code 0: int, 1: unsigned, 2: float, 4: bfloat
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ManagedTensor {
  uint32_t major, minor;
  void* owner;
  void (*release)(ManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeApi {
  uint32_t major, minor;
  const ExchangeApi* older;
  int (*allocate)(const Tensor* like, ManagedTensor** out, void* context,
                  void (*fail)(void*, const char*, const char*));
  int (*managed_from_object)(void* object, ManagedTensor** out);
  int (*object_from_managed)(ManagedTensor* tensor, void** out);
  int (*borrow)(void* object, Tensor* out);
  int (*stream)(int32_t device_type, int32_t device, void** out);
};

}  // namespace dl

// What torch lends the core; set once, by tokenflow_ext.ops._native.
struct Torch {
  PyTypeObject* tensor = nullptr;        // torch.Tensor
  const dl::ExchangeApi* api = nullptr;  // none before torch 2.10
  pybind11::object to_dlpack, empty;     // used then: tensor -> capsule; (bytes, device) -> tensor
};

inline Torch& torch() {
  static Torch* const instance = new Torch;  // never destroyed: Python ends before the library does
  return *instance;
}

inline void connect(pybind11::type tensor, pybind11::object api, pybind11::object to_dlpack, pybind11::object empty) {
  const dl::ExchangeApi* table = nullptr;
  if (!api.is_none()) table = static_cast<dl::ExchangeApi*>(PyCapsule_GetPointer(api.ptr(), "dlpack_exchange_api"));
  if (PyErr_Occurred()) throw pybind11::error_already_set();
  if (table != nullptr && (table->major != 1 || table->borrow == nullptr)) table = nullptr;
  torch() = {reinterpret_cast<PyTypeObject*>(tensor.release().ptr()), table, to_dlpack, empty};
}

inline Type type_of(const dl::Tensor& t) {
  if (t.lanes != 1) return kNone;
  if (t.code == 2) return t.bits == 32 ? kFloat32 : t.bits == 64 ? kFloat64 : t.bits == 16 ? kFloat16 : kNone;
  if (t.code == 4 && t.bits == 16) return kBFloat16;
  return t.code == 0 && t.bits == 64 ? kInt64 : t.code == 1 && t.bits == 8 ? kUInt8 : kNone;
}

// False where the core has no name for the type, or numbers have no address. Of more than kMaxRank axes the first become
// one.
inline bool read(const dl::Tensor& t, View* view) {
  const int joined = t.rank > kMaxRank ? t.rank - kMaxRank : 0;
  *view = {static_cast<char*>(t.data) + t.byte_offset, type_of(t), t.rank - joined,
           t.device_type == 1 ? -1 : t.device,         true,       {}};
  int64_t run = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    if (i >= joined) view->shape[i - joined] = t.shape[i];
    if (i < joined) view->shape[0] *= t.shape[i];
    if (t.shape[i] != 1 && t.strides[i] != run) view->contiguous = false;
    run *= t.shape[i];
  }
  if (run == 0) view->contiguous = true;
  return view->type != kNone && (run == 0 || t.data != nullptr);
}

// The tensor lives while the call does: its caller's argument holds it.
inline bool read(PyObject* object, View* view) {
  if (torch().tensor == nullptr || !PyObject_TypeCheck(object, torch().tensor)) return false;
  if (torch().api != nullptr) {
    dl::Tensor tensor;
    if (torch().api->borrow(object, &tensor) != 0) throw pybind11::error_already_set();
    return read(tensor, view);
  }
  const pybind11::object capsule = torch().to_dlpack(pybind11::handle(object));
  const void* tensor = PyCapsule_GetPointer(capsule.ptr(), "dltensor");
  if (tensor == nullptr) throw pybind11::error_already_set();
  return read(*static_cast<const dl::Tensor*>(tensor), view);
}

// Scratch memory of one call on a CUDA device, or the CPU where that is -1, from torch's allocator, so that its
// accounting, reuse and poison cover it. On CUDA it is the current stream's, and goes back while that still works.
class Scratch {
 public:
  Scratch(int64_t bytes, int device) {
    if (bytes == 0) return;
    if (torch().api == nullptr) {
      tensor_ = torch().empty(bytes, device);
      View view;
      if (!read(tensor_.ptr(), &view)) throw std::bad_alloc();
      data_ = view.data;
    } else {
      int64_t words = (bytes + 7) / 8;
      dl::Tensor like = {nullptr, 1, 0, 1, 0, 64, 1, &words, nullptr, 0};
      if (device >= 0) like.device_type = 2, like.device = device;
      if (torch().api->allocate(&like, &managed_, nullptr, [](void*, const char*, const char*) {}) != 0)
        throw std::bad_alloc();
      data_ = managed_->tensor.data;
    }
    if (device < 0) prefer_large_pages(bytes);
  }
  ~Scratch() {
    if (managed_ != nullptr) managed_->release(managed_);
  }
  Scratch(const Scratch&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  // Packed codes are met at random: with pages of 4 KB most of them miss the processor's table of pages. A wish, which
  // the system may ignore.
  void prefer_large_pages(int64_t bytes) {
    constexpr uintptr_t kPage = 2 << 20;
    const uintptr_t at = reinterpret_cast<uintptr_t>(data_), first = (at + kPage - 1) / kPage * kPage;
    const uintptr_t last = (at + static_cast<uintptr_t>(bytes)) / kPage * kPage;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }

  void* data_ = nullptr;
  dl::ManagedTensor* managed_ = nullptr;
  pybind11::object tensor_;
};

}  // namespace tokenflow_ext
