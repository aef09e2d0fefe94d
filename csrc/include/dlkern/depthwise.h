// y = act(depthwise convolution of x + bias), per-channel statistics of y, and the gradients, on the CPU.
//
// Every pointer is the address of the first element of a dense array of `dtype`. x and grad_x are (batch, channels,
// height, width), y and grad_y (batch, channels * multiplier, out_height, out_width), all in the geometry's layout;
// weight and its gradient are contiguous (channels * multiplier, kernel_h, kernel_w); bias and its gradient have
// (channels * multiplier,) elements. mean and var have as many of the wide type: float64 where dtype is float64, else
// float32. A null pointer stands for "not given" or "not wanted". Output channel o reads input channel o / multiplier;
// what lies outside of the image is 0. No size is 0.
#pragma once

#include <cstdint>

#include "dlkern/batch_norm_act.h"

namespace dlkern {

struct DepthwiseGeometry {
  bool channels_last;
  int64_t batch, channels, multiplier, height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  int64_t pad_top, pad_left;  // what is added at the other side shows in the output's size
};

struct DepthwiseForward {
  const void *x, *weight, *bias;
  void *y, *mean, *var;  // written; mean and var (biased) of y as it is stored
  DType dtype;
  DepthwiseGeometry geometry;
  int activation;
  double param;
};

struct DepthwiseBackward {
  const void *grad_y, *x, *weight;
  void *grad_x, *grad_weight, *grad_bias;  // written where not null
  DType dtype;
  DepthwiseGeometry geometry;
};

namespace cpu {

// At most `threads` threads run. Results do not depend on the number of threads, bit for bit.
void depthwise_forward(const DepthwiseForward& args, int threads);
void depthwise_backward(const DepthwiseBackward& args, int threads);

}  // namespace cpu
}  // namespace dlkern
