// What the threads of a block have found, brought together in an order of its own: the same bits each time.
#pragma once

#include "cuda/activation.cuh"

namespace dlkern::cuda {

// Count, mean and centred sum of squares of kChannels channels, which have seen as many values each.
template <class A, int kChannels>
struct Moments {
  static constexpr int kShared = 2 * kChannels + 1;  // values a thread in shared memory
  A count = 0, mean[kChannels] = {}, m2[kChannels] = {};

  // Channel c takes the moments of further values by Chan's formula; they are `fraction` of all with them. `count` is
  // left to the caller.
  __device__ __forceinline__ void merge(int c, A other_mean, A other_m2, A fraction) {
    const A delta = other_mean - mean[c];
    mean[c] = fma_(delta, fraction, mean[c]);
    m2[c] += fma_(delta, delta * (count * fraction), other_m2);
  }

  // kCount values of each channel; value k of channel c is values[k * stride + c].
  template <int kCount, int kStride, int kSize>
  __device__ __forceinline__ void add(const A (&values)[kSize]) {
    const A total = count + A(kCount), fraction = A(kCount) / total;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      A sum = 0, squares = 0;
#pragma unroll
      for (int k = 0; k < kCount; ++k) sum += values[k * kStride + c];
      const A centre = sum * A(1.0 / kCount);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const A d = values[k * kStride + c] - centre;
        squares = fma_(d, d, squares);
      }
      merge(c, centre, squares, fraction);
    }
    count = total;
  }

  __device__ __forceinline__ void give(A* shared, int thread, int threads) const {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      shared[c * threads + thread] = mean[c];
      shared[(kChannels + c) * threads + thread] = m2[c];
    }
    shared[2 * kChannels * threads + thread] = count;
  }
  __device__ __forceinline__ void take(const A* shared, int thread, int threads) {
    const A others = shared[2 * kChannels * threads + thread];
    if (others > A(0)) {
      const A total = count + others, fraction = others / total;
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        merge(c, shared[c * threads + thread], shared[(kChannels + c) * threads + thread], fraction);
      count = total;
    }
  }
};

// kCount sums.
template <class A, int kCount>
struct Sums {
  static constexpr int kShared = kCount;  // values a thread in shared memory
  A values[kCount] = {};

  __device__ __forceinline__ void give(A* shared, int thread, int threads) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) shared[i * threads + thread] = values[i];
  }
  __device__ __forceinline__ void take(const A* shared, int thread, int threads) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += shared[i * threads + thread];
  }
};

// What all of a block's threads with the same `thread` modulo `columns` have, left in the first `columns` of them.
// `thread` numbers the block's threads, of which there are a power of two, as `columns` is. Shared memory: kShared
// values a thread.
template <class A, class Own>
__device__ __forceinline__ void reduce(Own& own, A* shared, int thread, int columns) {
  const int threads = int(blockDim.x);
  for (int half = threads; half >= columns; half /= 2) {
    if (half < threads) {
      __syncthreads();
      if (thread < half) own.take(shared, thread + half, threads);
    }
    if (thread < half && thread >= half / 2) own.give(shared, thread, threads);  // the next round's other half
  }
}
template <class A, class Own>
__device__ __forceinline__ void reduce(Own& own, int columns) {
  DLKERN_DYNAMIC_SHARED(bytes);
  reduce(own, reinterpret_cast<A*>(bytes), int(threadIdx.x), columns);
}

}  // namespace dlkern::cuda
