// One function an op, which adds its functions to the module dlkern._C.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

namespace dlkern::bindings {

inline void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

void attention(py::module_& m);
void batch_norm_act(py::module_& m);
void cuda(py::module_& m);
void depthwise(py::module_& m);
void recurrent(py::module_& m);

}  // namespace dlkern::bindings
