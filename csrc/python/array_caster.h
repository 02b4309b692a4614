// Turns a torch tensor or a numpy array into an Array, without torch or numpy headers: through
// DLPack.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "common/array.h"
#include "common/dlpack.h"

namespace instembed::python {

namespace py = pybind11;

inline DType dtype_of(dlpack::DataType type) {
  const auto unsupported = [&] {
    throw py::type_error("unsupported element type: DLPack code " + std::to_string(type.code) +
                         ", " + std::to_string(type.bits) + " bits, " + std::to_string(type.lanes) +
                         " lanes");
  };
  if (type.lanes != 1) unsupported();
  switch (type.code << 8 | type.bits) {
    case 0 << 8 | 8:
      return DType::i8;
    case 0 << 8 | 16:
      return DType::i16;
    case 0 << 8 | 32:
      return DType::i32;
    case 0 << 8 | 64:
      return DType::i64;
    case 1 << 8 | 8:
      return DType::u8;
    case 1 << 8 | 16:
      return DType::u16;
    case 1 << 8 | 32:
      return DType::u32;
    case 1 << 8 | 64:
      return DType::u64;
    case 2 << 8 | 16:
      return DType::f16;
    case 2 << 8 | 32:
      return DType::f32;
    case 2 << 8 | 64:
      return DType::f64;
    case 4 << 8 | 16:
      return DType::bf16;
    case 6 << 8 | 8:
      return DType::u8;  // bool: a byte that is 0 or 1
    default:
      unsupported();
  }
  return DType::f32;
}

inline Array view_of(const dlpack::Tensor& tensor) {
  if (tensor.ndim > Array::kMaxDims) {
    throw py::value_error("arrays of more than " + std::to_string(Array::kMaxDims) + " dimensions");
  }
  Array array;
  array.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  array.dtype = dtype_of(tensor.dtype);
  array.ndim = tensor.ndim;
  int64_t stride = 1;
  for (int k = tensor.ndim - 1; k >= 0; --k) {
    array.shape[k] = tensor.shape[k];
    array.strides[k] = tensor.strides ? tensor.strides[k] : stride;
    stride *= tensor.shape[k];
  }
  return array;
}

// The C exchange interface of the object's type, where it has one (torch 2.10 and later).
inline const dlpack::ExchangeApi* exchange_api(py::handle object) {
  const py::object capsule =
      py::getattr(py::type::handle_of(object), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* api =
      static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api && api->version.major != 1) api = api->previous;
  return api && api->borrow_from_object ? api : nullptr;
}

}  // namespace instembed::python

namespace pybind11::detail {

template <>
struct type_caster<instembed::Array> {
  PYBIND11_TYPE_CASTER(instembed::Array, const_name("Array"));

  bool load(handle source, bool) {
    namespace ours = instembed::python;
    namespace dlpack = instembed::dlpack;
    if (source.is_none()) return false;
    if (const auto* api = ours::exchange_api(source)) {
      dlpack::Tensor tensor{};
      if (api->borrow_from_object(source.ptr(), &tensor) != 0) throw error_already_set();
      value = ours::view_of(tensor);
      return true;
    }
    if (!hasattr(source, "__dlpack__")) return false;
    // A tensor that requires grad refuses to export itself; its detached alias does not.
    object exporter = reinterpret_borrow<object>(source);
    if (hasattr(source, "detach")) exporter = source.attr("detach")();
    keep_alive_ = exporter.attr("__dlpack__")();
    if (!PyCapsule_IsValid(keep_alive_.ptr(), "dltensor")) return false;
    value = ours::view_of(
        static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(keep_alive_.ptr(), "dltensor"))
            ->tensor);
    return true;
  }

 private:
  object keep_alive_;  // an unconsumed capsule frees what it holds when it goes
};

}  // namespace pybind11::detail
