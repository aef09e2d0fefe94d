// Right kernels, one for each thing that the host shim covers.
#include "cuda/cuda_prelude.h"

// out[block] = sum of the block's share of x; blockDim.x is a power of two.
extern "C" __global__ void block_sum(const int* x, int* out, int n) {
  extern __shared__ __align__(16) int partial[];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  partial[threadIdx.x] = i < n ? x[i] : 0;
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0];
}

// The same by shuffles; the block is a multiple of 32 threads.
extern "C" __global__ void __launch_bounds__(1024) shuffle_sum(const int* x, int* out, int n) {
  __shared__ int of_warp[32];
  const int i = blockIdx.x * blockDim.x + threadIdx.x, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int sum = i < n ? x[i] : 0;
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(0xffffffffu, sum, delta);
  if (threadIdx.x % 32 == 0) of_warp[warp] = sum;
  __syncthreads();
  if (warp != 0) return;
  sum = int(threadIdx.x) < warps ? of_warp[threadIdx.x] : 0;
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// Each lane's view of its warp: [lane, up by 3, down by 5, xor 9 in segments of 8, value of lane 7 of its half].
extern "C" __global__ void shuffles(float* out) {
  const float v = threadIdx.x * 1.5f;
  float* const mine = out + 5 * threadIdx.x;
  mine[0] = v;
  mine[1] = __shfl_up_sync(0xffffffffu, v, 3);
  mine[2] = __shfl_down_sync(0xffffffffu, v, 5, 16);
  mine[3] = __shfl_xor_sync(0xffffffffu, v, 9, 8);
  mine[4] = __shfl_sync(0xffffffffu, v, 7, 16);
}

// [ballot of odd lanes, any, all, count, or, and] as each thread sees them; both halves of a warp vote for themselves.
extern "C" __global__ void votes(unsigned* out) {
  const unsigned lane = threadIdx.x % 32, mask = lane < 16 ? 0xffffu : 0xffff0000u;
  unsigned* const mine = out + 6 * threadIdx.x;
  if (lane < 16) {
    mine[0] = __ballot_sync(mask, lane & 1);
  } else {
    mine[0] = __ballot_sync(mask, lane > 29);
  }
  __syncwarp();
  mine[1] = __any_sync(mask, lane == 20);
  mine[2] = __all_sync(mask, lane < 16);
  mine[3] = __syncthreads_count(threadIdx.x % 3 == 0);
  mine[4] = __syncthreads_or(threadIdx.x == 1000);
  mine[5] = __syncthreads_and(threadIdx.x < 1000);
}

// [sum, max, min, how often 7 was swapped in] over all threads of the grid.
extern "C" __global__ void atomics(const int* x, int* out, unsigned long long* big) {
  const int v = x[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(out, v);
  atomicMax(out + 1, v);
  atomicMin(out + 2, v);
  if (atomicCAS(out + 3, 0, 7) == 0) atomicAdd(out + 4, 1);
  atomicAdd(big, 1ull << 33);
}

// out[(z * Y + y) * X + x] of every thread of the whole three-dimensional grid.
extern "C" __global__ void indices(int4* out, int factor, float scale) {
  const unsigned x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
  const unsigned z = blockIdx.z * blockDim.z + threadIdx.z;
  out[(z * gridDim.y * blockDim.y + y) * gridDim.x * blockDim.x + x] =
      make_int4(int(x), int(y), int(z), int(float(factor) * scale));
}

// To 16 bits and back, and the bits.
template <typename T>
__global__ void round_trip(const float* x, T* narrow, float* wide, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    narrow[i] = dlkern::cuda::narrow<T>(x[i]);
    wide[i] = dlkern::cuda::widen(narrow[i]);
  }
}

// y = a x + b in packs of 16 bytes, from a structure of pointers.
struct Axpb {
  const float* x;
  float* y;
  float a, b;
  int packs;
};
extern "C" __global__ void axpb(const Axpb args) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= args.packs) return;
  float4 v = reinterpret_cast<const float4*>(args.x)[i];
  v = make_float4(args.a * v.x + args.b, args.a * v.y + args.b, args.a * v.z + args.b, args.a * v.w + args.b);
  reinterpret_cast<float4*>(args.y)[i] = v;
}
