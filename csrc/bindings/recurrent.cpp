#include "dlkern/recurrent.h"

#include "bindings/bindings.h"

namespace dlkern::bindings {
namespace {

RecurrentSize make_size(int dtype, int cell, int64_t steps, int64_t batch, int64_t rows, int64_t inputs, int64_t hidden,
                        int64_t outputs, uintptr_t batch_sizes, bool reverse) {
  return RecurrentSize{DType(dtype),
                       RecurrentCell(cell),
                       steps,
                       batch,
                       rows,
                       inputs,
                       hidden,
                       outputs,
                       static_cast<const int64_t*>(at(batch_sizes)),
                       reverse};
}

// From (activation, recurrent_activation, param, recurrent_param, then the pointers in their order); None: no variant.
const RecurrentVariant* make_variant(const py::object& given, RecurrentVariant& made) {
  if (given.is_none()) return nullptr;
  const auto t = given.cast<py::tuple>();
  const auto pointer = [&](int i) { return at(t[4 + i].cast<uintptr_t>()); };
  made = RecurrentVariant{Activation(t[0].cast<int>()),
                          Activation(t[1].cast<int>()),
                          t[2].cast<double>(),
                          t[3].cast<double>(),
                          pointer(0),
                          pointer(1),
                          pointer(2),
                          pointer(3),
                          pointer(4),
                          pointer(5),
                          pointer(6),
                          pointer(7),
                          pointer(8),
                          pointer(9),
                          pointer(10),
                          pointer(11)};
  return &made;
}

void recurrent_forward(int dtype, int cell, int64_t steps, int64_t batch, int64_t rows, int64_t inputs, int64_t hidden,
                       int64_t outputs, uintptr_t batch_sizes, bool reverse, uintptr_t x, uintptr_t weight_ih,
                       uintptr_t bias_ih, uintptr_t weight_hh, uintptr_t bias_hh, uintptr_t weight_hr, uintptr_t h0,
                       uintptr_t c0, uintptr_t gates, uintptr_t cells, uintptr_t extra, uintptr_t output, uintptr_t h_n,
                       uintptr_t c_n, bool saves, int threads, const py::object& variant) {
  RecurrentForward a{};
  RecurrentVariant made;
  a.variant = make_variant(variant, made);
  a.size = make_size(dtype, cell, steps, batch, rows, inputs, hidden, outputs, batch_sizes, reverse);
  a.x = at(x), a.weight_ih = at(weight_ih), a.bias_ih = at(bias_ih);
  a.weight_hh = at(weight_hh), a.bias_hh = at(bias_hh), a.weight_hr = at(weight_hr);
  a.h0 = at(h0), a.c0 = at(c0), a.gates = at(gates), a.cells = at(cells), a.extra = at(extra);
  a.output = at(output), a.h_n = at(h_n), a.c_n = at(c_n), a.saves = saves;
  const py::gil_scoped_release release;
  cpu::recurrent_forward(a, threads);
}

void recurrent_backward(int dtype, int cell, int64_t steps, int64_t batch, int64_t rows, int64_t inputs, int64_t hidden,
                        int64_t outputs, uintptr_t batch_sizes, bool reverse, uintptr_t grad_output,
                        uintptr_t weight_hh, uintptr_t weight_hr, bool transposed, uintptr_t h0, uintptr_t c0,
                        uintptr_t output, uintptr_t gates, uintptr_t cells, uintptr_t extra, uintptr_t grad_h,
                        uintptr_t grad_c, uintptr_t grad_gates, uintptr_t grad_extra, uintptr_t scratch, int threads,
                        const py::object& variant) {
  RecurrentBackward a{};
  RecurrentVariant made;
  a.variant = make_variant(variant, made);
  a.size = make_size(dtype, cell, steps, batch, rows, inputs, hidden, outputs, batch_sizes, reverse);
  a.grad_output = at(grad_output), a.weight_hh = at(weight_hh), a.weight_hr = at(weight_hr);
  a.transposed = transposed, a.h0 = at(h0), a.c0 = at(c0), a.output = at(output), a.gates = at(gates),
  a.cells = at(cells), a.extra = at(extra);
  a.grad_h = at(grad_h), a.grad_c = at(grad_c), a.grad_gates = at(grad_gates), a.grad_extra = at(grad_extra);
  a.scratch = at(scratch);
  const py::gil_scoped_release release;
  cpu::recurrent_backward(a, threads);
}

}  // namespace

void recurrent(py::module_& m) {
  m.def("recurrent_forward", &recurrent_forward);
  m.def("recurrent_backward", &recurrent_backward);
}

}  // namespace dlkern::bindings
