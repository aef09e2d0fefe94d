// Wrong kernels, each with one planted error that the host shim must report.
#include "cuda/cuda_prelude.h"

extern "C" __global__ void write_past_the_end(float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) out[i] = 1.0f;
}
extern "C" __global__ void read_before_the_start(const float* x, float* out) {
  out[threadIdx.x] = x[int(threadIdx.x) - 1];
}
extern "C" __global__ void write_before_the_start(__half* out) { out[-1] = __float2half(1.0f); }
extern "C" __global__ void misaligned(const float* x, float4* out) { *out = *reinterpret_cast<const float4*>(x); }
extern "C" __global__ void past_shared(float* out, int n) {
  __shared__ float row[32];
  row[threadIdx.x + n] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}
extern "C" __global__ void past_shared_by_pointer(float* out, int n) {
  __shared__ float row[32], other[2];
  float* const place = row + threadIdx.x;
  place[n] = 1.0f;
  other[threadIdx.x % 2] = 2.0f;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}
extern "C" __global__ void past_dynamic_shared(float* out, int n) {
  DLKERN_DYNAMIC_SHARED(bytes);
  reinterpret_cast<float*>(bytes)[threadIdx.x + n] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = reinterpret_cast<float*>(bytes)[threadIdx.x];
}
extern "C" __global__ void past_local(float* out, int n) {
  float local[4] = {1, 2, 3, 4};
  for (int i = 0; i < n; ++i) out[i] = local[i] + (threadIdx.x ? 1.0f : 0.0f);
}

extern "C" __global__ void unwritten_shared(float* out) {
  __shared__ float row[64];
  if (threadIdx.x % 2) row[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = fmaxf(row[threadIdx.x], 0.0f);  // hides a NaN
}
// Each thread reads what its neighbour has written.
extern "C" __global__ void missing_barrier(const float* x, float* out) {
  __shared__ float row[64];
  row[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = row[(threadIdx.x + 1) % blockDim.x];
}
// The barrier between reading a value and overwriting it.
extern "C" __global__ void missing_second_barrier(const float* x, float* out, int rounds) {
  __shared__ float row[64];
  float v = x[threadIdx.x];
  for (int i = 0; i < rounds; ++i) {
    row[threadIdx.x] = v;
    __syncthreads();
    v += row[(threadIdx.x + 1) % blockDim.x];
  }
  out[threadIdx.x] = v;
}
// Lanes of a warp are not in step either.
extern "C" __global__ void missing_syncwarp(const float* x, float* out) {
  __shared__ float row[32];
  row[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = row[threadIdx.x ^ 1];
}
// Two blocks and one place.
extern "C" __global__ void race_of_blocks(int* out) { *out = int(blockIdx.x); }

extern "C" __global__ void barrier_after_return(float* out, int n) {
  if (threadIdx.x >= n) return;
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}
extern "C" __global__ void two_barriers(float* out) {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1.0f;
}
extern "C" __global__ void shuffle_in_a_branch(int* out) {
  if (threadIdx.x < 7) out[threadIdx.x] = __shfl_down_sync(0xffffffffu, int(threadIdx.x), 1);
  __syncthreads();
}
extern "C" __global__ void shuffle_of_a_short_warp(int* out) {
  out[threadIdx.x] = __shfl_down_sync(0xffffffffu, int(threadIdx.x), 16);
}
extern "C" __global__ void mask_without_caller(unsigned* out) { out[threadIdx.x] = __ballot_sync(0xfu, 1); }
extern "C" __global__ void overflow(int* out, int n) { out[threadIdx.x] = n * n; }
extern "C" __global__ void forever(int* out) {
  while (atomicAdd(out, 0) == 0) {
  }
}
