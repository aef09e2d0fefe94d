// Activations and their gradients on a few values at once, so that the choice is made once for all of them. The
// definitions are kernels/reference/activation.py. Choices are comparisons that are false for a NaN, which stays one.
#pragma once

#include "cuda/cuda_prelude.h"
#include "dlkern/activation.h"

namespace dlkern::cuda {

__device__ __forceinline__ float exp_(float v) { return expf(v); }
__device__ __forceinline__ double exp_(double v) { return exp(v); }
__device__ __forceinline__ float expm1_(float v) { return expm1f(v); }
__device__ __forceinline__ double expm1_(double v) { return expm1(v); }
__device__ __forceinline__ float tanh_(float v) { return tanhf(v); }
__device__ __forceinline__ double tanh_(double v) { return tanh(v); }
__device__ __forceinline__ float erf_(float v) { return erff(v); }
__device__ __forceinline__ double erf_(double v) { return erf(v); }
__device__ __forceinline__ float fma_(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fma_(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ float sqrt_(float v) { return sqrtf(v); }
__device__ __forceinline__ double sqrt_(double v) { return sqrt(v); }

template <class A>
__device__ __forceinline__ A sigmoid(A z) {
  return A(1) / (A(1) + exp_(-z));
}
template <class A>
__device__ __forceinline__ A relu6(A z) {
  return z <= A(0) ? A(0) : z >= A(6) ? A(6) : z;
}
template <class A>
__device__ __forceinline__ A normal_cdf(A z) {
  return A(0.5) * (A(1) + erf_(z * A(0.70710678118654752440)));
}
template <class A>
__device__ __forceinline__ A gelu_tanh_inner(A z) {
  return tanh_(A(0.79788456080286535588) * fma_(A(0.044715) * z * z, z, z));  // sqrt(2 / pi)
}
template <class A>
__device__ __forceinline__ A silu_slope(A z) {
  const A s = sigmoid(z);
  return s * fma_(z, A(1) - s, A(1));
}
template <class A>
__device__ __forceinline__ A gelu_slope(A z) {
  return fma_(z * A(0.39894228040143267794), exp_(A(-0.5) * z * z), normal_cdf(z));  // 1 / sqrt(2 pi)
}
template <class A>
__device__ __forceinline__ A gelu_tanh_slope(A z) {
  const A t = gelu_tanh_inner(z);
  const A inner = A(0.79788456080286535588) * fma_(A(3 * 0.044715) * z, z, A(1));
  return A(0.5) * fma_(z * (A(1) - t * t), inner, A(1) + t);
}
template <class A>
__device__ __forceinline__ A bell(A y) {  // of a sigmoid's output
  return y * (A(1) - y);
}
template <class A>
__device__ __forceinline__ A one_minus_square(A y) {
  return A(1) - y * y;
}

#define DLKERN_EACH(expression)                        \
  _Pragma("unroll") for (int i = 0; i < kCount; ++i) { \
    const A z = v[i];                                  \
    v[i] = (expression);                               \
  }                                                    \
  return;
#define DLKERN_EACH_GRADIENT(expression)               \
  _Pragma("unroll") for (int i = 0; i < kCount; ++i) { \
    const A g = v[i], z = from[i];                     \
    v[i] = (expression);                               \
  }                                                    \
  return;

// v = act(v)
template <int kCount, class A>
__device__ __forceinline__ void activate(int code, A (&v)[kCount], A param) {
  switch (code) {
    case kRelu:
      DLKERN_EACH(z <= A(0) ? A(0) : z)
    case kRelu6:
      DLKERN_EACH(relu6(z))
    case kLeakyRelu:
      DLKERN_EACH(z > A(0) ? z : z * param)
    case kSilu:
      DLKERN_EACH(z / (A(1) + exp_(-z)))
    case kGelu:
      DLKERN_EACH(z * normal_cdf(z))
    case kGeluTanh:
      DLKERN_EACH(A(0.5) * z * (A(1) + gelu_tanh_inner(z)))
    case kHardswish:
      DLKERN_EACH(z * relu6(z + A(3)) * A(1.0 / 6))
    case kHardsigmoid:
      DLKERN_EACH(relu6(z + A(3)) * A(1.0 / 6))
    case kSigmoid:
      DLKERN_EACH(sigmoid(z))
    case kTanh:
      DLKERN_EACH(tanh_(z))
    case kElu:
      DLKERN_EACH(z > A(0) ? z : expm1_(z) * param)
    default:
      return;
  }
}

// v = v * act'(from), with PyTorch's values at the kinks and at NaN
template <int kCount, class A>
__device__ __forceinline__ void activation_gradient(int code, A (&v)[kCount], const A (&from)[kCount], A param) {
  switch (code) {
    case kRelu:
      DLKERN_EACH_GRADIENT(z <= A(0) ? A(0) : g)
    case kRelu6:
      DLKERN_EACH_GRADIENT(z <= A(0) || z >= A(6) ? A(0) : g)
    case kLeakyRelu:
      DLKERN_EACH_GRADIENT(z > A(0) ? g : g * param)
    case kSilu:
      DLKERN_EACH_GRADIENT(g * silu_slope(z))
    case kGelu:
      DLKERN_EACH_GRADIENT(g * gelu_slope(z))
    case kGeluTanh:
      DLKERN_EACH_GRADIENT(g * gelu_tanh_slope(z))
    case kHardswish:
      DLKERN_EACH_GRADIENT(z <= A(-3) ? A(0) : z < A(3) ? g * fma_(z, A(1.0 / 3), A(0.5)) : g)
    case kHardsigmoid:
      DLKERN_EACH_GRADIENT(z > A(-3) && z < A(3) ? g * A(1.0 / 6) : A(0))
    case kSigmoid:
      DLKERN_EACH_GRADIENT(g * bell(sigmoid(z)))
    case kTanh:
      DLKERN_EACH_GRADIENT(g * one_minus_square(tanh_(z)))
    case kElu:
      DLKERN_EACH_GRADIENT(z > A(0) ? g : g * exp_(z) * param)
    default:
      return;
  }
}

// v = v * act'(z) from `from` = act(z), where kernels/activation.py's gradient_from_output holds
template <int kCount, class A>
__device__ __forceinline__ void activation_gradient_from_output(int code, A (&v)[kCount], const A (&from)[kCount],
                                                                A param) {
  switch (code) {
    case kRelu:
      DLKERN_EACH_GRADIENT(z <= A(0) ? A(0) : g)
    case kLeakyRelu:
      DLKERN_EACH_GRADIENT(z > A(0) ? g : g * param)
    case kSigmoid:
      DLKERN_EACH_GRADIENT(g * bell(z))
    case kTanh:
      DLKERN_EACH_GRADIENT(g * one_minus_square(z))
    case kElu:
      DLKERN_EACH_GRADIENT(z > A(0) ? g : g * (z + param))
    default:
      return;
  }
}

#undef DLKERN_EACH
#undef DLKERN_EACH_GRADIENT

}  // namespace dlkern::cuda
