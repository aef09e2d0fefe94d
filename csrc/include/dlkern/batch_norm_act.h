// y = act((x - mean) * invstd * weight + bias + residual) and its gradients, on the CPU.
//
// Every pointer is the address of the first element of a dense array. "data" arrays (x, y, residual and their
// gradients) have the geometry's layout and `dtype`; weight, bias, running statistics and the gradients of weight
// and bias have (channels,) elements of `param_dtype`; mean and invstd have (channels,) elements of the wide type:
// float64 where dtype is float64, else float32. A null pointer stands for "not given" or "not wanted".
#pragma once

#include <cstdint>

namespace dlkern {

enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// rows (channels last): `outer` rows of `channels` elements, inner = 1.
// planes: `outer` images of `channels` planes of `inner` elements.
struct Geometry {
  bool channels_last;
  int64_t outer, channels, inner;
};

// y and grad_y may be channels of a wider map (a concatenation): y_step and grad_y_step are the elements from one image
// (rows: from one row) to the next, channels * inner where the map has no other channels. All else is dense.
struct BatchNormActForward {
  const void *x, *residual, *weight, *bias;
  void *running_mean, *running_var;  // moved in place with batch_stats; read without
  void *y, *mean, *invstd;           // written
  int64_t y_step;
  DType dtype, param_dtype;
  Geometry geometry;
  bool batch_stats;
  double momentum, eps;
  int activation;
  double param;
};

struct BatchNormActBackward {
  const void *grad_y, *x, *residual, *y, *weight, *bias, *mean, *invstd;
  int64_t grad_y_step;
  void *grad_x, *grad_weight, *grad_bias, *grad_residual;  // written where not null
  DType dtype, param_dtype;
  Geometry geometry;
  bool batch_stats;
  int activation;
  double param;
};

namespace cpu {

// At most `threads` threads run (fewer for small tensors, and never more than one where `threads` is 1).
// Results do not depend on the number of threads, bit for bit.
void batch_norm_act_forward(const BatchNormActForward& args, int threads);
void batch_norm_act_backward(const BatchNormActBackward& args, int threads);

}  // namespace cpu
}  // namespace dlkern
