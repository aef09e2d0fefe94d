// How the kernels of batch_norm_act.cu walk through a tensor and normalise it.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/batch_norm_act.h"
#include "cuda/reduction.cuh"

namespace dlkern::cuda::batch_norm_act {

using Args = BatchNormActArgs;

// The packs of kWidth elements that a thread works on. Block (i, s) of a grid has the s-th share.
// rows (channels last): kWidth channels side by side, at every rows_per_step-th row of the share.
// planes: one channel; its planes in all images, as one sequence of packs.
template <int kWidth, bool kRows>
struct Walk {
  static constexpr int kChannels = kRows ? kWidth : 1;

  Index channel;  // the first one; nothing of the tensor is past the last channel
  Index offset;   // of the current pack, in elements
  Index left;     // packs still to come

  __device__ __forceinline__ explicit Walk(const Args& a) {
    const Index begin = Index(blockIdx.y) * a.share;
    const int thread = int(threadIdx.x), threads = int(blockDim.x);
    if constexpr (kRows) {
      const int row = thread / a.threads_c, rows_per_step = threads / a.threads_c;
      channel = (Index(blockIdx.x) * a.threads_c + thread % a.threads_c) * kWidth;
      left = channel < a.channels ? steps(begin, a.share, a.outer, row, rows_per_step) : 0;
      offset = (begin + row) * a.channels + channel;
      step_ = rows_per_step * a.channels;
    } else {
      channel = blockIdx.x;
      packs_ = a.inner / kWidth;
      left = steps(begin, a.share, a.outer * packs_, thread, threads);
      const Index image = (begin + thread) / packs_, images = packs_ > threads ? 0 : threads / int(packs_);
      position_ = begin + thread - image * packs_;
      position_step_ = threads - images * packs_;
      offset = (image * a.channels + channel) * a.inner + position_ * kWidth;
      step_ = images * a.channels * a.inner + position_step_ * kWidth;
      carry_ = (a.channels - 1) * a.inner;  // from the end of a plane to its channel's next one
    }
  }

  // Whether this thread is the one that writes what a block knows of its channels.
  __device__ __forceinline__ bool writes(const Args& a) const {
    return int(threadIdx.x) < a.threads_c && channel < a.channels;
  }

  __device__ __forceinline__ void next() {
    offset += step_;
    --left;
    if constexpr (!kRows) {
      position_ += position_step_;
      if (position_ >= packs_) {
        position_ -= packs_;
        offset += carry_;
      }
    }
  }

 private:
  static __device__ __forceinline__ Index steps(Index begin, Index share, Index end, int first, int stride) {
    const Index length = (begin + share < end ? share : end - begin) - first;
    return length > 0 ? (length + stride - 1) / stride : 0;
  }

  Index step_, position_, position_step_, packs_, carry_;
};

// kPacks packs at once; those past the end have exists[u] == false, and their values are left alone.
template <class T, int kWidth, bool kRows, int kPacks>
struct Chunk {
  static constexpr int kCount = kWidth * kPacks;
  Index offsets[kPacks];
  bool exists[kPacks];

  __device__ __forceinline__ explicit Chunk(Walk<kWidth, kRows>& walk) {
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      exists[u] = walk.left > 0;
      offsets[u] = walk.offset;
      walk.next();
    }
  }
  __device__ __forceinline__ void read(const void* base, Wide<T> (&out)[kCount]) const {
#pragma unroll
    for (int u = 0; u < kPacks; ++u)
      if (exists[u]) load<T, kWidth>(base, offsets[u], out + u * kWidth);
  }
  __device__ __forceinline__ void write(void* base, const Wide<T> (&values)[kCount]) const {
#pragma unroll
    for (int u = 0; u < kPacks; ++u)
      if (exists[u]) store<T, kWidth>(base, offsets[u], values + u * kWidth);
  }
  // The one of a thread's channels to which value i belongs.
  static __device__ __forceinline__ constexpr int channel(int i) { return kRows ? i % kWidth : 0; }
};

// What normalises the channels of a thread: z = (x - mean) * scale + shift with scale = invstd * weight. Forward and
// backward round it alike, so that backward finds the same side of a kink.
template <class A, int kChannels>
struct Affine {
  A mean[kChannels], scale[kChannels], shift[kChannels];

  // From mean and `scale`, which holds invstd.
  __device__ __forceinline__ void set_weight_and_bias(const Args& a, Index channel) {
    if (a.weight) {
      A weight[kChannels];
      load_any(a.weight, channel, a.param_kind, weight);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) scale[c] *= weight[c];
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) shift[c] = A(0);
    if (a.bias) load_any(a.bias, channel, a.param_kind, shift);
  }
  // From the mean and invstd that are in memory.
  __device__ __forceinline__ void set_saved(const Args& a, Index channel) {
    load_run<A>(a.mean, channel, mean);
    load_run<A>(a.invstd, channel, scale);
    set_weight_and_bias(a, channel);
  }
  __device__ __forceinline__ A centred(int c, A x) const { return x - mean[c]; }
  __device__ __forceinline__ A apply(int c, A centred) const { return fma_(centred, scale[c], shift[c]); }
};

}  // namespace dlkern::cuda::batch_norm_act
