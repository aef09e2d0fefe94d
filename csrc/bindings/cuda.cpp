// The CUDA kernels as numbers and bytes: the plans in kernels/cuda decide grids, blocks and arguments. Always compiled;
// without DLKERN_CUDA_ARCHITECTURES (a list in words, set by csrc/build_cuda.py) there are no kernels, and calls say
// so.
#include <stdexcept>
#include <string>

#include "bindings/bindings.h"

#ifdef DLKERN_CUDA_ARCHITECTURES
#include "cuda/batch_norm_act.h"
#include "cuda/depthwise.h"
#include "cuda/device.h"
#include "dlkern/batch_norm_act.h"
#endif

namespace dlkern::bindings {
namespace {

#ifdef DLKERN_CUDA_ARCHITECTURES

// Each op's kernels, in the order of the numbers that Python uses.
struct OpKernels {
  const char* (*kernel)(int index);
  int (*launch)(int index, unsigned grid_x, unsigned grid_y, unsigned threads, unsigned shared_bytes, int device,
                void* stream, const void* args);
  size_t args_size;
};
const OpKernels kOps[] = {
    {dlkern_cuda_batch_norm_act_kernel, dlkern_cuda_batch_norm_act_launch, sizeof(cuda::BatchNormActArgs)},
    {dlkern_cuda_depthwise_kernel, dlkern_cuda_depthwise_launch, sizeof(cuda::DepthwiseArgs)},
};

[[noreturn]] void fail(int code, const std::string& what) {
  std::string text = what + ": " + dlkern_cuda_error_text(code) + " (CUDA error " + std::to_string(code) + ")";
  if (dlkern_cuda_probe() != 0) text += "; the cuda backend needs a CUDA device and a driver as new as its runtime";
  throw std::runtime_error(text);
}

py::list cuda_kernels() {
  py::list names;
  for (const OpKernels& op : kOps)
    for (int i = 0; op.kernel(i) != nullptr; ++i) names.append(op.kernel(i));
  return names;
}

void cuda_launch(int index, unsigned grid_x, unsigned grid_y, unsigned threads, unsigned shared_bytes, int device,
                 uintptr_t stream, const py::bytes& args) {
  const std::string packed = args;
  int local = index;
  for (const OpKernels& op : kOps) {
    int count = 0;
    while (op.kernel(count) != nullptr) ++count;
    if (local >= 0 && local < count) {
      if (packed.size() != op.args_size)
        throw std::invalid_argument("expected " + std::to_string(op.args_size) + " bytes of arguments, got " +
                                    std::to_string(packed.size()));
      int code = 0;
      {
        const py::gil_scoped_release release;  // a full queue makes a launch wait
        code = op.launch(local, grid_x, grid_y, threads, shared_bytes, device, at(stream), packed.data());
      }
      if (code != 0) fail(code, std::string("launch of ") + op.kernel(local));
      return;
    }
    local -= count;
  }
  throw std::invalid_argument("there is no kernel " + std::to_string(index));
}

std::string cuda_problem() {
  const int code = dlkern_cuda_probe();
  return code == 0 ? "" : std::string(dlkern_cuda_error_text(code)) + " (CUDA error " + std::to_string(code) + ")";
}

#else

[[noreturn]] void missing() { throw std::runtime_error("dlkern._C was built without CUDA kernels"); }

py::list cuda_kernels() { return py::list(); }

void cuda_launch(int, unsigned, unsigned, unsigned, unsigned, int, uintptr_t, const py::bytes&) { missing(); }

std::string cuda_problem() { return "dlkern._C was built without CUDA kernels"; }

#endif

}  // namespace

void cuda(py::module_& m) {
  m.def("cuda_kernels", &cuda_kernels, "The CUDA kernels by name, in the order of their numbers; [] without CUDA.");
  m.def("cuda_launch", &cuda_launch, "Start kernel `index`; RuntimeError with CUDA's own words where it cannot.");
  m.def("cuda_problem", &cuda_problem, "Why CUDA kernels of this module cannot run here; '' where they can.");
}

}  // namespace dlkern::bindings
