// Gradients of depthwise on rows of pixels (channels last). Each row of grad_y serves the gradients of weight and bias,
// and then the rows of grad_x beside it, while it is in the cache.

// Terms that are added in the wide type before their sum is added to another: outputs of a run, runs of a sum.
constexpr int64_t kRunOutputs = 28;
constexpr int64_t kRuns = 128;

// A run of outputs of one row of grad_y against kRows rows of x.
template <class T>
struct Run {
  const T* grad;  // the run's first pixel
  const T* x[3];  // under the first tap of the run's first output
  int64_t length, step, spacing, outputs, multiplier;
  int64_t pixel, out_pixel;            // elements from one pixel to the next, of x and of grad_y
  int64_t next_pixel, next_out_pixel;  // the same of next_x and next_grad
  int64_t column, width;               // which column x is, of how many
  const T *next_grad, *next_x;         // the same places of rows that are needed next, or null
  int64_t row;                         // elements from one row of x to the next
  wide_t<T>* sums[3];                  // of the first tap, by row
  int64_t begin, end;                  // channels
};

template <class T, int kRows, int kTaps, int kStep, int kWidth, bool kEdge, bool kTail, class V>
DLKERN_INLINE void run_step(const Run<T>& run, V (&acc)[kRows][kTaps], int64_t t, int64_t c, int n) {
  V g[kWidth];
  DLKERN_UNROLL
  for (int i = 0; i < kWidth; ++i) g[i] = load<kTail>(run.grad + (t + i) * run.out_pixel + c, n);
  DLKERN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const T* x = run.x[r] + t * run.step * run.pixel + c;
    if constexpr (kStep > 0) {
      DLKERN_UNROLL
      for (int j = 0; j < (kWidth - 1) * kStep + kTaps; ++j) {
        if (kEdge && (uint64_t)(run.column + t * kStep + j) >= (uint64_t)run.width) continue;
        const V v = load<kTail>(x + j * run.pixel, n);
        DLKERN_UNROLL
        for (int k = 0; k < kTaps; ++k)
          if (j >= k && (j - k) % kStep == 0 && (j - k) / kStep < kWidth)
            acc[r][k] = fma(g[(j - k) / kStep], v, acc[r][k]);
      }
    } else {
      DLKERN_UNROLL
      for (int k = 0; k < kTaps; ++k) DLKERN_UNROLL
      for (int i = 0; i < kWidth; ++i)
        acc[r][k] = fma(g[i], load<kTail>(x + (k * run.spacing + i * run.step) * run.pixel, n), acc[r][k]);
    }
  }
}

// Asks for what the next row of grad_y, and the row of x that comes in with it, have beside outputs [t, t + kWidth).
template <class T, int kWidth>
DLKERN_INLINE void fetch(const Run<T>& run, int64_t t, int64_t c) {
  if ((c * sizeof(T)) % 64 != 0) return;
  if (run.next_grad)
    for (int i = 0; i < kWidth; ++i) __builtin_prefetch(run.next_grad + (t + i) * run.next_out_pixel + c, 0, 2);
  if (run.next_x)
    for (int i = 0; i < kWidth; ++i) {
      const T* x = run.next_x + (t + i) * run.step * run.next_pixel + c;
      __builtin_prefetch(x, 0, 2);
      if (run.step == 2) {
        __builtin_prefetch(x + run.next_pixel, 0, 2);
        __builtin_prefetch(x - run.row, 0, 2);
        __builtin_prefetch(x - run.row + run.next_pixel, 0, 2);
      }
    }
}

template <class T, int kRows, int kTaps, int kStep, int kWidth, bool kTail>
DLKERN_INLINE void run_channels(const Run<T>& run, int64_t inside, int64_t outside, int64_t c, int n) {
  typedef vec_t<T> V;
  V acc[kRows][kTaps] = {};
  int64_t t = 0;
  if constexpr (kStep > 0) {
    for (; t < inside; ++t) run_step<T, kRows, kTaps, kStep, 1, true, kTail>(run, acc, t, c, n);
    for (; t + kWidth <= outside; t += kWidth) {
      fetch<T, kWidth>(run, t, c);
      run_step<T, kRows, kTaps, kStep, kWidth, false, kTail>(run, acc, t, c, n);
    }
    for (; t < run.length; ++t) run_step<T, kRows, kTaps, kStep, 1, true, kTail>(run, acc, t, c, n);
  } else {
    for (; t + kWidth <= run.length; t += kWidth) {
      fetch<T, kWidth>(run, t, c);
      run_step<T, kRows, kTaps, kStep, kWidth, false, kTail>(run, acc, t, c, n);
    }
    for (; t < run.length; ++t) run_step<T, kRows, kTaps, kStep, 1, false, kTail>(run, acc, t, c, n);
  }
  DLKERN_UNROLL
  for (int r = 0; r < kRows; ++r) DLKERN_UNROLL
  for (int k = 0; k < kTaps; ++k) {
    wide_t<T>* sum = run.sums[r] + k * run.outputs + c;
    store<kTail>(sum, load<kTail>(sum, n) + acc[r][k], n);
  }
}

template <class T, int kRows, int kTaps, int kStep, int kWidth>
DLKERN_NOINLINE void sum_run(const Run<T>& run) {
  constexpr int lanes = kLanes<T>;
  // outputs [inside, outside) have all their taps inside the image
  int64_t inside = 0, outside = run.length;
  if constexpr (kStep > 0) {
    while (inside < run.length && run.column + inside * kStep < 0) ++inside;
    while (outside > inside && run.column + (outside - 1) * kStep + kTaps > run.width) --outside;
  }
  int64_t c = run.begin;
  for (; c + lanes <= run.end; c += lanes) {
    run_channels<T, kRows, kTaps, kStep, kWidth, false>(run, inside, outside, c, lanes);
  }
  if (c < run.end) run_channels<T, kRows, kTaps, kStep, kWidth, true>(run, inside, outside, c, (int)(run.end - c));
}

// One tap, for depth multipliers above 1.
template <class T>
DLKERN_NOINLINE void sum_run_gathered(const Run<T>& run) {
  typedef vec_t<T> V;
  constexpr int lanes = kLanes<T>;
  for (int64_t c = run.begin; c < run.end; c += lanes) {
    const int n = (int)std::min<int64_t>(lanes, run.end - c);
    int64_t from[lanes];
    for (int i = 0; i < lanes; ++i) from[i] = (c + i) / run.multiplier;
    V acc{};
    for (int64_t t = 0; t < run.length; ++t)
      acc = fma(load_some(run.grad + t * run.out_pixel + c, n), gather(run.x[0] + t * run.step * run.pixel, from, n),
                acc);
    wide_t<T>* sum = run.sums[0] + c;
    store_some(sum, load_some(sum, n) + acc, n);
  }
}

template <class T>
struct RunSummer {
  void (*sum)(const Run<T>&);
  int64_t rows, taps;
};

template <class T, int kStep>
inline RunSummer<T> sliding_run(int64_t rows, int64_t taps) {
  if (taps == 3 && rows >= 3) return {&sum_run<T, 3, 3, kStep, 2>, 3, 3};
  if (taps == 3) return {&sum_run<T, 1, 3, kStep, 2>, 1, 3};
  if (taps == 5 && rows >= 2) return {&sum_run<T, 2, 5, kStep, 2>, 2, 5};
  if (taps == 5) return {&sum_run<T, 1, 5, kStep, 2>, 1, 5};
  return {&sum_run<T, 1, 7, kStep, 4>, 1, 7};
}

// The kernel for at most so many rows and taps; the taps it takes depend on `taps` alone.
template <class T>
inline RunSummer<T> pick_run(const Axis& axis, int64_t rows, int64_t taps, bool gathered) {
  if (gathered) return {&sum_run_gathered<T>, 1, 1};
#if DLKERN_AVX2
  if (slides(axis, gathered)) return axis.step == 1 ? sliding_run<T, 1>(rows, taps) : sliding_run<T, 2>(rows, taps);
  if (rows >= 3 && taps == 3) return {&sum_run<T, 3, 3, 0, 2>, 3, 3};
  if (rows >= 3 && taps == 2) return {&sum_run<T, 3, 2, 0, 2>, 3, 2};
  if (rows >= 2 && taps == 3) return {&sum_run<T, 2, 3, 0, 2>, 2, 3};
  if (rows >= 2 && taps == 2) return {&sum_run<T, 2, 2, 0, 2>, 2, 2};
#else
  (void)axis, (void)rows;
#endif
  if (taps >= 8) return {&sum_run<T, 1, 8, 0, 1>, 1, 8};
  if (taps >= 3) return {&sum_run<T, 1, 3, 0, 1>, 1, 3};
  if (taps == 2) return {&sum_run<T, 1, 2, 0, 2>, 1, 2};
  return {&sum_run<T, 1, 1, 0, 2>, 1, 1};
}

template <class T>
struct RowsGradient {
  typedef wide_t<T> A;
  const DepthwiseBackwardContext& f;
  const DepthwiseGeometry& g;
  const DepthwisePlan& plan;
  const A* weights;
  A *sums, *bias_sums;  // (taps, outputs) and (outputs,) of this thread
  Rows<T> x, grad;      // of the image
  double* partial;      // (taps + 1, outputs) of the block
  int64_t runs;

  // Adds sums to the block's partial result, and sets them to zero.
  void take() {
    const int64_t n = (plan.taps + 1) * plan.outputs;
    for (int64_t i = 0; i < n; ++i) {
      partial[i] += (double)sums[i];
      sums[i] = 0;
    }
    runs = 0;
  }

  template <bool kTail>
  DLKERN_INLINE void bias_vector(const T* grad, int64_t count, int64_t c, int n) {
    typedef vec_t<T> V;
    V even{}, odd{};
    int64_t t = 0;
    for (; t + 2 <= count; t += 2) {
      even += load<kTail>(grad + t * plan.outputs + c, n);
      odd += load<kTail>(grad + (t + 1) * plan.outputs + c, n);
    }
    if (t < count) even += load<kTail>(grad + t * plan.outputs + c, n);
    store<kTail>(bias_sums + c, load<kTail>(bias_sums + c, n) + (even + odd), n);
  }
  // Adds `count` pixels of grad_y.
  void bias(const T* grad, int64_t count) {
    int64_t c = 0;
    for (; c + kLanes<T> <= plan.outputs; c += kLanes<T>) bias_vector<false>(grad, count, c, kLanes<T>);
    if (c < plan.outputs) bias_vector<true>(grad, count, c, (int)(plan.outputs - c));
  }

  // Row t of grad_y against the rows of x under its taps; `next` is the row that follows, or -1.
  void weight_row(int64_t t, int64_t next) {
    const Axis &rows = plan.forward_rows[0], &columns = plan.forward_columns[0];
    const int64_t outputs = plan.outputs;
    if (f.args.grad_bias)
      for (int64_t u = 0; u < g.out_width; u += kRunOutputs)
        bias(grad.original(t) + u * outputs, std::min(g.out_width - u, kRunOutputs));
    if (!f.args.grad_weight) return;
    int64_t first = 0, last = g.kernel_h;
    while (first < last && rows.input(t, first) < 0) ++first;
    while (first < last && rows.input(t, last - 1) >= g.height) --last;
    const bool gathered = g.multiplier > 1;
    const Segment whole{0, columns.out, 0, columns.taps};
    const bool sliding = slides(columns, gathered);
    const int64_t block = channel_block<T>(plan.taps, std::max<int64_t>(last - first, 1) + 1, g.width, sliding);
    const std::pair<const Segment*, const Segment*> segments =
        sliding ? std::pair(&whole, &whole + 1)
                : std::pair(columns.segments.data(), columns.segments.data() + columns.segments.size());
    Run<T> run{};
    run.width = g.width, run.row = g.width * g.channels;
    run.pixel = x.pixel(), run.out_pixel = grad.pixel(), run.step = columns.step, run.spacing = columns.spacing;
    run.next_pixel = g.channels, run.next_out_pixel = outputs;
    run.outputs = outputs, run.multiplier = g.multiplier;
    const T *own = grad.row(t), *under[kMaxKernel];
    for (int64_t r = first; r < last; ++r) under[r] = x.row(rows.input(t, r));
    const int64_t below = next < 0 ? -1 : rows.input(next, rows.taps - 1);
    const T* next_grad = next < 0 || grad.holds(next) ? nullptr : grad.original(next);
    const T* next_x = below < 0 || below >= g.height || x.holds(below) ? nullptr : x.original(below);
    for (run.begin = 0; run.begin < outputs; run.begin += block) {
      run.end = std::min(outputs, run.begin + block);
      for (const Segment* s = segments.first; s != segments.second; ++s)
        for (int64_t u = s->begin; u < s->end; u += kRunOutputs) {
          run.length = std::min(s->end - u, kRunOutputs);
          run.grad = own + u * run.out_pixel;
          for (int64_t k = s->tap_begin; k < s->tap_end;) {
            run.column = columns.input(u, k);
            int64_t taken = 1;
            for (int64_t r = first; r < last;) {
              const RunSummer<T> summer = pick_run<T>(columns, last - r, s->tap_end - k, gathered);
              for (int64_t i = 0; i < summer.rows; ++i) {
                run.x[i] = under[r + i] + run.column * run.pixel;
                run.sums[i] = sums + ((r + i) * g.kernel_w + k) * outputs;
              }
              const bool once = r == first && k == s->tap_begin;
              run.next_grad = once && next_grad ? next_grad + u * outputs : nullptr;
              run.next_x = once && next_x ? next_x + u * run.step * g.channels : nullptr;
              summer.sum(run);
              taken = summer.taps;
              r += summer.rows;
            }
            k += taken;
          }
        }
    }
  }

  // Row y of grad_x of one image.
  void input_row(int64_t image, int64_t y) {
    const int64_t row = g.width * g.channels;
    T* out = static_cast<T*>(f.args.grad_x) + (image * g.height + y) * row;
    const bool gathered = g.multiplier > 1;
    Correlation<T> p{};
    p.out_pixel = g.channels, p.weight_tap = plan.outputs;
    p.repeats = g.multiplier, p.divisor = 1;
    const int64_t phase = y % g.stride_h, t = y / g.stride_h;
    const Axis& rows = plan.rows[phase];
    set_rows(p, rows, t, t + plan.step < rows.out ? t + plan.step : -1, grad, weights, g.kernel_w * plan.outputs);
    p.streaming = streams(static_cast<const T*>(f.args.grad_x), g.channels, g.batch * g.height * row);
    for (const Axis& columns : plan.columns) correlate_row(p, columns, out, g.channels, plan.taps, gathered);
  }
};

template <class T>
void backward_rows(const DepthwiseBackwardContext& f, Team team) {
  typedef wide_t<T> A;
  const DepthwiseBackward& a = f.args;
  const DepthwiseGeometry& g = a.geometry;
  const DepthwisePlan& plan = f.plan;
  const int64_t outputs = plan.outputs, all = (plan.taps + 1) * outputs;
  A* weights = reinterpret_cast<A*>(f.common);
  double* partial = f.common + plan.taps * outputs;
  if (a.grad_x) pack_weights<T>(a.weight, weights, outputs, plan.taps, team);
  team.barrier();
  A* mine = reinterpret_cast<A*>(f.scratch + team.rank * plan.per_thread);
  const bool sums = a.grad_weight || a.grad_bias;
  double* copies = f.scratch + (team.rank + 1) * plan.per_thread - plan.input_rows.doubles - plan.gradient_rows.doubles;
  RowsGradient<T> rows{f,
                       g,
                       plan,
                       weights,
                       mine,
                       mine + plan.taps * outputs,
                       {plan.input_rows, reinterpret_cast<T*>(copies)},
                       {plan.gradient_rows, reinterpret_cast<T*>(copies + plan.input_rows.doubles)},
                       nullptr,
                       0};
  std::fill_n(mine, all, A(0));
  const Range tasks = team.share(plan.blocks);
  for (int64_t b = tasks.begin; b < tasks.end; ++b) {
    const int64_t begin = b * plan.rows_per_block, end = std::min(plan.row_count, begin + plan.rows_per_block);
    rows.partial = partial + b * all;
    if (sums) std::fill_n(rows.partial, all, 0.0);
    for (int64_t q = begin; q < end; ++q) {
      const int64_t image = q / g.out_height, at = q % g.out_height, t = plan.order[at];
      rows.x.start(static_cast<const T*>(a.x) + image * g.height * g.width * g.channels);
      rows.grad.start(static_cast<const T*>(a.grad_y) + image * g.out_height * g.out_width * outputs);
      if (sums) {
        rows.weight_row(t, at + 1 < g.out_height ? plan.order[at + 1] : -1);
        rows.runs += divide_up(g.out_width, kRunOutputs);
        if (rows.runs >= kRuns) rows.take();
      }
      if (a.grad_x)
        for (int64_t y = t * g.height / g.out_height; y < (t + 1) * g.height / g.out_height; ++y)
          rows.input_row(image, y);
    }
    if (sums) rows.take();
  }
  finish_streaming();
  if (!sums) return;
  team.barrier();
  const Range finished = team.share(outputs, 32);
  for (int64_t k = 0; k <= plan.taps; ++k)
    for (int64_t o = finished.begin; o < finished.end; ++o) {
      double sum = 0;
      for (int64_t b = 0; b < plan.blocks; ++b) sum += partial[b * all + k * outputs + o];
      if (k < plan.taps && a.grad_weight) write(static_cast<T*>(a.grad_weight) + o * plan.taps + k, sum);
      if (k == plan.taps && a.grad_bias) write(static_cast<T*>(a.grad_bias) + o, sum);
    }
}
