// act(batch_norm(x) + residual) and its gradients; the contract is kernels/reference/batch_norm_act.py.
//
// Training forward: `statistics` leaves mean and centred sum of squares of each share of each channel (small groups of
// values, merged by Chan's formula), `merge_statistics` makes mean, invstd and running statistics of them, `forward`
// normalises. Inference is `forward` alone. Backward: `backward_sums` in shares, `merge_sums`, `backward` for the
// gradients of x and residual. No atomics: results are bit for bit repeatable.
//
// Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
#include "cuda/batch_norm_act.cuh"

namespace dlkern::cuda::batch_norm_act {

constexpr int kMaxThreads = 256;

// Blocks that a multiprocessor must be able to hold, which bounds the registers of a thread: float64 has all of them,
// as its exp and erf spill with fewer.
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;

// Packs of a thread in flight: one of 16 bytes, or several single elements (two of float64, which takes the registers
// of two float32 and more in exp and erf).
template <class T, int kWidth>
constexpr int kPacksAtOnce = kWidth > 1       ? 1
                             : sizeof(T) == 8 ? 2
                                              : 4;

// partial [2, splits, channels]
template <class A>
__device__ __forceinline__ void leave(const Args& a, Index channel, A first, A second) {
  A* const out = static_cast<A*>(a.partial) + Index(blockIdx.y) * a.channels + channel;
  out[0] = first;
  out[a.splits * a.channels] = second;
}

// partial: mean and centred sum of squares of a share, of what is left of x after the channel's first value. Where the
// mean is far larger than the deviation, as rounding sees it, the means of groups keep their digits.
template <class T, int kWidth, bool kRows>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<T>) statistics(const Args a) {
  using A = Wide<T>;
  constexpr int kPacks = kRows || kWidth == 1 ? 4 : 2;
  Walk<kWidth, kRows> walk(a);
  constexpr int kChannels = walk.kChannels, kStride = kRows ? kWidth : 1;
  Moments<A, kChannels> moments;
  A pivot[kChannels] = {};
  if (walk.left > 0) load<T, kChannels>(a.x, walk.channel * a.inner, pivot);
  while (walk.left >= kPacks) {
    const Chunk<T, kWidth, kRows, kPacks> chunk(walk);
    A values[chunk.kCount];
    chunk.read(a.x, values);
#pragma unroll
    for (int i = 0; i < chunk.kCount; ++i) values[i] -= pivot[chunk.channel(i)];
    moments.template add<chunk.kCount / kStride, kStride>(values);
  }
  while (walk.left > 0) {
    A values[kWidth];
    load<T, kWidth>(a.x, walk.offset, values);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] -= pivot[kRows ? i : 0];
    moments.template add<kWidth / kStride, kStride>(values);
    walk.next();
  }
  reduce<A>(moments, a.threads_c);
  if (walk.writes(a)) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) leave(a, walk.channel + c, moments.mean[c], moments.m2[c]);
  }
}

// mean and invstd from partial; running statistics move towards mean and unbiased variance.
template <class A>
__global__ void __launch_bounds__(kMaxThreads) merge_statistics(const Args a) {
  const int lane = int(threadIdx.x) % a.threads_c, first = int(threadIdx.x) / a.threads_c;
  const Index channel = Index(blockIdx.x) * a.threads_c + lane;
  const A* const partial = static_cast<const A*>(a.partial) + channel;
  Moments<A, 1> all;
  for (int s = first; s < a.splits && channel < a.channels; s += int(blockDim.x) / a.threads_c) {
    const Index rest = a.count - s * a.share_elements;
    const A count = A(rest < a.share_elements ? rest : a.share_elements), total = all.count + count;
    all.merge(0, partial[s * a.channels], partial[(a.splits + s) * a.channels], count / total);
    all.count = total;
  }
  reduce<A>(all, a.threads_c);
  if (first != 0 || channel >= a.channels) return;
  const A mean = load_any<A>(a.x, channel * a.inner, a.data_kind) + all.mean[0], m2 = all.m2[0], n = A(a.count);
  static_cast<A*>(a.mean)[channel] = mean;
  static_cast<A*>(a.invstd)[channel] = A(1) / sqrt_(m2 / n + A(a.eps));
  if (a.running_mean) {
    const A m = A(a.momentum), keep = A(1.0 - a.momentum);
    const A unbiased = m2 / A(a.count > 1 ? a.count - 1 : 1);
    const A old_mean = load_any<A>(a.running_mean, channel, a.param_kind);
    const A old_var = load_any<A>(a.running_var, channel, a.param_kind);
    store_any(a.running_mean, channel, a.param_kind, old_mean * keep + mean * m);
    store_any(a.running_var, channel, a.param_kind, old_var * keep + unbiased * m);
  }
}

// y; without batch statistics also mean and invstd, which backward asks for.
template <class T, int kWidth, bool kRows>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<T>) forward(const Args a) {
  using A = Wide<T>;
  Walk<kWidth, kRows> walk(a);
  if (walk.left == 0) return;
  constexpr int kChannels = walk.kChannels;
  Affine<A, kChannels> affine;
  if (a.batch_stats) {
    affine.set_saved(a, walk.channel);
  } else {
    load_any(a.running_mean, walk.channel, a.param_kind, affine.mean);
    load_any(a.running_var, walk.channel, a.param_kind, affine.scale);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) affine.scale[c] = A(1) / sqrt_(affine.scale[c] + A(a.eps));
    if (blockIdx.y == 0 && walk.writes(a)) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        static_cast<A*>(a.mean)[walk.channel + c] = affine.mean[c];
        static_cast<A*>(a.invstd)[walk.channel + c] = affine.scale[c];
      }
    }
    affine.set_weight_and_bias(a, walk.channel);
  }
  const A param = A(a.param);
  while (walk.left > 0) {
    const Chunk<T, kWidth, kRows, kPacksAtOnce<T, kWidth>> chunk(walk);
    A z[chunk.kCount] = {}, added[chunk.kCount] = {};
    chunk.read(a.x, z);
    if (a.residual) chunk.read(a.residual, added);
#pragma unroll
    for (int i = 0; i < chunk.kCount; ++i) {
      const int c = chunk.channel(i);
      z[i] = affine.apply(c, affine.centred(c, z[i])) + added[i];
    }
    activate(a.activation, z, param);
    chunk.write(a.y, z);
  }
}

// dz, the gradient of the activation's input, and x - mean, of a chunk; dz is 0 past the end.
template <class T, class A, class Chunk, int kCount, int kChannels>
__device__ __forceinline__ void dz_and_centred(const Args& a, const Chunk& chunk, const Affine<A, kChannels>& affine,
                                               A param, A (&dz)[kCount], A (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) dz[i] = A(0), x[i] = affine.mean[chunk.channel(i)];
  chunk.read(a.grad_y, dz);
  chunk.read(a.x, x);
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = affine.centred(chunk.channel(i), x[i]);
  A from[kCount] = {};
  if (a.y) {
    chunk.read(a.y, from);
    activation_gradient_from_output(a.activation, dz, from, param);
  } else if (a.activation != kIdentity) {
    if (a.residual) chunk.read(a.residual, from);
#pragma unroll
    for (int i = 0; i < kCount; ++i) from[i] = affine.apply(chunk.channel(i), x[i]) + from[i];
    activation_gradient(a.activation, dz, from, param);
  }
}

// partial: the sums of dz and of dz * (x - mean) over a share.
template <class T, int kWidth, bool kRows>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<T>) backward_sums(const Args a) {
  using A = Wide<T>;
  Walk<kWidth, kRows> walk(a);
  constexpr int kChannels = walk.kChannels;
  Affine<A, kChannels> affine = {};
  if (walk.left > 0) affine.set_saved(a, walk.channel);
  Sums<A, 2 * kChannels> sums;
  const A param = A(a.param);
  while (walk.left > 0) {
    const Chunk<T, kWidth, kRows, kPacksAtOnce<T, kWidth>> chunk(walk);
    A dz[chunk.kCount], x[chunk.kCount];
    dz_and_centred<T>(a, chunk, affine, param, dz, x);
#pragma unroll
    for (int i = 0; i < chunk.kCount; ++i) {
      const int c = chunk.channel(i);
      sums.values[c] += dz[i];
      sums.values[kChannels + c] = fma_(dz[i], x[i], sums.values[kChannels + c]);
    }
  }
  reduce<A>(sums, a.threads_c);
  if (walk.writes(a)) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) leave(a, walk.channel + c, sums.values[c], sums.values[kChannels + c]);
  }
}

// The gradients of weight and bias from partial, and the means that `backward` subtracts.
template <class A>
__global__ void __launch_bounds__(kMaxThreads) merge_sums(const Args a) {
  const int lane = int(threadIdx.x) % a.threads_c, first = int(threadIdx.x) / a.threads_c;
  const Index channel = Index(blockIdx.x) * a.threads_c + lane;
  const A* const partial = static_cast<const A*>(a.partial) + channel;
  Sums<A, 2> all;
  for (int s = first; s < a.splits && channel < a.channels; s += int(blockDim.x) / a.threads_c) {
    all.values[0] += partial[s * a.channels];
    all.values[1] += partial[(a.splits + s) * a.channels];
  }
  reduce<A>(all, a.threads_c);
  if (first != 0 || channel >= a.channels) return;
  const A invstd = static_cast<const A*>(a.invstd)[channel], n = A(a.count);
  const A dz = all.values[0], dz_xhat = all.values[1] * invstd;
  if (a.grad_weight) store_any(a.grad_weight, channel, a.grad_weight_kind, dz_xhat);
  if (a.grad_bias) store_any(a.grad_bias, channel, a.grad_bias_kind, dz);
  if (a.means) {
    static_cast<A*>(a.means)[channel] = dz / n;
    static_cast<A*>(a.means)[a.channels + channel] = dz_xhat / n * invstd;
  }
}

// The gradients of x and residual, each where wanted; without `means` the statistics were constants.
template <class T, int kWidth, bool kRows>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<T>) backward(const Args a) {
  using A = Wide<T>;
  Walk<kWidth, kRows> walk(a);
  if (walk.left == 0) return;
  constexpr int kChannels = walk.kChannels;
  Affine<A, kChannels> affine;
  A mean_dz[kChannels] = {}, slope[kChannels] = {};
  affine.set_saved(a, walk.channel);
  if (a.means) {
    load_run<A>(a.means, walk.channel, mean_dz);
    load_run<A>(a.means, a.channels + walk.channel, slope);
  }
  const A param = A(a.param);
  while (walk.left > 0) {
    const Chunk<T, kWidth, kRows, kPacksAtOnce<T, kWidth>> chunk(walk);
    A dz[chunk.kCount], x[chunk.kCount];
    dz_and_centred<T>(a, chunk, affine, param, dz, x);
    if (a.grad_residual) chunk.write(a.grad_residual, dz);
    if (a.grad_x) {
#pragma unroll
      for (int i = 0; i < chunk.kCount; ++i) {
        const int c = chunk.channel(i);
        if (a.means) dz[i] = dz[i] - mean_dz[c] - x[i] * slope[c];
        dz[i] *= affine.scale[c];
      }
      chunk.write(a.grad_x, dz);
    }
  }
}

}  // namespace dlkern::cuda::batch_norm_act

// ------------------------------------------------------------------------------------------------- host
#ifndef __CUDACC_RTC__

#include "dlkern/batch_norm_act.h"

namespace {

using namespace dlkern::cuda;
static_assert(kF32 == (int)dlkern::kFloat32 && kF64 == (int)dlkern::kFloat64, "Kind and DType are one table");
static_assert(kBF16 == (int)dlkern::kBFloat16 && kF16 == (int)dlkern::kFloat16, "Kind and DType are one table");

struct Kernel {
  const char* name;
  void (*function)(BatchNormActArgs);
};

// kernels/cuda/batch_norm_act_plan.py asks for a kernel by this name, and so does NVRTC.
#define DLKERN_NAME(...) #__VA_ARGS__
#define DLKERN_KERNEL(...) \
  {DLKERN_NAME(dlkern::cuda::batch_norm_act::__VA_ARGS__), dlkern::cuda::batch_norm_act::__VA_ARGS__},
#define DLKERN_PASSES(...)                  \
  DLKERN_KERNEL(statistics<__VA_ARGS__>)    \
  DLKERN_KERNEL(forward<__VA_ARGS__>)       \
  DLKERN_KERNEL(backward_sums<__VA_ARGS__>) \
  DLKERN_KERNEL(backward<__VA_ARGS__>)
#define DLKERN_WALKS(type, width)  \
  DLKERN_PASSES(type, width, true) \
  DLKERN_PASSES(type, width, false) DLKERN_PASSES(type, 1, true) DLKERN_PASSES(type, 1, false)
#define DLKERN_MERGES(type) DLKERN_KERNEL(merge_statistics<type>) DLKERN_KERNEL(merge_sums<type>)

const Kernel kKernels[] = {DLKERN_WALKS(float, 4) DLKERN_WALKS(double, 2) DLKERN_WALKS(__half, 8)
                               DLKERN_WALKS(__nv_bfloat16, 8) DLKERN_MERGES(float) DLKERN_MERGES(double)};

}  // namespace

const char* dlkern_cuda_batch_norm_act_kernel(int index) {
  return index >= 0 && index < int(sizeof kKernels / sizeof *kKernels) ? kKernels[index].name : nullptr;
}

int dlkern_cuda_batch_norm_act_launch(int index, unsigned grid_x, unsigned grid_y, unsigned threads,
                                      unsigned shared_bytes, int device, void* stream, const void* args) {
  const auto& argument = *static_cast<const BatchNormActArgs*>(args);
  return DLKERN_LAUNCH(kKernels[index].function, grid_x, grid_y, threads, shared_bytes, device, stream, argument);
}

#endif
