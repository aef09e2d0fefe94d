// Vector types (GCC and Clang vector extensions): 32 bytes, which a compiler splits where registers are narrower.
#pragma once

#include <cstdint>

#define DLKERN_INLINE inline __attribute__((always_inline))
#define DLKERN_NOINLINE __attribute__((noinline))

namespace dlkern::cpu {

typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));
typedef double vd __attribute__((vector_size(32)));
typedef int64_t vl __attribute__((vector_size(32)));
typedef uint16_t vh __attribute__((vector_size(16)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Wide<T>: the type in which data stored as T is computed, its vector, and the vector of its comparisons.
template <class T>
struct Wide {
  typedef float scalar;
  typedef vf vector;
  typedef vi mask;
};
template <>
struct Wide<double> {
  typedef double scalar;
  typedef vd vector;
  typedef vl mask;
};
template <class T>
using wide_t = typename Wide<T>::scalar;
template <class T>
using vec_t = typename Wide<T>::vector;
template <class T>
inline constexpr int kLanes = 32 / sizeof(wide_t<T>);

}  // namespace dlkern::cpu
