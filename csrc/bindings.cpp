// The module dlkern._C: functions over addresses, sizes and codes. It knows nothing of torch; the launchers in
// kernels/ own all checks and all allocation. Addresses are integers, 0 for "not given".
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "dlkern/batch_norm_act.h"

namespace py = pybind11;

namespace {

using dlkern::DType;
using dlkern::Geometry;

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

void batch_norm_act_forward(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t running_mean,
                            uintptr_t running_var, uintptr_t y, uintptr_t mean, uintptr_t invstd, int dtype,
                            int param_dtype, bool channels_last, int64_t outer, int64_t channels, int64_t inner,
                            bool batch_stats, double momentum, double eps, int activation, double param, int threads) {
  dlkern::BatchNormActForward a{};
  a.x = at(x), a.weight = at(weight), a.bias = at(bias), a.residual = at(residual);
  a.running_mean = at(running_mean), a.running_var = at(running_var);
  a.y = at(y), a.mean = at(mean), a.invstd = at(invstd);
  a.dtype = DType(dtype), a.param_dtype = DType(param_dtype);
  a.geometry = Geometry{channels_last, outer, channels, inner};
  a.batch_stats = batch_stats, a.momentum = momentum, a.eps = eps, a.activation = activation, a.param = param;
  const py::gil_scoped_release release;
  dlkern::cpu::batch_norm_act_forward(a, threads);
}

void batch_norm_act_backward(uintptr_t grad_y, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual,
                             uintptr_t y, uintptr_t mean, uintptr_t invstd, uintptr_t grad_x, uintptr_t grad_weight,
                             uintptr_t grad_bias, uintptr_t grad_residual, int dtype, int param_dtype,
                             bool channels_last, int64_t outer, int64_t channels, int64_t inner, bool batch_stats,
                             int activation, double param, int threads) {
  dlkern::BatchNormActBackward a{};
  a.grad_y = at(grad_y), a.x = at(x), a.weight = at(weight), a.bias = at(bias), a.residual = at(residual);
  a.y = at(y), a.mean = at(mean), a.invstd = at(invstd);
  a.grad_x = at(grad_x), a.grad_weight = at(grad_weight), a.grad_bias = at(grad_bias);
  a.grad_residual = at(grad_residual);
  a.dtype = DType(dtype), a.param_dtype = DType(param_dtype);
  a.geometry = Geometry{channels_last, outer, channels, inner};
  a.batch_stats = batch_stats, a.activation = activation, a.param = param;
  const py::gil_scoped_release release;
  dlkern::cpu::batch_norm_act_backward(a, threads);
}

const char* name(dlkern::cpu::Isa isa) { return isa == dlkern::cpu::kAvx2 ? "avx2" : "portable"; }

void set_isa(const std::string& wanted) {
  dlkern::cpu::Isa isa = dlkern::cpu::kPortable;
  if (wanted == "best")
    isa = dlkern::cpu::best_isa();
  else if (wanted == "avx2")
    isa = dlkern::cpu::kAvx2;
  else if (wanted != "portable")
    throw std::invalid_argument("unknown instruction set '" + wanted + "'; expected portable, avx2 or best");
  if (isa > dlkern::cpu::best_isa()) throw std::invalid_argument("this processor or build has no " + wanted);
  dlkern::cpu::set_isa(isa);
}

py::dict build_info() {
  py::list compiled;
  compiled.append("portable");
  if (DLKERN_HAS_AVX2) compiled.append("avx2");
  py::dict info;
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = std::string("gcc ") + __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cpu_isa_compiled"] = compiled;
  info["cpu_isa_active"] = name(dlkern::cpu::active_isa());
  info["cuda_architectures"] = py::list();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of dlkern over raw addresses; call them through dlkern.kernels.";
  m.def("batch_norm_act_forward", &batch_norm_act_forward);
  m.def("batch_norm_act_backward", &batch_norm_act_backward);
  m.def("build_info", &build_info, "How this module was built, and which instruction set its CPU kernels use.");
  m.def("set_isa", &set_isa, "Make the CPU kernels use 'portable', 'avx2' or the 'best' of this processor.");
}
