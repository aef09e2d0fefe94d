// Products of attention's blocks: c (m, n) = or += a (m, depth) b (depth, n).
//
// a is read element by element with any strides; b in panels of 2 vectors' columns, `ldb` elements between its rows and
// `panel` between panels, padded to whole vectors; c has rows of whole vectors. Each element is summed in order of
// depth.

#ifdef __clang__
#define DLKERN_UNROLL _Pragma("unroll")
#else
#define DLKERN_UNROLL _Pragma("GCC unroll 8")
#endif

DLKERN_INLINE vf broadcast(float x) { return vf{x, x, x, x, x, x, x, x}; }
DLKERN_INLINE vd broadcast(double x) { return vd{x, x, x, x}; }

// The larger of each pair of lanes; b where one is NaN.
template <class V>
DLKERN_INLINE V larger(V a, V b) {
#if DLKERN_AVX2
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
  else
    return (V)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return select(a > b, a, b);
#endif
}

// exp(x) for x up to 88, without what exp does for larger ones.
DLKERN_INLINE vf exponential(vf x) {
  x = larger(vf{} - 88.0f, x);
  const vf magic = vf{} + 12583039.0f;  // as in vector_math.inl's reduce
  const vf shifted = fma(x, vf{} + 1.44269504088896341f, magic);
  const vf n = shifted - magic;
  const vf r = fma(n, vf{} - 1.42860682030941723e-6f, fma(n, vf{} - 0.693145751953125f, x));
  const vf scale = (vf)((vu)shifted << 23);
  return fma(exp_series(r), scale, scale);
}
DLKERN_INLINE vd exponential(vd x) { return exp(x); }

template <class T, int kRows, int kVectors>
DLKERN_NOINLINE void product_tile(T* c, int64_t ldc, const T* a, int64_t row, int64_t column, const T* b, int64_t ldb,
                                  int64_t depth, bool add) {
  typedef vec_t<T> V;
  constexpr int w = kLanes<T>;
  V sum[kRows][kVectors];
  DLKERN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    DLKERN_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[r][v] = V{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    V right[kVectors];
    DLKERN_UNROLL
    for (int v = 0; v < kVectors; ++v) right[v] = load<false>(b + v * w, w);
    DLKERN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const V left = broadcast(a[r * row]);
      DLKERN_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
    }
    a += column;
    b += ldb;
  }
  DLKERN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    DLKERN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      T* p = c + r * ldc + v * w;
      store<false>(p, add ? load<false>(p, w) + sum[r][v] : sum[r][v], w);
    }
  }
}

template <class T, int kVectors>
DLKERN_INLINE void product_rows(int64_t rows, T* c, int64_t ldc, const T* a, int64_t row, int64_t column, const T* b,
                                int64_t ldb, int64_t depth, bool add) {
  switch (rows) {
    case 1:
      return product_tile<T, 1, kVectors>(c, ldc, a, row, column, b, ldb, depth, add);
    case 2:
      return product_tile<T, 2, kVectors>(c, ldc, a, row, column, b, ldb, depth, add);
    case 3:
      return product_tile<T, 3, kVectors>(c, ldc, a, row, column, b, ldb, depth, add);
    case 4:
      return product_tile<T, 4, kVectors>(c, ldc, a, row, column, b, ldb, depth, add);
    case 5:
      return product_tile<T, 5, kVectors>(c, ldc, a, row, column, b, ldb, depth, add);
    default:
      return product_tile<T, 6, kVectors>(c, ldc, a, row, column, b, ldb, depth, add);
  }
}

template <class T>
void product(T* c, int64_t ldc, const T* a, int64_t row, int64_t column, const T* b, int64_t panel, int64_t ldb,
             int64_t m, int64_t n, int64_t depth, bool add) {
  constexpr int w = kLanes<T>;
  const int64_t tiles = (m + 5) / 6;  // of nearly the same height: one row alone would wait for its own sums
  for (int64_t j = 0; j < n; j += 2 * w) {
    const T* right = b + j / (2 * w) * panel;
    for (int64_t t = 0, i = 0; t < tiles; ++t) {
      const int64_t end = m * (t + 1) / tiles;
      if (n - j > w)
        product_rows<T, 2>(end - i, c + i * ldc + j, ldc, a + i * row, row, column, right, ldb, depth, add);
      else
        product_rows<T, 1>(end - i, c + i * ldc + j, ldc, a + i * row, row, column, right, ldb, depth, add);
      i = end;
    }
  }
}

// b is the rows of working memory themselves: panels lie beside each other.
template <class T>
DLKERN_INLINE void product_of_rows(T* c, int64_t ldc, const T* a, int64_t row, int64_t column, const T* b, int64_t ldb,
                                   int64_t m, int64_t n, int64_t depth, bool add) {
  product(c, ldc, a, row, column, b, 2 * kLanes<T>, ldb, m, n, depth, add);
}

// ---------------------------------------------------------------------------- into working memory
// Calls run(pointer of the stored type) for data of that dtype, whose wide type is T.
template <class T, class Run>
DLKERN_INLINE void as_stored(const void* data, int dtype, Run run) {
  if constexpr (sizeof(T) == 8) {
    run(static_cast<const double*>(data));
  } else {
    if (dtype == kFloat32)
      run(static_cast<const float*>(data));
    else if (dtype == kBFloat16)
      run(static_cast<const bf16*>(data));
    else
      run(static_cast<const f16*>(data));
  }
}

// Heads often lie beside each other, and a head's rows far apart: the processor does not see a row coming.
template <class S>
DLKERN_INLINE void ask_for(const S* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(S)) __builtin_prefetch(row + i);
}
constexpr int64_t kAhead = 8;  // rows

// Rows of n elements, filled up with 0 to whole multiples of kPadded.
template <class T, class S>
void copy_rows(T* to, int64_t ld, const S* from, int64_t stride, int64_t rows, int64_t n) {
  constexpr int w = kLanes<T>;
  for (int64_t r = 0; r < rows; ++r, to += ld, from += stride) {
    if (r + kAhead < rows) ask_for(from + kAhead * stride, n);
    int64_t i = 0;
    for (; i + w <= n; i += w) store<false>(to + i, load<false>(from + i, w), w);
    if (i < n) store<false>(to + i, load<true>(from + i, (int)(n - i)), w), i += w;
    for (; i < padded(n); i += w) store<false>(to + i, vec_t<T>{}, w);
  }
}

// Rows of the wide type that products can read.
template <class T>
struct Rows {
  const T* first;
  int64_t row;  // elements from one to the next
};

// Rows of n elements: where they lie if products can read them there, else a copy of them in `to`.
template <class T, class S>
Rows<T> rows_in_place(const S* from, int64_t stride, int64_t rows, int64_t n, T* to, int64_t ld) {
  if constexpr (sizeof(S) == sizeof(T)) {
    // rows a multiple of a page's quarter apart would share few sets of the first cache
    if (n % kLanes<T> == 0 && stride % (1024 / (int64_t)sizeof(T)) != 0) return {from, stride};
  }
  copy_rows(to, ld, from, stride, rows, n);
  return {to, ld};
}

// Rows times factor[row * step].
template <class T, class S>
void store_rows(S* to, int64_t stride, const T* from, int64_t ld, int64_t rows, int64_t n, const T* factor,
                int64_t step) {
  constexpr int w = kLanes<T>;
  for (int64_t r = 0; r < rows; ++r, to += stride, from += ld) {
    const auto f = broadcast(factor[r * step]);
    int64_t i = 0;
    for (; i + w <= n; i += w) store<false>(to + i, load<false>(from + i, w) * f, w);
    if (i < n) store<true>(to + i, load<false>(from + i, w) * f, (int)(n - i));
  }
}

#if DLKERN_AVX2
DLKERN_INLINE void transpose(vf (&v)[8]) {
  __m256 a[8], b[8];
  DLKERN_UNROLL
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
  }
  DLKERN_UNROLL
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  DLKERN_UNROLL
  for (int i = 0; i < 4; ++i) {
    v[i] = (vf)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    v[i + 4] = (vf)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}
#endif

// Rows from `first` on of (rows, n), times a factor, as panels [row / width][element][row % width] with width
// 2 vectors; rows from `rows` on are 0.
template <class T, class S>
void copy_panels(T* to, const S* from, int64_t stride, int64_t first, int64_t rows, int64_t n, T factor) {
  constexpr int w = kLanes<T>, width = 2 * w;
  [[maybe_unused]] const auto f = broadcast(factor);
  for (int64_t p = first / width * width; p < rows; p += width) {
    T* panel = to + p * padded(n);
    for (int64_t half = 0; half < width; half += w) {
      const int64_t begin = p + half, here = std::clamp<int64_t>(rows - begin, 0, w);
      for (int64_t r = begin + w; r < std::min(begin + 2 * w, rows); ++r) ask_for(from + r * stride, n);
      int64_t i = 0;
#if DLKERN_AVX2
      if constexpr (sizeof(T) == 4) {
        for (; i < n; i += 8) {
          const int count = (int)std::min<int64_t>(8, n - i);
          vf v[8];
          for (int r = 0; r < 8; ++r) {
            const S* row = from + (begin + r) * stride + i;
            v[r] = r >= here ? vf{} : count == 8 ? load<false>(row, 8) : load<true>(row, count);
          }
          transpose(v);
          for (int k = 0; k < 8; ++k)
            store<false>(panel + (i + k) * width + half, v[k] * f, 8);  // room up to padded(n)
        }
        continue;
      }
#endif
      for (; i < n; ++i)
        for (int64_t r = 0; r < w; ++r)
          panel[i * width + half + r] =
              r >= here ? T(0) : factor * (T)load<true>(from + (begin + r) * stride + i, 1)[0];
    }
  }
}
