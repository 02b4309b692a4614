// The part of the DLPack 1.x ABI that a consumer of tensors needs, written down from its
// specification (https://dmlc.github.io/dlpack). Layout and order of the fields are the contract;
// names are ours.
#pragma once

#include <cstdint>

namespace instembed::dlpack {

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type;  // 1 CPU, 2 CUDA, 3 CUDA host memory
  int32_t id;
};

struct DataType {
  uint8_t code;  // 0 int, 1 uint, 2 float, 4 bfloat, 6 bool
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means row-major
  uint64_t byte_offset;
};

// What `tensor.__dlpack__()` hands over, in a capsule named "dltensor".
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

// What `type(tensor).__dlpack_c_exchange_api__` points at, in a capsule named
// "dlpack_exchange_api".
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*borrow_from_object)(void* object, Tensor* out);  // may be null; the object keeps ownership
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace instembed::dlpack
