// depthwise on planes (NCHW): the lanes of a vector are neighbouring columns. A thread copies rows of one plane into
// padded ones in its cache (PaddedRows), so that no column is special; a tile is a few rows of outputs by one vector.

DLKERN_INLINE vf broadcast(const float* p) {
#if DLKERN_AVX2
  return (vf)_mm256_broadcast_ss(p);
#else
  return vf{*p, *p, *p, *p, *p, *p, *p, *p};
#endif
}
DLKERN_INLINE vd broadcast(const double* p) { return vd{*p, *p, *p, *p}; }

#if DLKERN_AVX2
// The even and the odd ones of 16 consecutive elements, and back.
DLKERN_INLINE void split_pairs(vf a, vf b, vf& even, vf& odd) {
  const __m256 e = _mm256_shuffle_ps((__m256)a, (__m256)b, 0x88), o = _mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd);
  even = (vf)_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(e), 0xd8));
  odd = (vf)_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(o), 0xd8));
}
DLKERN_INLINE void join_pairs(vf even, vf odd, vf& a, vf& b) {
  const __m256 low = _mm256_unpacklo_ps((__m256)even, (__m256)odd),
               high = _mm256_unpackhi_ps((__m256)even, (__m256)odd);
  a = (vf)_mm256_permute2f128_ps(low, high, 0x20);
  b = (vf)_mm256_permute2f128_ps(low, high, 0x31);
}
#endif

template <class T>
struct Padded {
  typedef wide_t<T> A;
  typedef vec_t<T> V;
  const PaddedRows& shape;
  A* data;  // a row of zeros, then rows [begin, end) of the plane
  const T* plane = nullptr;
  int64_t begin = 0, end = 0;

  // Fills only write what is inside the image: what is around it stays 0.
  Padded(const PaddedRows& padded, A* memory) : shape(padded), data(memory) {
    std::fill_n(data, (shape.capacity + 1) * shape.row(), A(0));
  }
  const A* row(int64_t y) const { return y < begin || y >= end ? data : data + (y - begin + 1) * shape.row(); }

  void fill(const T* from, int64_t first, int64_t last) {
    if (from == plane && first >= begin && last <= end) return;
    plane = from, begin = first, end = last;
    const int64_t n = shape.columns;
    for (int64_t y = first; y < last; ++y) {
      const T* in = from + y * n;
      A* out = data + (y - first + 1) * shape.row();
      int64_t i = 0;
      if (shape.step == 1) {
        out -= shape.base;
        for (; i + kLanes<T> <= n; i += kLanes<T>) store<false>(out + i, load<false>(in + i, 0), 0);
        if (i < n) store<false>(out + i, load<true>(in + i, (int)(n - i)), 0);  // 0 to the right, as it was
        continue;
      }
#if DLKERN_AVX2
      if constexpr (sizeof(A) == 4) {
        if (shape.step == 2) {
          A *even = out + shape.position(0), *odd = out + shape.position(1);
          for (; i + 16 <= n; i += 16) {
            vf e, o;
            split_pairs(load<false>(in + i, 0), load<false>(in + i + 8, 0), e, o);
            store<false>(even + i / 2, e, 0);
            store<false>(odd + i / 2, o, 0);
          }
        }
      }
#endif
      int64_t remainder = (i - shape.base) % shape.step, at = (i - shape.base) / shape.step;
      for (; i < n; ++i) {
        out[remainder * shape.length + at] = read(in + i);
        if (++remainder == shape.step) remainder = 0, ++at;
      }
    }
  }
};

// Rows of the image under outputs [begin, end) of all remainders.
inline Range rows_under(const std::vector<Axis>& axes, int64_t begin, int64_t end) {
  Range r{axes[0].in, 0};
  for (const Axis& a : axes) {
    const int64_t last = std::min(end, a.out) - 1;
    if (last < begin || a.taps == 0) continue;
    r.begin = std::min(r.begin, std::max<int64_t>(0, a.input(begin, 0)));
    r.end = std::max(r.end, std::min(a.in, a.input(last, a.taps - 1) + 1));
  }
  return r.begin < r.end ? r : Range{0, 0};
}

// The taps of a row of a kernel: where each is read, and which of them any lane of a vector of outputs needs.
struct ColumnTaps {
  int64_t position[kMaxKernel];
  int64_t taps;
  bool dense3;

  ColumnTaps(const Axis& axis, const PaddedRows& shape) : taps(axis.taps) {
    for (int64_t k = 0; k < taps; ++k) position[k] = shape.position(axis.offset + k * axis.spacing);
    dense3 = taps == 3 && shape.step == 1 && axis.spacing == 1;
  }
};

inline Range taps_under(const Axis& axis, int64_t begin, int64_t end) {
  Range r{0, axis.taps};
  while (r.begin < r.end && axis.input(end - 1, r.begin) < 0) ++r.begin;
  while (r.begin < r.end && axis.input(begin, r.end - 1) >= axis.in) --r.end;
  return r;
}

constexpr int kTileRows = 6;

// kRows rows of one vector of outputs; in[r * kRows + i] is what row i reads for the row r of taps.
template <class A, int kTaps, int kRows, class V>
DLKERN_INLINE void plane_tile(V (&acc)[kRows], const A* const* in, int64_t rows, const A* const* weights,
                              const int64_t* position, Range taps, int64_t next, int64_t t) {
  for (int64_t r = 0; r < rows; ++r) {
    const A* p[kRows];
    DLKERN_UNROLL
    for (int i = 0; i < kRows; ++i) p[i] = in[r * kRows + i] + t;
    if constexpr (kTaps > 0) {
      DLKERN_UNROLL
      for (int k = 0; k < kTaps; ++k) {
        const V w = broadcast(weights[r] + k * next);
        const int64_t at = position[k];
        DLKERN_UNROLL
        for (int i = 0; i < kRows; ++i) acc[i] = fma(w, load<false>(p[i] + at, 0), acc[i]);
      }
    } else {
      for (int64_t k = taps.begin; k < taps.end; ++k) {
        const V w = broadcast(weights[r] + k * next);
        const int64_t at = position[k];
        DLKERN_UNROLL
        for (int i = 0; i < kRows; ++i) acc[i] = fma(w, load<false>(p[i] + at, 0), acc[i]);
      }
    }
  }
}

// The dense 3x3 kernel at stride 1: each row of the input is loaded once for the rows of outputs that it is under.
template <class A, int kRows, class V>
DLKERN_INLINE void plane_tile_3x3(V (&acc)[kRows], const A* const* in, const V (&w)[9], int64_t t) {
  DLKERN_UNROLL
  for (int j = 0; j < kRows + 2; ++j)
    for (int k = 0; k < 3; ++k) {
      const V x = load<false>(in[j] + t + k, 0);
      for (int r = 0; r < 3; ++r)
        if (j >= r && j - r < kRows) acc[j - r] = fma(w[3 * r + k], x, acc[j - r]);
    }
}

// What a correlation of planes writes: rows of T in place, or of the wide type, to be added to and joined later.
template <class T>
struct PlaneOutput {
  T* direct;          // the plane, or null
  wide_t<T>* joined;  // rows of this remainder of the columns, from output row `band` on
  int64_t length, band;
  bool add;  // to what is there
  wide_t<T> bias;
  int activation;
  double param;
};

// Output rows [begin, end) of one remainder of the rows, and of the columns.
template <class T>
void correlate_plane(const Padded<T>& padded, const Axis& rows, const Axis& columns, const wide_t<T>* weights,
                     int64_t kernel_w, int64_t begin, int64_t end, const PlaneOutput<T>& out) {
  typedef wide_t<T> A;
  typedef vec_t<T> V;
  constexpr int lanes = kLanes<T>;
  const ColumnTaps taps(columns, padded.shape);
  const bool dense3 = taps.dense3 && rows.taps == 3 && rows.step == 1 && rows.spacing == 1;
  const A* in[kMaxKernel * kTileRows];
  const A* tap_rows[kMaxKernel];
  V dense[9];
  if (dense3)
    for (int r = 0; r < 3; ++r)
      for (int k = 0; k < 3; ++k)
        dense[3 * r + k] =
            broadcast(weights + (rows.first + r * rows.next) * kernel_w + columns.first + k * columns.next);
  for (int64_t y = begin; y < end; y += kTileRows) {
    const int live = (int)std::min<int64_t>(kTileRows, end - y);
    int64_t used = 0;
    if (dense3) {
      for (int j = 0; j < kTileRows + 2; ++j) in[j] = padded.row(rows.input(y, j)) + taps.position[0];
    } else {
      for (int64_t r = 0; r < rows.taps; ++r) {
        const Range reach{rows.input(y, r), rows.input(y + live - 1, r)};
        if (reach.end < 0 || reach.begin >= rows.in) continue;
        for (int i = 0; i < kTileRows; ++i) in[used * kTileRows + i] = padded.row(rows.input(y + i, r));
        tap_rows[used++] = weights + (rows.first + r * rows.next) * kernel_w + columns.first * (taps.taps > 0);
      }
    }
    for (int64_t from = 0; from < columns.out; from += lanes) {
      // in place the last vector of a row is a whole one, which overlaps the one before it
      const int64_t t = out.direct && columns.out >= lanes ? std::min(from, columns.out - lanes) : from;
      const int n = (int)std::min<int64_t>(lanes, columns.out - t);
      V acc[kTileRows];
      for (int i = 0; i < kTileRows; ++i) acc[i] = broadcast(&out.bias);
      if (out.add)
        for (int i = 0; i < live; ++i) acc[i] = load<false>(out.joined + (y + i - out.band) * out.length + t, lanes);
      if (dense3) {
        plane_tile_3x3<A, kTileRows>(acc, in, dense, t);
      } else {
        const Range under = taps_under(columns, t, t + n);
        if (under.begin == 0 && under.end == 3 && taps.taps == 3)
          plane_tile<A, 3, kTileRows>(acc, in, used, tap_rows, taps.position, under, columns.next, t);
        else if (under.begin == 0 && under.end == 7 && taps.taps == 7)
          plane_tile<A, 7, kTileRows>(acc, in, used, tap_rows, taps.position, under, columns.next, t);
        else
          plane_tile<A, 0, kTileRows>(acc, in, used, tap_rows, taps.position, under, columns.next, t);
      }
      if (out.joined) {
        for (int i = 0; i < live; ++i) store<false>(out.joined + (y + i - out.band) * out.length + t, acc[i], lanes);
        continue;
      }
      finish<kTileRows>(acc, out.activation, out.param);
      T* to = out.direct + (rows.start + y * rows.stride) * columns.out + t;
      const int64_t row = rows.stride * columns.out;
      // short rows, one below the other: what a row writes too much, the next one writes again
      const int whole = n == lanes ? live : row == columns.out ? std::max(live - lanes / n, 0) : 0;
      for (int i = 0; i < whole; ++i) store<false>(to + i * row, acc[i], n);
      for (int i = whole; i < live; ++i) store<true>(to + i * row, acc[i], n);
    }
  }
}

// Mean of n consecutive elements, and the sum of squares about it; they are in the cache.
template <class T>
Moments moments_of(const T* y, int64_t n) {
  typedef vec_t<T> V;
  constexpr int lanes = kLanes<T>;
  constexpr int64_t kPiece = 4096;
  Moments all{0, 0, 0};
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t length = std::min(n - begin, kPiece), whole = length / lanes * lanes;
    const int rest = (int)(length - whole);
    const T* p = y + begin;
    Total<V> sums;
    V s[4] = {};
    for (int64_t i = 0; i < whole; i += lanes) s[i / lanes & 3] += load<false>(p + i, lanes);
    if (rest) s[0] += load<true>(p + whole, rest);
    sums.take(s);
    const wide_t<T> centre = (wide_t<T>)(sums.value() / (double)length);
    const V about = broadcast(&centre);
    V q[4] = {};
    for (int64_t i = 0; i < whole; i += lanes) {
      const V d = load<false>(p + i, lanes) - about;
      s[i / lanes & 3] += d;
      q[i / lanes & 3] = fma(d, d, q[i / lanes & 3]);
    }
    if (rest) {
      const V d = select(first_lanes(V{}, rest), load<true>(p + whole, rest) - about, V{});
      s[0] += d;
      q[0] = fma(d, d, q[0]);
    }
    Total<V> first, second;
    first.take(s);
    second.take(q);
    const double off = first.value() / (double)length;
    all.merge((double)length, centre + off, second.value() - off * first.value());
  }
  return all;
}

template <class T>
void forward_planes(const DepthwiseForwardContext& f, Team team) {
  typedef wide_t<T> A;
  const DepthwiseForward& a = f.args;
  const DepthwiseGeometry& g = a.geometry;
  const DepthwisePlan& plan = f.plan;
  const Axis &rows = plan.rows[0], &columns = plan.columns[0];
  const int64_t outputs = plan.outputs, in_plane = g.height * g.width, out_plane = g.out_height * g.out_width;
  A* memory = reinterpret_cast<A*>(f.scratch + team.rank * plan.per_thread);
  A* weights = memory;
  Padded<T> padded(plan.input, memory + divide_up(plan.taps, 16) * 16);
  const Range planes = team.share(g.batch * outputs);
  for (int64_t i = planes.begin; i < planes.end; ++i) {
    const int64_t o = i % outputs;
    const T* x = static_cast<const T*>(a.x) + i / g.multiplier * in_plane;
    T* y = static_cast<T*>(a.y) + i * out_plane;
    for (int64_t k = 0; k < plan.taps; ++k) weights[k] = read(static_cast<const T*>(a.weight) + o * plan.taps + k);
    PlaneOutput<T> out{y, nullptr, 0, 0, false, A(0), a.activation, a.param};
    if (a.bias) out.bias = read(static_cast<const T*>(a.bias) + o);
    for (int64_t t = 0; t < g.out_height; t += plan.input.band) {
      const int64_t end = std::min(g.out_height, t + plan.input.band);
      const Range under = rows_under(plan.rows, t, end);
      padded.fill(x, under.begin, under.end);
      correlate_plane(padded, rows, columns, weights, g.kernel_w, t, end, out);
    }
    if (a.mean) {
      const Moments m = moments_of(y, out_plane);
      double* partial = f.common + 2 * outputs * (i / outputs);
      partial[o] = m.mean;
      partial[outputs + o] = m.m2;
    }
  }
  if (!a.mean) return;
  team.barrier();
  const Range finished = team.share(outputs, 32);
  for (int64_t o = finished.begin; o < finished.end; ++o) finish_moments<A>(a, plan, f.common, o);
}
