// The types of CUDA C++ that kernels use: vectors with CUDA's alignment, __half and __nv_bfloat16.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

#define DLKERN_SHIM_VECTOR(T, name, align2, align4)          \
  struct alignas(align2) name##2 { T x, y; };                \
  struct alignas(align4) name##4 { T x, y, z, w; };          \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

DLKERN_SHIM_VECTOR(float, float, 8, 16)
DLKERN_SHIM_VECTOR(double, double, 16, 16)
DLKERN_SHIM_VECTOR(int, int, 8, 16)
DLKERN_SHIM_VECTOR(unsigned, uint, 8, 16)
DLKERN_SHIM_VECTOR(short, short, 4, 8)
DLKERN_SHIM_VECTOR(unsigned short, ushort, 4, 8)
DLKERN_SHIM_VECTOR(signed char, char, 2, 4)
DLKERN_SHIM_VECTOR(unsigned char, uchar, 2, 4)
DLKERN_SHIM_VECTOR(long long, longlong, 16, 16)
DLKERN_SHIM_VECTOR(unsigned long long, ulonglong, 16, 16)
#undef DLKERN_SHIM_VECTOR

namespace dlkern_shim {

// A 16-bit binary format with `kMantissa` stored bits: 10 is half, 7 is bfloat16.
template <int kMantissa>
struct Format {
  static constexpr int kBias = (1 << (14 - kMantissa)) - 1;
  static constexpr uint16_t kInfinity = 0x7fff & ~((1 << kMantissa) - 1);

  // Round to nearest even, once, from any value a double holds; a NaN becomes 0x7fff as on the device.
  static uint16_t encode(double value) {
    if (std::isnan(value)) return 0x7fff;
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const double size = std::fabs(value);
    if (std::isinf(size)) return sign | kInfinity;
    int exponent = 0;
    std::frexp(size, &exponent);
    exponent = size == 0 || exponent - 1 < 1 - kBias ? 1 - kBias : exponent - 1;  // subnormals share the least one
    const double units = std::nearbyint(std::ldexp(size, kMantissa - exponent));
    // The hidden bit, and a carry of the rounding, add one to the exponent field.
    const double bits = units + std::ldexp(double(exponent + kBias - 1), kMantissa);
    return sign | (bits >= kInfinity ? kInfinity : uint16_t(bits));
  }

  static float decode(uint16_t bits) {
    const int field = (bits & 0x7fff) >> kMantissa, mantissa = bits & ((1 << kMantissa) - 1);
    float size;
    if ((bits & kInfinity) == kInfinity) {
      size = mantissa ? NAN : INFINITY;
    } else {
      const int hidden = field ? 1 << kMantissa : 0;
      size = float(std::ldexp(double(mantissa + hidden), (field ? field : 1) - kBias - kMantissa));
    }
    return bits & 0x8000 ? -size : size;
  }
};

using HalfFormat = Format<10>;
using BFloat16Format = Format<7>;

}  // namespace dlkern_shim

struct alignas(2) __half {
  uint16_t bits;  // no name of CUDA's: kernels use the conversions below
  __half() = default;
  __half(float v) : bits(dlkern_shim::HalfFormat::encode(v)) {}
  __half(double v) : bits(dlkern_shim::HalfFormat::encode(v)) {}
  operator float() const { return dlkern_shim::HalfFormat::decode(bits); }
};
struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float v) : bits(dlkern_shim::BFloat16Format::encode(v)) {}
  __nv_bfloat16(double v) : bits(dlkern_shim::BFloat16Format::encode(v)) {}
  operator float() const { return dlkern_shim::BFloat16Format::decode(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline __half __float2half(float v) { return __half(v); }
inline __half __float2half_rn(float v) { return __half(v); }
inline __half __double2half(double v) { return __half(v); }
inline float __half2float(__half v) { return float(v); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline float __low2float(__half2 v) { return float(v.x); }
inline float __high2float(__half2 v) { return float(v.y); }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half v;
  v.bits = bits;
  return v;
}

inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __double2bfloat16(double v) { return __nv_bfloat16(v); }
inline float __bfloat162float(__nv_bfloat16 v) { return float(v); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
inline float __low2float(__nv_bfloat162 v) { return float(v.x); }
inline float __high2float(__nv_bfloat162 v) { return float(v.y); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 v;
  v.bits = bits;
  return v;
}
