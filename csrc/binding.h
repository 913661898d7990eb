// What the parts of the Python module farlight._cpu share: addresses and strides as C++ views, and Python's signals.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include <nanobind/nanobind.h>

#include "parallel.h"
#include "views.h"

namespace farlight {

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, batch stride, head stride, row stride); strides count elements.
using StridedAddress = std::vector<int64_t>;

inline TensorView tensor_view(const StridedAddress& from) {
  if (from.size() != 4) throw std::invalid_argument("a tensor is (address, batch stride, head stride, row stride)");
  return {pointer<const void>(from[0]), from[1], from[2], from[3]};
}

// Polls for signals when called from Python's main thread, else not at all. Where a handler raises (KeyboardInterrupt), the
// poll throws.
InterruptCheck signal_check();

void bind_plan(nanobind::module_& m);      // plan_binding.cpp
void bind_content(nanobind::module_& m);   // content_binding.cpp
void bind_decode(nanobind::module_& m);    // decode_binding.cpp
void bind_analysis(nanobind::module_& m);  // analysis/binding.cpp

}  // namespace farlight
