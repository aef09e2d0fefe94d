// D = A B + C on the tensor cores: A 16 x 16 and B 16 x 8 of half or bfloat16, C and D 16 x 8 of float (sm_80 and
// later).
//
// A warp calls it together, each lane with its own fragments (mma.sync.aligned.m16n8k16.row.col). With g = lane / 4 and
// t = lane % 4, and two consecutive 16-bit values in a register, the first in its low half:
//
//   a[0] = A[g][2t, 2t+1]     a[1] = A[g+8][2t, 2t+1]     a[2] = A[g][2t+8, 2t+9]     a[3] = A[g+8][2t+8, 2t+9]
//   b[0] = B[2t, 2t+1][g]     b[1] = B[2t+8, 2t+9][g]
//   c[0], c[1] = C[g][2t], C[g][2t+1]     c[2], c[3] = C[g+8][2t], C[g+8][2t+1];     d as c, and d may be c itself.
#pragma once

#include "cuda/cuda_prelude.h"

namespace dlkern {

#ifdef DLKERN_HOST_SHIM

template <typename T>
inline void mma_tile(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4],
                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  dlkern_shim::mma<T>(d, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}}, file, line);
}

#else

template <typename T>
__device__ __forceinline__ void mma_tile(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                         const float (&c)[4]);

#define DLKERN_MMA_TILE(T, type)                                                                                      \
  template <>                                                                                                         \
  __device__ __forceinline__ void mma_tile<T>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],          \
                                              const float (&c)[4]) {                                                  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                               \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                           \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
                   "f"(c[3]));                                                                                        \
  }
DLKERN_MMA_TILE(__half, "f16")
DLKERN_MMA_TILE(__nv_bfloat16, "bf16")
#undef DLKERN_MMA_TILE

#endif

}  // namespace dlkern
