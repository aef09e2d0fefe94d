#include "dlkern/batch_norm_act.h"

#include "bindings/bindings.h"

namespace dlkern::bindings {
namespace {

void batch_norm_act_forward(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t running_mean,
                            uintptr_t running_var, uintptr_t y, uintptr_t mean, uintptr_t invstd, int dtype,
                            int param_dtype, bool channels_last, int64_t outer, int64_t channels, int64_t inner,
                            bool batch_stats, double momentum, double eps, int activation, double param, int64_t y_step,
                            int threads) {
  BatchNormActForward a{};
  a.x = at(x), a.weight = at(weight), a.bias = at(bias), a.residual = at(residual);
  a.running_mean = at(running_mean), a.running_var = at(running_var);
  a.y = at(y), a.mean = at(mean), a.invstd = at(invstd);
  a.dtype = DType(dtype), a.param_dtype = DType(param_dtype);
  a.geometry = Geometry{channels_last, outer, channels, inner};
  a.y_step = y_step;
  a.batch_stats = batch_stats, a.momentum = momentum, a.eps = eps, a.activation = activation, a.param = param;
  const py::gil_scoped_release release;
  cpu::batch_norm_act_forward(a, threads);
}

void batch_norm_act_backward(uintptr_t grad_y, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual,
                             uintptr_t y, uintptr_t mean, uintptr_t invstd, uintptr_t grad_x, uintptr_t grad_weight,
                             uintptr_t grad_bias, uintptr_t grad_residual, int dtype, int param_dtype,
                             bool channels_last, int64_t outer, int64_t channels, int64_t inner, bool batch_stats,
                             int activation, double param, int64_t grad_y_step, int threads) {
  BatchNormActBackward a{};
  a.grad_y = at(grad_y), a.x = at(x), a.weight = at(weight), a.bias = at(bias), a.residual = at(residual);
  a.y = at(y), a.mean = at(mean), a.invstd = at(invstd);
  a.grad_x = at(grad_x), a.grad_weight = at(grad_weight), a.grad_bias = at(grad_bias);
  a.grad_residual = at(grad_residual);
  a.dtype = DType(dtype), a.param_dtype = DType(param_dtype);
  a.geometry = Geometry{channels_last, outer, channels, inner};
  a.grad_y_step = grad_y_step;
  a.batch_stats = batch_stats, a.activation = activation, a.param = param;
  const py::gil_scoped_release release;
  cpu::batch_norm_act_backward(a, threads);
}

}  // namespace

void batch_norm_act(py::module_& m) {
  m.def("batch_norm_act_forward", &batch_norm_act_forward);
  m.def("batch_norm_act_backward", &batch_norm_act_backward);
}

}  // namespace dlkern::bindings
