// Addresses and strides of torch tensors, read through the function table that their class publishes for this
// (`torch.Tensor.__dlpack_c_exchange_api__`, DLPack 1.3; torch >= 2.10): a tenth of the time of their Python attributes.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>

#include <nanobind/nanobind.h>

#include "decode.h"

namespace farlight {

class TensorReader {
 public:
  // Raises where the class has no table of a version that is known here.
  explicit TensorReader(nanobind::handle tensor_class) : class_(tensor_class.ptr()) {
    const nanobind::object capsule = tensor_class.attr("__dlpack_c_exchange_api__");
    const auto* table = static_cast<const Table*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!table) throw nanobind::python_error();
    if (table->major != 1 || !table->read) throw std::invalid_argument("another version of DLPack");
    read_ = table->read;
    is_neg_ = PyUnicode_InternFromString("is_neg");
    requires_grad_ = PyUnicode_InternFromString("requires_grad");
  }

  // A (B, H, 1, D) tensor of host memory; nothing for one of another shape or dtype, a subclass, rows that are not contiguous,
  // negated memory, no memory, or, with `grad`, one that requires grad. heads = 0: any.
  std::optional<TensorView> token(nanobind::handle x, KeyType type, int64_t batch, int64_t& heads, int64_t dim, bool grad) const {
    if (reinterpret_cast<PyObject*>(Py_TYPE(x.ptr())) != class_) return {};
    Tensor t;
    if (read_(x.ptr(), &t)) return PyErr_Clear(), std::nullopt;
    const int bits = type == KeyType::f32 ? 32 : 16, code = type == KeyType::bf16 ? kBfloat : kFloat;
    if (t.device != kHost || t.ndim != 4 || t.code != code || t.bits != bits || t.lanes != 1 || !t.data) return {};
    if (t.shape[0] != batch || (heads && t.shape[1] != heads) || t.shape[2] != 1 || t.shape[3] != dim) return {};
    if (dim != 1 && t.strides[3] != 1) return {};
    if (is(x, is_neg_, true) || (grad && is(x, requires_grad_, false))) return {};
    heads = t.shape[1];
    return TensorView{static_cast<const char*>(t.data) + t.byte_offset, t.strides[0], t.strides[1], t.strides[2]};
  }

 private:
  static constexpr int32_t kHost = 1;
  static constexpr uint8_t kFloat = 2, kBfloat = 4;
  // DLTensor and DLPackExchangeAPI of dlpack.h, as far as they are read here.
  struct Tensor {
    void* data;
    int32_t device, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
  };
  struct Table {
    uint32_t major, minor;
    const void* previous;
    void (*allocate)();
    void (*from_object)();
    void (*to_object)();
    int (*read)(void* object, Tensor* to);
  };

  // Whether an attribute, or a method without arguments, is true; an error is.
  static bool is(nanobind::handle x, PyObject* name, bool call) {
    PyObject* value = call ? PyObject_CallMethodNoArgs(x.ptr(), name) : PyObject_GetAttr(x.ptr(), name);
    if (!value) return PyErr_Clear(), true;
    const bool answer = value != Py_False;
    Py_DECREF(value);
    return answer;
  }

  PyObject *class_, *is_neg_, *requires_grad_;  // kept for the life of the process
  int (*read_)(void* object, Tensor* to);
};

}  // namespace farlight
