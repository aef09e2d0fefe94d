// batch_norm_act on rows (channels last): rows of `channels` consecutive elements, so the lanes of a vector are
// channels, and parameters and sums are arrays.
//
// Every pass reads all of the tensor. Threads share a grid of tasks, blocks of rows by tiles of columns, and walk it
// backwards in the second pass, which so begins with what is still in the cache.

// Where a pass writes through the caches it asks for the lines this many elements ahead: processors do that for what is
// read. 1 to 8 % less time at 64 and 256 channels.
constexpr int64_t kRowAhead = 1024;

template <class T>
struct RowSum {
  static constexpr int lanes = kLanes<T>;
  static constexpr bool together = false;
  const T* x;
  wide_t<T>* sum;

  template <bool kTail, int kSlot, int kVectors>
  DLKERN_INLINE void step(int64_t i, int n) {
    store<kTail>(sum + i, load<kTail>(sum + i, n) + load<kTail>(x + i, n), n);
  }
};

// A step takes kRows rows from `x` on, `stride` elements apart, and of each kVectors vectors; kRows or kVectors is 1.
template <class T, int kRows>
struct RowMoments {
  static constexpr int lanes = kLanes<T>;
  static constexpr bool together = false;
  const T* x;
  int64_t stride;
  const wide_t<T>* shift;
  wide_t<T>*sum, *square;

  template <bool kTail, int kSlot, int kVectors>
  DLKERN_INLINE void step(int64_t i, int n) {
    typedef vec_t<T> V;
    const V about = load<kTail>(shift + i, n);
    V s{}, q{};
    for (int r = 0; r < kRows; ++r) {
      const V d = load<kTail>(x + r * stride + i, n) - about;
      s += d;
      q = fma(d, d, q);
    }
    store<kTail>(sum + i, load<kTail>(sum + i, n) + s, n);
    store<kTail>(square + i, load<kTail>(square + i, n) + q, n);
  }
};

template <class T, int kShape, bool kResidual, int kRows>
struct RowApply {
  static constexpr int lanes = kLanes<T>;
  static constexpr bool together = kShape == kAny;
  const T *x, *residual;
  T* y;
  int64_t stride, y_stride;
  bool streaming;
  const wide_t<T>*mean, *scale, *bias;
  int activation;
  double param;

  template <bool kTail, int kSlot, int kVectors>
  DLKERN_INLINE void step(int64_t i, int n) {
    typedef vec_t<T> V;
    for (int r = 0; r < kRows; ++r) {
      V z[kVectors];
      for (int q = 0; q < kVectors; ++q) {
        const int64_t c = i + q * lanes, at = r * stride + c;
        if (!streaming) prefetch<T, true>(y + r * y_stride + c + kRowAhead, kSlot + q);
        z[q] =
            fma(load<kTail>(x + at, n) - load<kTail>(mean + c, n), load<kTail>(scale + c, n), load<kTail>(bias + c, n));
        if constexpr (kResidual) z[q] += load<kTail>(residual + at, n);
      }
      apply_activation<kShape>(z, activation, param);
      for (int q = 0; q < kVectors; ++q) put<kTail>(y + r * y_stride + i + q * lanes, z[q], n, streaming);
    }
  }
};

template <class T, int kShape, int kSource, int kRows>
struct RowReduce {
  static constexpr int lanes = kLanes<T>;
  static constexpr bool together = kShape == kAny;
  const T *g, *x, *other;
  T *dz, *dx;
  int64_t stride, g_stride;
  const wide_t<T>*mean, *scale, *bias;
  wide_t<T>*sum, *dot;
  int activation;
  double param;

  template <bool kTail, int kSlot, int kVectors>
  DLKERN_INLINE void step(int64_t i, int n) {
    typedef vec_t<T> V;
    V total[kVectors] = {}, product[kVectors] = {};
    for (int r = 0; r < kRows; ++r) {
      V d[kVectors], v[kVectors], from[kVectors];
      for (int q = 0; q < kVectors; ++q) {
        const int64_t c = i + q * lanes, at = r * stride + c;
        d[q] = load<kTail>(x + at, n) - load<kTail>(mean + c, n);
        v[q] = load<kTail>(g + r * g_stride + c, n);
        from[q] = derivative_argument<kTail, kShape, kSource>(d[q], load<kTail>(scale + c, n), load<kTail>(bias + c, n),
                                                              other + at, n);
      }
      input_gradient<kShape, kSource>(v, from, activation, param);
      for (int q = 0; q < kVectors; ++q) {
        const int64_t c = i + q * lanes, at = r * stride + c;
        if (dz) store<kTail>(dz + at, v[q], n);
        if (dx) store<kTail>(dx + at, v[q] * load<kTail>(scale + c, n), n);
        total[q] += v[q];
        product[q] = fma(v[q], d[q], product[q]);
      }
    }
    for (int j = 0; j < kVectors; ++j) {
      const int64_t c = i + j * lanes;
      store<kTail>(sum + c, load<kTail>(sum + c, n) + total[j], n);
      store<kTail>(dot + c, load<kTail>(dot + c, n) + product[j], n);
    }
  }
};

template <class T, int kShape, int kSource, int kRows>
struct RowInputGradient {
  static constexpr int lanes = kLanes<T>;
  static constexpr bool together = kShape == kAny;
  const T *g, *x, *other;
  T *dz, *dx;
  int64_t stride, g_stride;
  bool streaming;
  const wide_t<T>*mean, *scale, *bias, *slope, *offset;
  int activation;
  double param;

  template <bool kTail, int kSlot, int kVectors>
  DLKERN_INLINE void step(int64_t i, int n) {
    typedef vec_t<T> V;
    for (int r = 0; r < kRows; ++r) {
      V d[kVectors], v[kVectors], from[kVectors];
      for (int q = 0; q < kVectors; ++q) {
        const int64_t c = i + q * lanes, at = r * stride + c;
        if (!streaming) prefetch<T, true>(dx + at + kRowAhead, kSlot + q);
        if (!streaming && dz) prefetch<T, true>(dz + at + kRowAhead, kSlot + q);
        d[q] = load<kTail>(x + at, n) - load<kTail>(mean + c, n);
        v[q] = load<kTail>(g + r * g_stride + c, n);
        from[q] = derivative_argument<kTail, kShape, kSource>(d[q], load<kTail>(scale + c, n), load<kTail>(bias + c, n),
                                                              other + at, n);
      }
      input_gradient<kShape, kSource>(v, from, activation, param);
      for (int q = 0; q < kVectors; ++q) {
        const int64_t c = i + q * lanes, at = r * stride + c;
        const V centre = fma(d[q], load<kTail>(slope + c, n), load<kTail>(offset + c, n));
        if (dz) put<kTail>(dz + at, v[q], n, streaming);
        put<kTail>(dx + at, fma(v[q], load<kTail>(scale + c, n), -centre), n, streaming);
      }
    }
  }
};

// How many rows a kernel steps through together. Several spare loads of parameters and sums, but as so many streams in
// one page they defeat the processor's prefetching, unless they are so short that they are one stream. Where
// activations are called, they are called for several vectors of one row.
template <class T, int kShape>
inline int row_group(int64_t channels) {
  return kShape != kAny && 4 * channels * (int64_t)sizeof(T) <= 1024 ? 4 : 1;
}

// The columns [begin, end) of rows, for threads to share.
struct Tile {
  Range rows, columns;
};

struct Grid {
  int64_t blocks, tiles, tile_width;

  // Column tiles only where row blocks are too few for the threads; in multiples of a cache line.
  Grid(const Geometry& g, const Plan& plan, Team team) : blocks(plan.blocks), tiles(1), tile_width(g.channels) {
    if (team.size > 1 && blocks < 4 * team.size) {
      tile_width = divide_up(divide_up(g.channels, divide_up(2 * team.size, blocks)), 32) * 32;
      tiles = divide_up(g.channels, tile_width);
    }
  }
  Tile at(int64_t task, const Geometry& g, const Plan& plan) const {
    const int64_t block = task / tiles, column = task % tiles * tile_width;
    return {{block * plan.rows_per_block, std::min(g.outer, (block + 1) * plan.rows_per_block)},
            {column, std::min(g.channels, column + tile_width)}};
  }
};

template <class T>
struct RowArrays {  // per-thread, (channels,) each
  wide_t<T>*first, *second, *shift;
  RowArrays(double* scratch, const Plan& plan, int64_t channels, Team team) {
    double* mine = scratch + team.rank * plan.per_thread;
    first = reinterpret_cast<wide_t<T>*>(mine);
    second = reinterpret_cast<wide_t<T>*>(mine + channels);
    shift = reinterpret_cast<wide_t<T>*>(mine + 2 * channels);
  }
};

// The moments of a tile, column by column, into mean and m2; chunks and shifts as in plane_moments.
template <class T>
void row_moments(const T* x, const Geometry& g, const Plan& plan, const Tile& tile, const RowArrays<T>& arrays,
                 double* mean, double* m2) {
  typedef wide_t<T> A;
  const int64_t begin = tile.columns.begin, n = tile.columns.end - begin;
  const int group = row_group<T, kPlainIdentity>(g.channels);
  A *sum = arrays.first, *square = arrays.second, *shift = arrays.shift;
  x += begin, mean += begin, m2 += begin;
  for (int64_t r = tile.rows.begin; r < tile.rows.end;) {
    const int64_t start = r, end = std::min(tile.rows.end, r + plan.rows_per_chunk);
    const double count = (double)(end - start), before = (double)(start - tile.rows.begin);
    std::fill_n(sum, n, A(0));
    std::fill_n(square, n, A(0));
    if (start == tile.rows.begin) {
      const int64_t sample = std::max<int64_t>(1, (end - start) / 8);
      for (; r < start + sample; ++r) {
        RowSum<T> k{x + r * g.channels, sum};
        over_single(k, n);
      }
      for (int64_t c = 0; c < n; ++c) {
        shift[c] = (A)(sum[c] / (double)sample);
        sum[c] = 0;
      }
    }
    for (r = start; group == 4 && r + 4 <= end; r += 4) {
      RowMoments<T, 4> k{x + r * g.channels, g.channels, shift, sum, square};
      over_single(k, n);
    }
    for (; r < end; ++r) {
      RowMoments<T, 1> k{x + r * g.channels, g.channels, shift, sum, square};
      over_single(k, n);
    }
    // Moments::merge for all columns: the counts are the same, so nothing is divided in the loop
    const double inverse = 1 / count, share = count / (before + count), weight = before * share;
    for (int64_t c = 0; c < n; ++c) {
      const double s = sum[c], chunk_mean = shift[c] + s * inverse, chunk_m2 = square[c] - s * (s * inverse);
      const double old_mean = before > 0 ? mean[c] : chunk_mean, old_m2 = before > 0 ? m2[c] : 0;
      const double delta = chunk_mean - old_mean;
      mean[c] = old_mean + delta * share;
      m2[c] = old_m2 + chunk_m2 + delta * delta * weight;
      shift[c] = (A)mean[c];
    }
  }
}

template <class T, int kShape, bool kResidual, int kRows>
DLKERN_INLINE void row_apply_step(const BatchNormActForward& a, int64_t row, int64_t n, int64_t column, bool streaming,
                                  const wide_t<T>* scale, const wide_t<T>* bias) {
  const int64_t at = row * a.geometry.channels + column;
  RowApply<T, kShape, kResidual, kRows> k{static_cast<const T*>(a.x) + at,
                                          kResidual ? static_cast<const T*>(a.residual) + at : nullptr,
                                          static_cast<T*>(a.y) + row * a.y_step + column,
                                          a.geometry.channels,
                                          a.y_step,
                                          streaming,
                                          static_cast<const wide_t<T>*>(a.mean) + column,
                                          scale + column,
                                          bias + column,
                                          a.activation,
                                          a.param};
  if constexpr (kRows == 1)
    over(k, n);
  else
    over_single(k, n);
}

template <class T, int kShape, bool kResidual>
void row_apply(const BatchNormActForward& a, const Plan& plan, const Tile& tile, const wide_t<T>* scale,
               const wide_t<T>* bias) {
  const int64_t channels = a.geometry.channels, column = tile.columns.begin, n = tile.columns.end - column;
  const bool streaming =
      plan.streaming && a.y != a.x && whole_lines(static_cast<T*>(a.y), channels) && n % 32 == 0 && a.y_step % 32 == 0;
  const int group = streaming ? 1 : row_group<T, kShape>(channels);
  int64_t r = tile.rows.begin;
  if constexpr (kShape != kAny)
    for (; group == 4 && r + 4 <= tile.rows.end; r += 4)
      row_apply_step<T, kShape, kResidual, 4>(a, r, n, column, streaming, scale, bias);
  for (; r < tile.rows.end; ++r) row_apply_step<T, kShape, kResidual, 1>(a, r, n, column, streaming, scale, bias);
  if (streaming) finish_streaming();
}

template <class T>
struct PickRowApply {
  template <int kShape, bool kResidual>
  static auto get() {
    return &row_apply<T, kShape, kResidual>;
  }
};

template <class T>
void forward_rows(const ForwardContext& f, Team team) {
  typedef wide_t<T> A;
  const BatchNormActForward& a = f.args;
  const Geometry& g = a.geometry;
  const int64_t channels = g.channels, blocks = f.plan.blocks;
  const Grid grid(g, f.plan, team);
  const Range mine = team.share(grid.blocks * grid.tiles);
  if (a.batch_stats) {
    const RowArrays<T> arrays(f.scratch, f.plan, channels, team);
    for (int64_t t = mine.begin; t < mine.end; ++t) {
      double* partial = f.common + 2 * channels * (t / grid.tiles);
      row_moments<T>(static_cast<const T*>(a.x), g, f.plan, grid.at(t, g, f.plan), arrays, partial, partial + channels);
    }
    team.barrier();
  }
  A* scale = reinterpret_cast<A*>(f.common + 2 * channels * blocks);
  A* bias = scale + channels;
  const Range finished = team.share(channels, 32);
  for (int64_t c = finished.begin; c < finished.end; ++c) {
    Moments total{0, 0, 0};
    for (int64_t b = 0; a.batch_stats && b < blocks; ++b) {
      const double* partial = f.common + 2 * channels * b;
      const double n = (double)(std::min(g.outer, (b + 1) * f.plan.rows_per_block) - b * f.plan.rows_per_block);
      if (b == 0)
        total = {n, partial[c], partial[channels + c]};
      else
        total.merge(n, partial[c], partial[channels + c]);
    }
    const Affine<A> parameters = finish_channel<A>(a, c, total);
    scale[c] = parameters.scale;
    bias[c] = parameters.bias;
  }
  team.barrier();
  const auto apply = pick_forward<PickRowApply<T>>(a.activation, a.residual != nullptr);
  for (int64_t t = mine.end; t-- > mine.begin;) apply(a, f.plan, grid.at(t, g, f.plan), scale, bias);
}

// ---------------------------------------------------------------------------------- backward
template <class T>
struct RowParameters {  // (channels,) each
  wide_t<T>*scale, *bias, *slope, *offset;
};

template <class T, int kShape, int kSource, int kRows>
DLKERN_INLINE void row_reduce_step(const BatchNormActBackward& a, const BackwardPasses& passes, int64_t row, int64_t n,
                                   int64_t column, const RowParameters<T>& p, const RowArrays<T>& arrays) {
  const int64_t at = row * a.geometry.channels + column;
  RowReduce<T, kShape, kSource, kRows> k{static_cast<const T*>(a.grad_y) + row * a.grad_y_step + column,
                                         static_cast<const T*>(a.x) + at,
                                         kSource == kFromInput ? nullptr : static_cast<const T*>(passes.other) + at,
                                         passes.first_dz ? static_cast<T*>(passes.first_dz) + at : nullptr,
                                         passes.first_writes_x ? static_cast<T*>(a.grad_x) + at : nullptr,
                                         a.geometry.channels,
                                         a.grad_y_step,
                                         static_cast<const wide_t<T>*>(a.mean) + column,
                                         p.scale + column,
                                         p.bias + column,
                                         arrays.first,
                                         arrays.second,
                                         a.activation,
                                         a.param};
  if constexpr (kRows == 1)
    over(k, n);
  else
    over_single(k, n);
}

// Adds sums to totals, and sets them to zero.
template <class A>
inline void take_sums(double* __restrict total, A* __restrict sum, int64_t n) {
  for (int64_t c = 0; c < n; ++c) total[c] += (double)sum[c];
  std::fill_n(sum, n, A(0));
}

// sum(dz) and sum(dz * (x - mean)) of a tile, column by column, into total and product.
template <class T, int kShape, int kSource>
void row_reduce(const BatchNormActBackward& a, const BackwardPasses& passes, const Tile& tile,
                const RowParameters<T>& p, const RowArrays<T>& arrays, double* total, double* product) {
  typedef wide_t<T> A;
  const int64_t channels = a.geometry.channels, column = tile.columns.begin, n = tile.columns.end - column;
  const int group = row_group<T, kShape>(channels);
  total += column, product += column;
  std::fill_n(total, n, 0.0);
  std::fill_n(product, n, 0.0);
  std::fill_n(arrays.first, n, A(0));
  std::fill_n(arrays.second, n, A(0));
  for (int64_t r = tile.rows.begin; r < tile.rows.end;) {
    const int64_t end = std::min(tile.rows.end, r + group * kRunRows);
    if constexpr (kShape != kAny)
      for (; group == 4 && r + 4 <= end; r += 4)
        row_reduce_step<T, kShape, kSource, 4>(a, passes, r, n, column, p, arrays);
    for (; r < end; ++r) row_reduce_step<T, kShape, kSource, 1>(a, passes, r, n, column, p, arrays);
    take_sums(total, arrays.first, n);
    take_sums(product, arrays.second, n);
  }
}

template <class T, int kShape, int kSource, int kRows>
DLKERN_INLINE void row_input_gradient_step(const BatchNormActBackward& a, const BackwardPasses& passes, int64_t row,
                                           int64_t n, int64_t column, bool streaming, const RowParameters<T>& p) {
  const int64_t at = row * a.geometry.channels + column;
  RowInputGradient<T, kShape, kSource, kRows> k{
      static_cast<const T*>(passes.grad) + row * passes.grad_step + column,
      static_cast<const T*>(a.x) + at,
      kSource == kFromInput ? nullptr : static_cast<const T*>(passes.other) + at,
      passes.second_dz ? static_cast<T*>(passes.second_dz) + at : nullptr,
      static_cast<T*>(a.grad_x) + at,
      a.geometry.channels,
      passes.grad_step,
      streaming,
      static_cast<const wide_t<T>*>(a.mean) + column,
      p.scale + column,
      p.bias + column,
      p.slope + column,
      p.offset + column,
      a.activation,
      a.param};
  if constexpr (kRows == 1)
    over(k, n);
  else
    over_single(k, n);
}

template <class T, int kShape, int kSource>
void row_input_gradient(const BatchNormActBackward& a, const BackwardPasses& passes, const Plan& plan, const Tile& tile,
                        const RowParameters<T>& p) {
  const int64_t channels = a.geometry.channels, column = tile.columns.begin, n = tile.columns.end - column;
  const bool streaming = plan.streaming && whole_lines(static_cast<T*>(a.grad_x), channels) && n % 32 == 0 &&
                         whole_lines(static_cast<T*>(passes.second_dz), channels);
  const int group = streaming ? 1 : row_group<T, kShape>(channels);
  int64_t r = tile.rows.begin;
  if constexpr (kShape != kAny)
    for (; group == 4 && r + 4 <= tile.rows.end; r += 4)
      row_input_gradient_step<T, kShape, kSource, 4>(a, passes, r, n, column, streaming, p);
  for (; r < tile.rows.end; ++r) row_input_gradient_step<T, kShape, kSource, 1>(a, passes, r, n, column, streaming, p);
  if (streaming) finish_streaming();
}

template <class T>
struct PickRowReduce {
  template <int kShape, int kSource>
  static auto get() {
    return &row_reduce<T, kShape, kSource>;
  }
};
template <class T>
struct PickRowInputGradient {
  template <int kShape, int kSource>
  static auto get() {
    return &row_input_gradient<T, kShape, kSource>;
  }
};

template <class T>
void backward_rows(const BackwardContext& f, Team team) {
  typedef wide_t<T> A;
  const BatchNormActBackward& a = f.args;
  const Geometry& g = a.geometry;
  const int64_t channels = g.channels, blocks = f.plan.blocks;
  const BackwardPasses passes = passes_of(a);
  const Grid grid(g, f.plan, team);
  const Range mine = team.share(grid.blocks * grid.tiles), finished = team.share(channels, 32);
  A* parameters = reinterpret_cast<A*>(f.common + 2 * channels * blocks);
  const RowParameters<T> p{parameters, parameters + channels, parameters + 2 * channels, parameters + 3 * channels};
  for (int64_t c = finished.begin; c < finished.end; ++c) {
    const Affine<A> v = affine<A>(static_cast<const A*>(a.mean)[c], static_cast<const A*>(a.invstd)[c], a.weight,
                                  a.bias, a.param_dtype, c);
    p.scale[c] = v.scale;
    p.bias[c] = v.bias;
  }
  team.barrier();
  const RowArrays<T> arrays(f.scratch, f.plan, channels, team);
  const auto reduce = pick_backward<PickRowReduce<T>>(a.activation, passes.source);
  for (int64_t t = mine.begin; t < mine.end; ++t) {
    double* partial = f.common + 2 * channels * (t / grid.tiles);
    reduce(a, passes, grid.at(t, g, f.plan), p, arrays, partial, partial + channels);
  }
  team.barrier();
  for (int64_t c = finished.begin; c < finished.end; ++c) {
    double sum = 0, dot = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      sum += f.common[2 * channels * b + c];
      dot += f.common[2 * channels * b + channels + c];
    }
    const Centring<A> centring = finish_gradient<A>(a, c, p.scale[c], sum, dot);
    p.slope[c] = centring.slope;
    p.offset[c] = centring.offset;
  }
  if (!passes.second) return;
  team.barrier();
  const auto input_gradient = passes.differentiate
                                  ? pick_backward<PickRowInputGradient<T>>(a.activation, passes.source)
                                  : PickRowInputGradient<T>::template get<kPlainIdentity, kFromInput>();
  for (int64_t t = mine.end; t-- > mine.begin;) input_gradient(a, passes, f.plan, grid.at(t, g, f.plan), p);
}
