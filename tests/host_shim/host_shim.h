// CUDA C++ on the CPU, for tests: what -DDLKERN_HOST_SHIM makes csrc/cuda include in place of CUDA's headers.
//
// program.py preprocesses a .cu, turns __shared__ declarations into static variables that are poisoned before each
// block, compiles the result under AddressSanitizer and UndefinedBehaviorSanitizer, and links it with runner.cpp.
//
// Covered: threadIdx and its kin, barriers (with a predicate too), warp shuffles and votes with explicit masks, static
// and dynamic shared memory, atomics of one value, __half and __nv_bfloat16 by conversion, vector types, the math
// below, and mma_tile.h. Everything else (cooperative groups, inline assembly, textures, launches from device code,
// ...) is refused with its name, by program.py or by the compiler.
//
// Stricter than a device: all threads of a block must reach each barrier, at the same place; one that has returned does
// not. A lane that is not in the mask, has returned or does not exist gives no value to a shuffle.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "runtime.h"
#include "types.h"

#define __host__
#define __device__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ const
#define __align__(n) alignas(n)
#define __global__ __dlkern_global__  // program.py finds the kernels by these two names
#define __shared__ __dlkern_shared__

// What csrc/cuda/cuda_prelude.h asks for. A launch by host code is no part of the shim: program.py starts kernels by
// name.
#define DLKERN_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(dlkern_shim::dynamic_shared())
#define DLKERN_LAUNCH(function, ...) (static_cast<void>(function), -1)
#define DLKERN_ERROR_TEXT(code) ((code) == 0 ? "no error" : "the host shim starts kernels by name, not from host code")

constexpr int warpSize = 32;

// ------------------------------------------------------------------------------------------------ barriers and votes
#define DLKERN_SHIM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(DLKERN_SHIM_SITE) { dlkern_shim::block_barrier("__syncthreads", false, file, line); }
inline int __syncthreads_count(int predicate, DLKERN_SHIM_SITE) {
  return int(dlkern_shim::block_barrier("__syncthreads_count", predicate != 0, file, line));
}
inline int __syncthreads_or(int predicate, DLKERN_SHIM_SITE) {
  return dlkern_shim::block_barrier("__syncthreads_or", predicate != 0, file, line) != 0;
}
inline int __syncthreads_and(int predicate, DLKERN_SHIM_SITE) {
  return dlkern_shim::block_barrier("__syncthreads_and", predicate == 0, file, line) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, DLKERN_SHIM_SITE) {
  dlkern_shim::warp_collective("__syncwarp", mask, "", 0, file, line);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

namespace dlkern_shim {

inline unsigned vote(const char* what, unsigned mask, bool predicate, const char* file, int line, unsigned* present) {
  const auto all = warp_collective(what, mask, &predicate, sizeof predicate, file, line);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane)
    votes |= unsigned(all->present >> lane & 1 && all->data[lane][0]) << lane;
  *present = all->present;
  return votes;
}

template <typename T>
T shuffle(const char* what, unsigned mask, T value, unsigned source, const char* file, int line) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "shuffles move at most 8 bytes a lane");
  const auto all = warp_collective(what, mask, &value, sizeof value, file, line);
  if (!(all->present >> source & 1)) {
    fail("%s (%s:%d) reads lane %u, which is not in mask %#x or has returned", what, file, line, source, mask);
  }
  return all->template get<T>(source);
}

inline void check_width(const char* what, int width, const char* file, int line) {
  if (width < 1 || width > 32 || (width & (width - 1))) fail("%s (%s:%d): width %d", what, file, line, width);
}

}  // namespace dlkern_shim

inline unsigned __ballot_sync(unsigned mask, int predicate, DLKERN_SHIM_SITE) {
  unsigned present;
  return dlkern_shim::vote("__ballot_sync", mask, predicate != 0, file, line, &present);
}
inline int __any_sync(unsigned mask, int predicate, DLKERN_SHIM_SITE) {
  unsigned present;
  return dlkern_shim::vote("__any_sync", mask, predicate != 0, file, line, &present) != 0;
}
inline int __all_sync(unsigned mask, int predicate, DLKERN_SHIM_SITE) {
  unsigned present;
  return dlkern_shim::vote("__all_sync", mask, predicate != 0, file, line, &present) == present;
}

// --------------------------------------------------------------------------------------------------------- shuffles
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, DLKERN_SHIM_SITE) {
  dlkern_shim::check_width("__shfl_sync", width, file, line);
  const unsigned first = dlkern_shim::lane_index() & ~unsigned(width - 1);
  return dlkern_shim::shuffle("__shfl_sync", mask, value, first + (unsigned(source) & unsigned(width - 1)), file, line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, DLKERN_SHIM_SITE) {
  dlkern_shim::check_width("__shfl_up_sync", width, file, line);
  const unsigned lane = dlkern_shim::lane_index(), place = lane & unsigned(width - 1);
  return dlkern_shim::shuffle("__shfl_up_sync", mask, value, place < delta ? lane : lane - delta, file, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, DLKERN_SHIM_SITE) {
  dlkern_shim::check_width("__shfl_down_sync", width, file, line);
  const unsigned lane = dlkern_shim::lane_index(), place = lane & unsigned(width - 1);
  const bool inside = delta < unsigned(width) - place;
  return dlkern_shim::shuffle("__shfl_down_sync", mask, value, inside ? lane + delta : lane, file, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, DLKERN_SHIM_SITE) {
  dlkern_shim::check_width("__shfl_xor_sync", width, file, line);
  const unsigned lane = dlkern_shim::lane_index(), other = lane ^ unsigned(bits);
  const unsigned end = (lane | unsigned(width - 1)) + 1;  // lanes of a later segment are out of reach
  return dlkern_shim::shuffle("__shfl_xor_sync", mask, value, other < end ? other : lane, file, line);
}
#undef DLKERN_SHIM_SITE

// ---------------------------------------------------------------------------------------------------------- atomics
namespace dlkern_shim {
template <typename T>
struct Same {
  using Type = T;
};
// One fiber runs at a time: reading, changing and writing back is atomic.
template <typename T, typename Change>
T exchange(T* address, Change change) {
  const T old = *address;
  *address = change(old);
  return old;
}
}  // namespace dlkern_shim

#define DLKERN_SHIM_ATOMIC(name, expression)                                          \
  template <typename T>                                                               \
  T name(T* address, typename dlkern_shim::Same<T>::Type value) {                     \
    return dlkern_shim::exchange(address, [&](T old) -> T { return T(expression); }); \
  }
DLKERN_SHIM_ATOMIC(atomicAdd, old + value)
DLKERN_SHIM_ATOMIC(atomicSub, old - value)
DLKERN_SHIM_ATOMIC(atomicMax, value > old ? value : old)
DLKERN_SHIM_ATOMIC(atomicMin, value < old ? value : old)
DLKERN_SHIM_ATOMIC(atomicExch, ((void)old, value))
DLKERN_SHIM_ATOMIC(atomicAnd, old& value)
DLKERN_SHIM_ATOMIC(atomicOr, old | value)
DLKERN_SHIM_ATOMIC(atomicXor, old ^ value)
DLKERN_SHIM_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef DLKERN_SHIM_ATOMIC
template <typename T>
T atomicCAS(T* address, typename dlkern_shim::Same<T>::Type compare, typename dlkern_shim::Same<T>::Type value) {
  return dlkern_shim::exchange(address, [&](T old) { return old == compare ? value : old; });
}

// -------------------------------------------------------------------------------------------- loads, bits and numbers
template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, typename dlkern_shim::Same<T>::Type value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, typename dlkern_shim::Same<T>::Type value) {
  *address = value;
}

namespace dlkern_shim {
template <typename To, typename From>
To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "");
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}
}  // namespace dlkern_shim

inline int __float_as_int(float v) { return dlkern_shim::bits<int>(v); }
inline float __int_as_float(int v) { return dlkern_shim::bits<float>(v); }
inline unsigned __float_as_uint(float v) { return dlkern_shim::bits<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return dlkern_shim::bits<float>(v); }
inline long long __double_as_longlong(double v) { return dlkern_shim::bits<long long>(v); }
inline double __longlong_as_double(long long v) { return dlkern_shim::bits<double>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }

template <typename A, typename B>
constexpr std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value, std::common_type_t<A, B>> min(
    A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point<T>::value) return std::fmin(T(a), T(b));  // a NaN loses
  return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B>
constexpr std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value, std::common_type_t<A, B>> max(
    A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point<T>::value) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}

#if !defined(__GLIBC_PREREQ) || !__GLIBC_PREREQ(2, 42)  // later ones have them
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline double rsqrt(double v) { return 1.0 / std::sqrt(v); }
#endif
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __frsqrt_rn(float v) { return float(1.0 / std::sqrt(double(v))); }
inline float __fsqrt_rn(float v) { return std::sqrt(v); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __saturatef(float v) { return std::fmin(std::fmax(v, 0.0f), 1.0f); }
// glibc declares functions of these names
#define __expf(v) expf(v)
#define __exp10f(v) exp10f(v)
#define __logf(v) logf(v)
#define __log2f(v) log2f(v)
#define __log10f(v) log10f(v)
#define __powf(a, b) powf(a, b)
#define __sinf(v) sinf(v)
#define __cosf(v) cosf(v)
#define __tanf(v) tanf(v)

// ------------------------------------------------------------------------------------------------------ tensor cores
namespace dlkern_shim {

// What a lane brings to and takes from mma.sync.m16n8k16 (layout: csrc/cuda/mma_tile.h).
struct MmaLane {
  unsigned a[4], b[2];
  float c[4];
};
static_assert(sizeof(MmaLane) <= kDeposit, "");

// The sum of a row and a column is rounded once; the device rounds each step in an order of its own.
template <typename T>
void mma(float (&d)[4], const MmaLane& mine, const char* file, int line) {
  const auto all = warp_collective("mma_tile", 0xffffffffu, &mine, sizeof mine, file, line);
  if (all->present != 0xffffffffu) fail("mma_tile (%s:%d): lanes %#x came; all 32 must", file, line, all->present);
  const auto part = [](unsigned pair, unsigned i) {
    T value;
    value.bits = uint16_t(pair >> 16 * i);
    return double(float(value));
  };
  const unsigned lane = lane_index();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = mine.c[i];
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned quad = k % 8 / 2;
      const MmaLane left = all->template get<MmaLane>(row % 8 * 4 + quad),
                    right = all->template get<MmaLane>(column * 4 + quad);
      sum += part(left.a[row / 8 + k / 8 * 2], k % 2) * part(right.b[k / 8], k % 2);
    }
    d[i] = float(sum);
  }
}

}  // namespace dlkern_shim
