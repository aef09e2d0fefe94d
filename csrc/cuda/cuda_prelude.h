// All that device code takes from CUDA. Three compilers read the sources in this folder:
//
//   nvcc   the extension dlkern._C
//   NVRTC  kernels/cuda/nvrtc.py (defines __CUDACC_RTC__): no headers of the host, not even <cstdint>; host code is
//          left out by #ifndef __CUDACC_RTC__
//   g++    tests, with -DDLKERN_HOST_SHIM: the blocks run on the CPU. "host_shim.h" stands in for CUDA and defines
//            __global__ __device__ __host__ __forceinline__ __restrict__ __launch_bounds__(...)
//            threadIdx blockIdx blockDim gridDim (.x .y .z), __syncthreads()
//            __half __nv_bfloat16, __half2float __float2half_rn __bfloat162float __float2bfloat16_rn
//            DLKERN_DYNAMIC_SHARED(name)   a declaration: `name` is an unsigned char* to the block's dynamic shared
//                                          memory, aligned to 16 bytes
//            DLKERN_LAUNCH(function, grid_x, grid_y, threads, shared_bytes, device, stream, argument)
//                                          an int expression: runs a __global__ function of one argument over the
//                                          grid; 0, or an error code
//          and <cmath>'s expf exp expm1f expm1 tanhf tanh erff erf fmaf fma sqrtf sqrt in the global namespace.
//
// Plain CUDA C++ only: what is not in this list, the shim does not run.
#pragma once

#if defined(DLKERN_HOST_SHIM)

#include "host_shim.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DLKERN_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

#ifndef __CUDACC_RTC__

#include <cuda_runtime.h>

namespace dlkern::cuda {

// The runtime in this file is linked statically and has a current device of its own, which is made PyTorch's.
template <class Argument>
int launch(void (*function)(Argument), unsigned grid_x, unsigned grid_y, unsigned threads, unsigned shared_bytes,
           int device, void* stream, const Argument& argument) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return (int)error;
  void* arguments[] = {const_cast<Argument*>(&argument)};
  const cudaError_t launched =
      cudaLaunchKernel(reinterpret_cast<const void*>(function), dim3(grid_x, grid_y), dim3(threads), arguments,
                       shared_bytes, static_cast<cudaStream_t>(stream));
  const cudaError_t left = cudaGetLastError();
  return (int)(launched != cudaSuccess ? launched : left);
}

}  // namespace dlkern::cuda

#define DLKERN_LAUNCH(function, grid_x, grid_y, threads, shared_bytes, device, stream, argument) \
  ::dlkern::cuda::launch(function, grid_x, grid_y, threads, shared_bytes, device, stream, argument)

#endif  // __CUDACC_RTC__
#endif  // DLKERN_HOST_SHIM

namespace dlkern::cuda {

using Index = long long;  // offsets and sizes: a tensor may have more than 2^31 elements

// The codes of DType in dlkern/batch_norm_act.h, which has headers that NVRTC lacks.
enum Kind : int { kF32 = 0, kF64 = 1, kBF16 = 2, kF16 = 3 };

// What values of a type are computed in.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T narrow(Wide<T> v) {
  return v;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// kWidth elements that are read and written at once: 16 bytes, or one element where memory is not aligned so.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T v[kWidth];
};

template <class T, int kWidth, class A>
__device__ __forceinline__ void load(const void* base, Index offset, A* out) {
  const Pack<T, kWidth> pack = *reinterpret_cast<const Pack<T, kWidth>*>(static_cast<const T*>(base) + offset);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out[i] = (A)widen(pack.v[i]);
}

template <class T, int kWidth, class A>
__device__ __forceinline__ void store(void* base, Index offset, const A* values) {
  Pack<T, kWidth> pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) pack.v[i] = narrow<T>(values[i]);
  *reinterpret_cast<Pack<T, kWidth>*>(static_cast<T*>(base) + offset) = pack;
}

// kCount elements from `offset`, a multiple of kCount, on; 16 bytes at once where there are so many.
template <class T, int kCount, class A>
__device__ __forceinline__ void load_run(const void* base, Index offset, A (&out)[kCount]) {
  constexpr int kWidth = kCount * sizeof(T) > 16 ? 16 / sizeof(T) : kCount;
#pragma unroll
  for (int i = 0; i < kCount; i += kWidth) load<T, kWidth>(base, offset + i, out + i);
}

// The same for an array whose type is known at run time.
template <int kCount, class A>
__device__ __forceinline__ void load_any(const void* base, Index offset, int kind, A (&out)[kCount]) {
  switch (kind) {
    case kF64:
      return load_run<double>(base, offset, out);
    case kBF16:
      return load_run<__nv_bfloat16>(base, offset, out);
    case kF16:
      return load_run<__half>(base, offset, out);
    default:
      return load_run<float>(base, offset, out);
  }
}
template <class A>
__device__ __forceinline__ A load_any(const void* base, Index offset, int kind) {
  A out[1];
  load_any(base, offset, kind, out);
  return out[0];
}

template <class A>
__device__ __forceinline__ void store_any(void* base, Index i, int kind, A v) {
  switch (kind) {
    case kF64:
      static_cast<double*>(base)[i] = (double)v;
      break;
    case kBF16:
      static_cast<__nv_bfloat16*>(base)[i] = __float2bfloat16_rn((float)v);
      break;
    case kF16:
      static_cast<__half*>(base)[i] = __float2half_rn((float)v);
      break;
    default:
      static_cast<float*>(base)[i] = (float)v;
  }
}

}  // namespace dlkern::cuda
