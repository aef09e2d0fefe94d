// Loads, stores, conversions and the few operations that plain vector operators do not give.
// Included once per instruction set (foreach_isa.h).
//
// load and store take <kTail>: without it a whole vector, with it only the first n lanes (the others read as 0).

typedef float unaligned_vf __attribute__((vector_size(32), aligned(4), may_alias));
typedef double unaligned_vd __attribute__((vector_size(32), aligned(8), may_alias));
typedef uint16_t unaligned_vh __attribute__((vector_size(16), aligned(2), may_alias));

template <class V>
DLKERN_INLINE V splat(double value) {
  if constexpr (sizeof(V{}[0]) == 4)
    return V{} + (float)value;
  else
    return V{} + value;
}

DLKERN_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
DLKERN_INLINE vd select(vl mask, vd a, vd b) { return mask ? a : b; }

// Both directions of an op recompute the same value: whether a * b + c is rounded once or twice is decided here and
// not by the compiler (the build has -ffp-contract=off).
DLKERN_INLINE vf fma(vf a, vf b, vf c) {
#if DLKERN_AVX2
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
DLKERN_INLINE vd fma(vd a, vd b, vd c) {
#if DLKERN_AVX2
  return (vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// Sums in float64, to which sums of few terms are added.
template <class V>
struct Total {
  vd low{}, high{};

  DLKERN_INLINE void add(V v) {
    if constexpr (sizeof(v[0]) == 8) {
      low += v;
    } else {
#if DLKERN_AVX2
      low += (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
      high += (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#else
      low += vd{v[0], v[1], v[2], v[3]};
      high += vd{v[4], v[5], v[6], v[7]};
#endif
    }
  }
  // Adds four accumulators and sets them to zero.
  DLKERN_INLINE void take(V (&v)[4]) {
    add((v[0] + v[1]) + (v[2] + v[3]));
    v[0] = v[1] = v[2] = v[3] = V{};
  }
  DLKERN_INLINE double value() const {
    const vd v = low + high;
    return (v[0] + v[1]) + (v[2] + v[3]);
  }
};

DLKERN_INLINE vi first_lanes(vf, int n) { return vi{0, 1, 2, 3, 4, 5, 6, 7} < n; }
DLKERN_INLINE vl first_lanes(vd, int n) { return vl{0, 1, 2, 3} < (int64_t)n; }

// ------------------------------------------------------------------------------- conversions
// Where a conversion is one or two instructions it is compiled in place, else called: the portable path is to be small
// and quick to compile.
#if DLKERN_AVX2
#define DLKERN_CONVERSION DLKERN_INLINE
#else
#define DLKERN_CONVERSION DLKERN_NOINLINE inline
#endif

DLKERN_INLINE vf from_bits(vu u) { return (vf)u; }

DLKERN_CONVERSION vf widen(vh h, bf16*) {
#if DLKERN_AVX2
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
  return from_bits(__builtin_convertvector(h, vu) << 16);
#endif
}

DLKERN_CONVERSION vh narrow(vf v, bf16*) {
  const vu u = (vu)v;
  const vu rounded = u + 0x7fffu + ((u >> 16) & 1u);  // to nearest, ties to even
  const vu bits = (rounded | (vu)(v != v)) >> 16;     // a NaN, whose rounding may overflow, becomes that of all ones
#if DLKERN_AVX2
  const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);  // within each half
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(bits, vh);
#endif
}

DLKERN_CONVERSION vf widen(vh h, f16*) {
#if DLKERN_AVX2
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  const vu u = __builtin_convertvector(h, vu);
  const vu magnitude = (u & 0x7fffu) << 13;
  const vf scaled = from_bits(magnitude) * from_bits(vu{} + 0x77800000u);  // 2^112: the difference of exponent biases
  const vu bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : (vu)scaled;
  return from_bits(bits | ((u & 0x8000u) << 16));
#endif
}

DLKERN_CONVERSION vh narrow(vf v, f16*) {
#if DLKERN_AVX2
  return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vu u = (vu)v;
  const vu a = u & 0x7fffffffu;
  const vu normal = (a + 0xc8000fffu + ((a >> 13) & 1u)) >> 13;
  const vu subnormal = (vu)(from_bits(a) + 0.5f) - 0x3f000000u;  // the addition rounds to multiples of 2^-24
  vu bits = a < 0x38800000u ? subnormal : normal;
  bits = a >= 0x477ff000u ? vu{} + 0x7c00u : bits;  // 65520 and above round to infinity
  bits = a > 0x7f800000u ? 0x7e00u | ((a >> 13) & 0x3ffu) : bits;
  return __builtin_convertvector(bits | ((u >> 16) & 0x8000u), vh);
#endif
}

#undef DLKERN_CONVERSION

// ---------------------------------------------------------------------------- loads and stores
template <class U, class V>
DLKERN_NOINLINE V gather_first(const U* p, int n) {
  U lanes[sizeof(V) / sizeof(U)] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  V v;
  std::memcpy(&v, lanes, sizeof v);
  return v;
}
template <class U, class V>
DLKERN_NOINLINE void scatter_first(U* p, V v, int n) {
  U lanes[sizeof(V) / sizeof(U)];
  std::memcpy(lanes, &v, sizeof v);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// Half types in words of 4, 2 and 1 lanes (little-endian): there are no masked loads of 16-bit lanes before AVX-512.
DLKERN_INLINE vh gather_halves(const uint16_t* p, int n) {
  uint64_t words[2] = {0, 0}, rest = 0;
  if (n & 1) rest = p[n - 1];
  if (n & 2) {
    uint32_t pair;
    std::memcpy(&pair, p + (n & 4), sizeof pair);
    rest = rest << 32 | pair;
  }
  if (n & 4) std::memcpy(words, p, sizeof rest);
  words[n >> 2 & 1] = rest;
  vh v;
  std::memcpy(&v, words, sizeof v);
  return v;
}
DLKERN_INLINE void scatter_halves(uint16_t* p, vh v, int n) {
  uint64_t words[2];
  std::memcpy(words, &v, sizeof v);
  if (n & 4) std::memcpy(p, words, sizeof words[0]);
  const uint64_t rest = words[n >> 2 & 1];
  if (n & 2) std::memcpy(p + (n & 4), &rest, sizeof(uint32_t));
  if (n & 1) p[n - 1] = (uint16_t)(n & 2 ? rest >> 32 : rest);
}

template <bool kTail>
DLKERN_INLINE vf load(const float* p, int n) {
  if constexpr (!kTail) {
    return *reinterpret_cast<const unaligned_vf*>(p);
  } else {
#if DLKERN_AVX2
    return (vf)_mm256_maskload_ps(p, (__m256i)first_lanes(vf{}, n));
#else
    return gather_first<float, vf>(p, n);
#endif
  }
}
template <bool kTail>
DLKERN_INLINE void store(float* p, vf v, int n) {
  if constexpr (!kTail) {
    *reinterpret_cast<unaligned_vf*>(p) = v;
  } else {
#if DLKERN_AVX2
    _mm256_maskstore_ps(p, (__m256i)first_lanes(vf{}, n), (__m256)v);
#else
    scatter_first(p, v, n);
#endif
  }
}
template <bool kTail>
DLKERN_INLINE vd load(const double* p, int n) {
  if constexpr (!kTail) {
    return *reinterpret_cast<const unaligned_vd*>(p);
  } else {
#if DLKERN_AVX2
    return (vd)_mm256_maskload_pd(p, (__m256i)first_lanes(vd{}, n));
#else
    return gather_first<double, vd>(p, n);
#endif
  }
}
template <bool kTail>
DLKERN_INLINE void store(double* p, vd v, int n) {
  if constexpr (!kTail) {
    *reinterpret_cast<unaligned_vd*>(p) = v;
  } else {
#if DLKERN_AVX2
    _mm256_maskstore_pd(p, (__m256i)first_lanes(vd{}, n), (__m256d)v);
#else
    scatter_first(p, v, n);
#endif
  }
}
template <bool kTail, class H>
DLKERN_INLINE vf load_half(const H* p, int n) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(p);
  if constexpr (!kTail)
    return widen(*reinterpret_cast<const unaligned_vh*>(bits), (H*)nullptr);
  else
    return widen(gather_halves(bits, n), (H*)nullptr);
}
template <bool kTail, class H>
DLKERN_INLINE void store_half(H* p, vf v, int n) {
  uint16_t* bits = reinterpret_cast<uint16_t*>(p);
  if constexpr (!kTail)
    *reinterpret_cast<unaligned_vh*>(bits) = narrow(v, (H*)nullptr);
  else
    scatter_halves(bits, narrow(v, (H*)nullptr), n);
}
template <bool kTail>
DLKERN_INLINE vf load(const bf16* p, int n) {
  return load_half<kTail>(p, n);
}
template <bool kTail>
DLKERN_INLINE vf load(const f16* p, int n) {
  return load_half<kTail>(p, n);
}
template <bool kTail>
DLKERN_INLINE void store(bf16* p, vf v, int n) {
  store_half<kTail>(p, v, n);
}
template <bool kTail>
DLKERN_INLINE void store(f16* p, vf v, int n) {
  store_half<kTail>(p, v, n);
}

// Stores past the caches, to an address that is a multiple of 64 bytes (the first of consecutive ones).
DLKERN_INLINE void stream(float* p, vf v) {
#if DLKERN_AVX2
  _mm256_stream_ps(p, (__m256)v);
#else
  store<false>(p, v, 8);
#endif
}
DLKERN_INLINE void stream(double* p, vd v) {
#if DLKERN_AVX2
  _mm256_stream_pd(p, (__m256d)v);
#else
  store<false>(p, v, 4);
#endif
}
template <class H>
DLKERN_INLINE void stream(H* p, vf v) {
#if DLKERN_AVX2
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)narrow(v, (H*)nullptr));
#else
  store<false>(p, v, 8);
#endif
}
// Whether a run of stores can go past the caches: whole cache lines only.
template <class T>
DLKERN_INLINE bool whole_lines(const T* p, int64_t n) {
  return ((reinterpret_cast<uintptr_t>(p) | (uintptr_t)n * sizeof(T)) & 63) == 0;
}
template <bool kTail, class T, class V>
DLKERN_INLINE void put(T* p, V v, int n, bool streaming) {
  if constexpr (!kTail) {
    if (streaming) return stream(p, v);
  }
  store<kTail>(p, v, n);
}
// Streamed stores are not ordered with what follows, such as the word that tells another thread of them.
DLKERN_INLINE void finish_streaming() {
#if DLKERN_AVX2
  _mm_sfence();
#endif
}

// Asks for the cache line that a later step reads (or writes), once a line: slot numbers the vectors of one round.
template <class T, bool kWrite = false>
DLKERN_INLINE void prefetch(const T* p, int slot) {
  if (slot * kLanes<T> * sizeof(T) % 64 == 0) __builtin_prefetch(p, kWrite);
}

// ------------------------------------------------------------------------------ over an array
// A kernel over n consecutive elements is a struct with `lanes`, `together` and
//   template <bool kTail, int kSlot, int kVectors> void step(int64_t i, int n)
// for the kVectors vectors from i on (one, with n lanes of it, where kTail); kSlot numbers the accumulators of
// independent steps. `together` asks for steps of four vectors, where a step has a call in it.
template <class Kernel>
DLKERN_INLINE void over(Kernel& kernel, int64_t n) {
  constexpr int w = Kernel::lanes;
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    if constexpr (Kernel::together) {
      kernel.template step<false, 0, 4>(i, w);
    } else {
      kernel.template step<false, 0, 1>(i, w);
      kernel.template step<false, 1, 1>(i + w, w);
      kernel.template step<false, 2, 1>(i + 2 * w, w);
      kernel.template step<false, 3, 1>(i + 3 * w, w);
    }
  }
  for (; i + w <= n; i += w) kernel.template step<false, 0, 1>(i, w);
  if (i < n) kernel.template step<true, 1, 1>(i, (int)(n - i));
}

// The same one vector at a time, for kernels whose step has several rows.
template <class Kernel>
DLKERN_INLINE void over_single(Kernel& kernel, int64_t n) {
  constexpr int w = Kernel::lanes;
  int64_t i = 0;
  for (; i + w <= n; i += w) kernel.template step<false, 0, 1>(i, w);
  if (i < n) kernel.template step<true, 0, 1>(i, (int)(n - i));
}
