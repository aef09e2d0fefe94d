// The module dlkern._C: functions over addresses, sizes and codes. It knows nothing of torch; the launchers in
// kernels/ own all checks and all allocation. Addresses are integers, 0 for "not given".
#include <sstream>
#include <stdexcept>
#include <string>

#include "bindings/bindings.h"
#include "cpu/isa.h"

namespace {

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
  py::list architectures;
#ifdef DLKERN_CUDA_ARCHITECTURES
  std::istringstream words(DLKERN_CUDA_ARCHITECTURES);
  for (std::string word; words >> word;) architectures.append(word);
  info["nvcc"] = DLKERN_NVCC_VERSION;
#else
  info["nvcc"] = py::none();
#endif
  info["cuda_architectures"] = architectures;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of dlkern over raw addresses; call them through dlkern.kernels.";
  dlkern::bindings::attention(m);
  dlkern::bindings::batch_norm_act(m);
  dlkern::bindings::cuda(m);
  dlkern::bindings::depthwise(m);
  dlkern::bindings::recurrent(m);
  m.def("build_info", &build_info, "How this module was built, and which instruction set its CPU kernels use.");
  m.def("set_isa", &set_isa, "Make the CPU kernels use 'portable', 'avx2' or the 'best' of this processor.");
}
