// The products of a recurrent step: few rows times a weight matrix that is read where it lies, without packing.
// Each element of a result is summed in an order of its own, which no tiling and no thread changes.

#define DLKERN_LAMBDA __attribute__((always_inline))

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

template <class T>
DLKERN_INLINE T lane_sum(vec_t<T> v) {
  if constexpr (sizeof(T) == 4)
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  else
    return (v[0] + v[2]) + (v[1] + v[3]);
}
#if DLKERN_AVX2
template <>
DLKERN_INLINE float lane_sum<float>(vf v) {  // the same sums in the same order
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
#endif

// y (kRows, kColumns) += x (kRows, length) w (kColumns, length)^T, with the strides ldy, ldx, ldw of rows.
template <class T, int kRows, int kColumns>
DLKERN_NOINLINE void dot_tile(T* y, int64_t ldy, const T* x, int64_t ldx, const T* w, int64_t ldw, int64_t length) {
  typedef vec_t<T> V;
  constexpr int lanes = kLanes<T>;
  V sum[kRows][kColumns] = {};
  const auto add = [&](int64_t k, auto tail, int n) DLKERN_LAMBDA {
    V row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) row[r] = load<tail.value>(x + r * ldx + k, n);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const V column = load<tail.value>(w + c * ldw + k, n);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][c] = fma(row[r], column, sum[r][c]);
    }
  };
  int64_t k = 0;
  for (; k + lanes <= length; k += lanes) add(k, Flag<false>{}, lanes);
  if (k < length) add(k, Flag<true>{}, (int)(length - k));
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) y[r * ldy + c] += lane_sum<T>(sum[r][c]);
}

template <class T, int kRows, int kColumns>
DLKERN_INLINE void dot_columns(T* y, int64_t ldy, const T* x, int64_t ldx, const T* w, int64_t ldw, int64_t columns,
                               int64_t length) {
  int64_t c = 0;
  for (; c + kColumns <= columns; c += kColumns)
    dot_tile<T, kRows, kColumns>(y + c, ldy, x, ldx, w + c * ldw, ldw, length);
  for (; c < columns; ++c) dot_tile<T, kRows, 1>(y + c, ldy, x, ldx, w + c * ldw, ldw, length);
}

// y (rows, columns) += x (rows, length) w (columns, length)^T. The weight is walked in groups of rows that stay in the
// first cache while all rows of x pass.
template <class T>
void dot_product(T* y, int64_t ldy, const T* x, int64_t ldx, int64_t rows, const T* w, int64_t ldw, int64_t columns,
                 int64_t length) {
  const int64_t group = rows <= 4 ? columns : 12;
  for (int64_t c = 0; c < columns; c += group) {
    const int64_t n = std::min(group, columns - c);
    const T* panel = w + c * ldw;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) dot_columns<T, 4, 3>(y + r * ldy + c, ldy, x + r * ldx, ldx, panel, ldw, n, length);
    if (rows - r == 3) dot_columns<T, 3, 4>(y + r * ldy + c, ldy, x + r * ldx, ldx, panel, ldw, n, length);
    if (rows - r == 2) dot_columns<T, 2, 6>(y + r * ldy + c, ldy, x + r * ldx, ldx, panel, ldw, n, length);
    if (rows - r == 1) dot_columns<T, 1, 8>(y + r * ldy + c, ldy, x + r * ldx, ldx, panel, ldw, n, length);
  }
}

// y (kRows, columns) += x (kRows, kDepth) w (kDepth, columns): kDepth rows of the weight are read side by side.
template <class T, int kRows, int kDepth>
DLKERN_NOINLINE void sum_rows(T* y, int64_t ldy, const T* x, int64_t ldx, const T* w, int64_t ldw, int64_t columns) {
  typedef vec_t<T> V;
  constexpr int lanes = kLanes<T>;
  V factor[kRows][kDepth];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int k = 0; k < kDepth; ++k) factor[r][k] = V{} + x[r * ldx + k];
  const auto add = [&](int64_t c, auto tail, int n) DLKERN_LAMBDA {
    V sum[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r] = load<tail.value>(y + r * ldy + c, n);
#pragma GCC unroll 8
    for (int k = 0; k < kDepth; ++k) {
      const V row = load<tail.value>(w + k * ldw + c, n);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r] = fma(factor[r][k], row, sum[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) store<tail.value>(y + r * ldy + c, sum[r], n);
  };
  int64_t c = 0;
  for (; c + lanes <= columns; c += lanes) add(c, Flag<false>{}, lanes);
  if (c < columns) add(c, Flag<true>{}, (int)(columns - c));
}

template <class T, int kRows, int kDepth>
DLKERN_INLINE void sum_depth(T* y, int64_t ldy, const T* x, int64_t ldx, const T* w, int64_t ldw, int64_t columns,
                             int64_t length) {
  int64_t k = 0;
  for (; k + kDepth <= length; k += kDepth) sum_rows<T, kRows, kDepth>(y, ldy, x + k, ldx, w + k * ldw, ldw, columns);
  for (; k < length; ++k) sum_rows<T, kRows, 1>(y, ldy, x + k, ldx, w + k * ldw, ldw, columns);
}

// y (rows, columns) += x (rows, length) w (length, columns): for few rows, as the weight is read for every three.
template <class T>
void sum_product(T* y, int64_t ldy, const T* x, int64_t ldx, int64_t rows, const T* w, int64_t ldw, int64_t columns,
                 int64_t length) {
  int64_t r = 0;
  for (; r + 3 <= rows; r += 3) sum_depth<T, 3, 4>(y + r * ldy, ldy, x + r * ldx, ldx, w, ldw, columns, length);
  if (rows - r == 2) sum_depth<T, 2, 6>(y + r * ldy, ldy, x + r * ldx, ldx, w, ldw, columns, length);
  if (rows - r == 1) sum_depth<T, 1, 8>(y + r * ldy, ldy, x + r * ldx, ldx, w, ldw, columns, length);
}
