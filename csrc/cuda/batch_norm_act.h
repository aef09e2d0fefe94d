// The one argument of every kernel of batch_norm_act.cu, and the entries of its host part.
// kernels/cuda/batch_norm_act_plan.py packs the argument; the fields there have the same order.
#pragma once

namespace dlkern::cuda {

// "data" arrays (x, residual, y and the gradients like them) are dense; mean, invstd, partial and means are in the wide
// type (float64 for float64, else float32); weight, bias and running statistics are (channels,) of `param_kind`.
// A null pointer stands for "not given" or "not wanted".
struct BatchNormActArgs {
  void *x, *residual, *weight, *bias, *y, *grad_y;
  void *mean, *invstd;               // (channels,)
  void *running_mean, *running_var;  // (channels,)
  void* partial;                     // [2, splits, channels]: what each share of a reduction leaves
  void* means;                       // [2, channels]: mean of dz; mean of dz * xhat, times invstd
  void *grad_x, *grad_weight, *grad_bias, *grad_residual;
  long long outer, channels, inner;  // rows: inner = 1; planes: outer x channels x inner
  long long share;                   // of one block in y of the grid: rows, or packs of a channel's planes
  long long share_elements, count;   // elements of a channel: in one share, in all
  double momentum, eps, param;       // param: the activation's
  int param_kind, grad_weight_kind, grad_bias_kind;
  int activation;
  int threads_c;  // threads of a block side by side along channels (a power of two); 1 for planes
  int splits;     // shares
  int batch_stats;
  int data_kind;  // of x
};

static_assert(sizeof(BatchNormActArgs) == 232, "kernels/cuda/batch_norm_act_plan.py packs 232 bytes");

}  // namespace dlkern::cuda

#ifndef __CUDACC_RTC__
extern "C" {
// The name of kernel `index` as NVRTC takes it ("dlkern::cuda::batch_norm_act::forward<float, 4, true>"), or null.
const char* dlkern_cuda_batch_norm_act_kernel(int index);
// Starts kernel `index` on a stream of a device. `args` is a BatchNormActArgs. 0, or CUDA's error code.
int dlkern_cuda_batch_norm_act_launch(int index, unsigned grid_x, unsigned grid_y, unsigned threads,
                                      unsigned shared_bytes, int device, void* stream, const void* args);
}
#endif
