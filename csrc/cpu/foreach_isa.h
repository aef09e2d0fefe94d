// Compiles DLKERN_KERNELS (the name of a file) once per instruction set, in the namespaces
// dlkern::cpu::portable and dlkern::cpu::avx2. Standard headers are included before the target is changed: their
// inline functions are shared by the whole program and have to run anywhere.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "simd/types.h"
#include "team.h"
#if DLKERN_HAS_AVX2
#include <immintrin.h>
#endif

#define DLKERN_AVX2 0
namespace dlkern::cpu::portable {
#include "simd/vector.inl"
#include "simd/vector_math.inl"
#include DLKERN_KERNELS
}  // namespace dlkern::cpu::portable
#undef DLKERN_AVX2

#if DLKERN_HAS_AVX2
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define DLKERN_AVX2 1
namespace dlkern::cpu::avx2 {
#include "simd/vector.inl"
#include "simd/vector_math.inl"
#include DLKERN_KERNELS
}  // namespace dlkern::cpu::avx2
#undef DLKERN_AVX2
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
