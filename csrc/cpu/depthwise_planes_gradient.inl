// Gradients of depthwise on planes (NCHW). A thread takes a channel of a group of images: the gradient of weight needs
// no partial results but one a group, and the padded rows of grad_y serve both gradients.

// Vectors whose products are added in the wide type before their sum is added to a double.
constexpr int64_t kRunVectors = 128;

// grad_y against x under kRows x kTaps taps, for output rows [begin, end): adds to totals[r * kernel_w + k].
template <class T, int kRows, int kTaps>
void sum_products(const Padded<T>& gradient, const Padded<T>& input, const Axis& rows, const Axis& columns, int64_t r,
                  int64_t k, int64_t begin, int64_t end, Total<vec_t<T>>* totals, int64_t kernel_w) {
  typedef wide_t<T> A;
  typedef vec_t<T> V;
  constexpr int lanes = kLanes<T>;
  V acc[kRows][kTaps] = {};
  int64_t position[kTaps], vectors = 0;
  DLKERN_UNROLL
  for (int i = 0; i < kTaps; ++i) position[i] = input.shape.position(columns.input(0, k + i));
  const int64_t whole = columns.out / lanes * lanes, zero = gradient.shape.position(0);
  const auto take = [&] {
    DLKERN_UNROLL
    for (int i = 0; i < kRows; ++i) DLKERN_UNROLL
    for (int j = 0; j < kTaps; ++j) {
      totals[(r + i) * kernel_w + k + j].add(acc[i][j]);
      acc[i][j] = V{};
    }
    vectors = 0;
  };
  for (int64_t y = begin; y < end; ++y) {
    const A *g = gradient.row(y) + zero, *x[kRows];
    DLKERN_UNROLL
    for (int i = 0; i < kRows; ++i) x[i] = input.row(rows.input(y, r + i));
    int64_t t = 0;
    for (; t < whole; t += lanes) {
      const V v = load<false>(g + t, 0);
      DLKERN_UNROLL
      for (int i = 0; i < kRows; ++i) DLKERN_UNROLL
      for (int j = 0; j < kTaps; ++j) acc[i][j] = fma(v, load<false>(x[i] + position[j] + t, 0), acc[i][j]);
    }
    if (t < columns.out) {  // what lies to the right of the last output may be infinite
      const V v = load<false>(g + t, 0);
      const auto live = first_lanes(V{}, (int)(columns.out - t));
      DLKERN_UNROLL
      for (int i = 0; i < kRows; ++i) DLKERN_UNROLL
      for (int j = 0; j < kTaps; ++j)
        acc[i][j] = fma(v, select(live, load<false>(x[i] + position[j] + t, 0), V{}), acc[i][j]);
    }
    vectors += columns.out / lanes + 1;
    if (vectors >= kRunVectors) take();
  }
  take();
}

template <class T>
void sum_band(const Padded<T>& gradient, const Padded<T>& input, const Axis& rows, const Axis& columns, int64_t begin,
              int64_t end, Total<vec_t<T>>* totals) {
  const int64_t kernel_w = columns.taps;
  if (rows.taps == 3 && kernel_w == 3)
    return sum_products<T, 3, 3>(gradient, input, rows, columns, 0, 0, begin, end, totals, 3);
  for (int64_t r = 0; r < rows.taps; ++r) {
    int64_t first = begin, last = end;
    while (first < last && rows.input(first, r) < 0) ++first;
    while (first < last && rows.input(last - 1, r) >= rows.in) --last;
    if (first == last) continue;
    for (int64_t k = 0; k < kernel_w;) {
      const int64_t left = kernel_w - k;
      if (left >= 7) {
        sum_products<T, 1, 7>(gradient, input, rows, columns, r, k, first, last, totals, kernel_w);
        k += 7;
      } else if (left >= 5) {
        sum_products<T, 1, 5>(gradient, input, rows, columns, r, k, first, last, totals, kernel_w);
        k += 5;
      } else if (left >= 3) {
        sum_products<T, 1, 3>(gradient, input, rows, columns, r, k, first, last, totals, kernel_w);
        k += 3;
      } else {
        sum_products<T, 1, 1>(gradient, input, rows, columns, r, k, first, last, totals, kernel_w);
        k += 1;
      }
    }
  }
}

template <class T>
void sum_gradient(const Padded<T>& gradient, int64_t begin, int64_t end, int64_t width, Total<vec_t<T>>& total) {
  typedef vec_t<T> V;
  const int64_t zero = gradient.shape.position(0);
  for (int64_t y = begin; y < end; ++y) {
    const wide_t<T>* g = gradient.row(y) + zero;
    for (int64_t t = 0; t < width; t += 8 * kLanes<T>) {
      V sum{};
      for (int64_t u = t; u < std::min(width, t + 8 * kLanes<T>); u += kLanes<T>) sum += load<false>(g + u, 0);
      total.add(sum);
    }
  }
}

// A row of output from the rows of its columns' remainders.
template <class T>
void join_row(const wide_t<T>* joined, int64_t remainder, const std::vector<Axis>& columns, T* out, int64_t width) {
  typedef wide_t<T> A;
  int64_t done = 0;
#if DLKERN_AVX2
  if constexpr (sizeof(A) == 4) {
    if (columns.size() == 2) {
      for (; 2 * done + 16 <= width; done += 8) {
        vf a, b;
        join_pairs(load<false>(joined + done, 0), load<false>(joined + remainder + done, 0), a, b);
        store<false>(out + 2 * done, a, 0);
        store<false>(out + 2 * done + 8, b, 0);
      }
    }
  }
#endif
  (void)width;
  for (size_t c = 0; c < columns.size(); ++c)
    for (int64_t t = done; t < columns[c].out; ++t)
      write(out + columns[c].start + t * columns[c].stride, (A)joined[(int64_t)c * remainder + t]);
}

// The gradient of one plane of x, from those of its `multiplier` planes of y.
template <class T>
void input_plane(const DepthwiseBackwardContext& f, Padded<T>& padded, const wide_t<T>* weights, wide_t<T>* joined,
                 const T* grad_y, T* grad_x) {
  const DepthwiseGeometry& g = f.args.geometry;
  const DepthwisePlan& plan = f.plan;
  const bool direct = plan.columns.size() == 1 && g.multiplier == 1;
  const int64_t length = divide_up(plan.columns[0].out, kLanes<T>) * kLanes<T>, band = plan.gradient.band;
  const int64_t remainder = band * length;
  for (int64_t begin = 0; begin < plan.rows[0].out; begin += band) {
    const Range under = rows_under(plan.rows, begin, begin + band);
    for (const Axis& rows : plan.rows) {
      const int64_t end = std::min(rows.out, begin + band);
      if (begin >= end) continue;
      for (int64_t j = 0; j < g.multiplier; ++j) {
        padded.fill(grad_y + j * g.out_height * g.out_width, under.begin, under.end);
        for (size_t c = 0; c < plan.columns.size(); ++c) {
          const PlaneOutput<T> out{direct ? grad_x : nullptr,
                                   direct ? nullptr : joined + (int64_t)c * remainder,
                                   length,
                                   begin,
                                   j > 0,
                                   0,
                                   kIdentity,
                                   0};
          correlate_plane(padded, rows, plan.columns[c], weights + j * plan.taps, g.kernel_w, begin, end, out);
        }
      }
      if (direct) continue;
      for (int64_t t = begin; t < end; ++t)
        join_row(joined + (t - begin) * length, remainder, plan.columns,
                 grad_x + (rows.start + t * rows.stride) * g.width, g.width);
    }
  }
}

template <class T>
void backward_planes(const DepthwiseBackwardContext& f, Team team) {
  typedef wide_t<T> A;
  const DepthwiseBackward& a = f.args;
  const DepthwiseGeometry& g = a.geometry;
  const DepthwisePlan& plan = f.plan;
  const Axis &rows = plan.forward_rows[0], &columns = plan.forward_columns[0];
  const int64_t in_plane = g.height * g.width, out_plane = g.out_height * g.out_width, all = plan.taps + 1;
  double* memory = f.scratch + team.rank * plan.per_thread;
  Total<vec_t<T>>* totals = reinterpret_cast<Total<vec_t<T>>*>(memory);  // aligned: see depthwise.cpp
  A* weights = reinterpret_cast<A*>(memory + 8 * all * plan.group * g.multiplier);
  A* input_memory = weights + divide_up(plan.taps * g.multiplier, 16) * 16;
  A* gradient_memory = input_memory + (plan.input.capacity + 1) * plan.input.row();
  A* joined = gradient_memory + (plan.gradient.capacity + 1) * plan.gradient.row();
  Padded<T> input(plan.input, input_memory), gradient(plan.gradient, gradient_memory);
  const bool sums = a.grad_weight || a.grad_bias;
  const int64_t groups = divide_up(g.channels, plan.group);
  const Range tasks = team.share(plan.blocks * groups);
  for (int64_t task = tasks.begin; task < tasks.end; ++task) {
    const int64_t block = task / groups, first = task % groups * plan.group;
    const int64_t last = std::min(g.channels, first + plan.group);
    const int64_t images = std::min(g.batch, (block + 1) * plan.rows_per_block);
    std::fill_n(totals, all * (last - first) * g.multiplier, Total<vec_t<T>>{});
    for (int64_t image = block * plan.rows_per_block; image < images; ++image)
      for (int64_t c = first; c < last; ++c) {
        const T* x = static_cast<const T*>(a.x) + (image * g.channels + c) * in_plane;
        const T* grad_y = static_cast<const T*>(a.grad_y) + (image * g.channels + c) * g.multiplier * out_plane;
        for (int64_t j = 0; sums && j < g.multiplier; ++j) {
          Total<vec_t<T>>* mine = totals + ((c - first) * g.multiplier + j) * all;
          for (int64_t t = 0; t < g.out_height; t += plan.input.band) {
            const int64_t end = std::min(g.out_height, t + plan.input.band);
            const Range under = rows_under(plan.forward_rows, t, end);
            gradient.fill(grad_y + j * out_plane, t, end);
            if (a.grad_weight) {
              input.fill(x, under.begin, under.end);
              sum_band(gradient, input, rows, columns, t, end, mine);
            }
            if (a.grad_bias) sum_gradient(gradient, t, end, g.out_width, mine[plan.taps]);
          }
        }
        if (!a.grad_x) continue;
        for (int64_t k = 0; k < plan.taps * g.multiplier; ++k)
          weights[k] = read(static_cast<const T*>(a.weight) + c * g.multiplier * plan.taps + k);
        input_plane(f, gradient, weights, joined, grad_y,
                    static_cast<T*>(a.grad_x) + (image * g.channels + c) * in_plane);
      }
    double* partial = f.common + (block * plan.outputs + first * g.multiplier) * all;
    for (int64_t k = 0; k < (last - first) * g.multiplier * all; ++k) partial[k] = totals[k].value();
  }
  if (!sums) return;
  team.barrier();
  const Range finished = team.share(plan.outputs, 32);
  for (int64_t o = finished.begin; o < finished.end; ++o)
    for (int64_t k = 0; k < all; ++k) {
      double sum = 0;
      for (int64_t b = 0; b < plan.blocks; ++b) sum += f.common[(b * plan.outputs + o) * all + k];
      if (k < plan.taps && a.grad_weight) write(static_cast<T*>(a.grad_weight) + o * plan.taps + k, sum);
      if (k == plan.taps && a.grad_bias) write(static_cast<T*>(a.grad_bias) + o, sum);
    }
}
