// The forward pass of depthwise on rows of pixels (channels last), with statistics of what it writes.

// Moments of the rows of one block. Squares are summed about the mean of what came before: by the kernel that makes a
// row, but for the first one, which is read again for its own mean while it is in the cache.
template <class T>
struct RowMoments {
  typedef wide_t<T> A;
  typedef vec_t<T> V;
  static constexpr int64_t kChunk = 32;  // pixels whose sums are merged
  A *shift, *sum, *square;
  double *mean, *m2;
  int64_t outputs, width, before = 0, chunk = 0;

  template <bool kTail, bool kSquare>
  DLKERN_INLINE void add(const T* y, int64_t c, int n) {
    const V about = kSquare ? load<kTail>(shift + c, n) : V{};
    V s{}, q{};
    for (int64_t t = 0; t < width; ++t) {
      const V d = load<kTail>(y + t * outputs + c, n) - about;
      s += d;
      if constexpr (kSquare) q = fma(d, d, q);
    }
    store<kTail>(sum + c, load<kTail>(sum + c, n) + s, n);
    if constexpr (kSquare) store<kTail>(square + c, load<kTail>(square + c, n) + q, n);
  }
  template <bool kSquare>
  void pass(const T* y) {
    int64_t c = 0;
    for (; c + kLanes<T> <= outputs; c += kLanes<T>) add<false, kSquare>(y, c, kLanes<T>);
    if (c < outputs) add<true, kSquare>(y, c, (int)(outputs - c));
  }

  void begin() {
    before = chunk = 0;
    std::fill_n(sum, outputs, A(0));
    std::fill_n(square, outputs, A(0));
    std::fill_n(mean, outputs, 0.0);
    std::fill_n(m2, outputs, 0.0);
  }
  // A row that was stored, whose sums the kernel has made if it was `measured`.
  void row(const T* y, bool measured) {
    if (!measured) {  // the first row: its own mean
      pass<false>(y);
      for (int64_t c = 0; c < outputs; ++c) {
        shift[c] = sum[c] / (A)width;
        sum[c] = 0;
      }
      pass<true>(y);
    }
    chunk += width;
    if (chunk >= kChunk) merge();
  }
  void merge() {
    if (chunk == 0) return;
    const double count = (double)chunk, inverse = 1 / count, share = count / ((double)before + count);
    const double weight = (double)before * share;
    for (int64_t c = 0; c < outputs; ++c) {
      const double s = sum[c], chunk_mean = shift[c] + s * inverse, chunk_m2 = square[c] - s * (s * inverse);
      const double delta = chunk_mean - mean[c];
      mean[c] = before ? mean[c] + delta * share : chunk_mean;
      m2[c] += chunk_m2 + (before ? delta * delta * weight : 0);
      shift[c] = (A)mean[c];
      sum[c] = square[c] = 0;
    }
    before += chunk;
    chunk = 0;
  }
};

template <class T>
void forward_rows(const DepthwiseForwardContext& f, Team team) {
  typedef wide_t<T> A;
  const DepthwiseForward& a = f.args;
  const DepthwiseGeometry& g = a.geometry;
  const DepthwisePlan& plan = f.plan;
  const int64_t outputs = plan.outputs;
  A* weights = reinterpret_cast<A*>(f.common);
  A* bias = weights + plan.taps * outputs;
  double* partial = f.common + (plan.taps + 1) * outputs;
  pack_weights<T>(a.weight, weights, outputs, plan.taps, team);
  if (a.bias) pack_weights<T>(a.bias, bias, outputs, 1, team);
  team.barrier();
  const Axis &rows = plan.rows[0], &columns = plan.columns[0];
  const bool gathered = g.multiplier > 1;
  Correlation<T> p{};
  p.out_pixel = outputs, p.weight_tap = outputs;
  p.repeats = 1, p.divisor = g.multiplier;
  p.bias = a.bias ? bias : nullptr;
  p.activation = a.activation, p.param = a.param;
  A* mine = reinterpret_cast<A*>(f.scratch + team.rank * plan.per_thread);
  Rows<T> in{plan.input_rows,
             reinterpret_cast<T*>(f.scratch + (team.rank + 1) * plan.per_thread - plan.input_rows.doubles)};
  RowMoments<T> moments{mine, mine + outputs, mine + 2 * outputs, nullptr, nullptr, outputs, g.out_width};
  p.sum = moments.sum, p.square = moments.square;
  const bool streaming = streams(static_cast<const T*>(a.y), outputs, plan.row_count * g.out_width * outputs);
  const Range tasks = team.share(plan.blocks);
  for (int64_t b = tasks.begin; b < tasks.end; ++b) {
    const int64_t end = std::min(plan.row_count, (b + 1) * plan.rows_per_block);
    if (a.mean) {
      moments.mean = partial + 2 * outputs * b;
      moments.m2 = moments.mean + outputs;
      moments.begin();
    }
    for (int64_t q = b * plan.rows_per_block; q < end; ++q) {
      const int64_t image = q / g.out_height, at = q % g.out_height, t = plan.order[at];
      in.start(static_cast<const T*>(a.x) + image * g.height * g.width * g.channels);
      T* y = static_cast<T*>(a.y) + (image * g.out_height + t) * g.out_width * outputs;
      const int64_t next = at + 1 < g.out_height ? plan.order[at + 1] : -1;
      set_rows(p, rows, t, next, in, weights, g.kernel_w * outputs);
      const bool measured = a.mean && q > b * plan.rows_per_block;
      p.shift = measured ? moments.shift : nullptr;
      p.streaming = streaming && (measured || !a.mean);
      correlate_row(p, columns, y, outputs, plan.taps, gathered);
      if (a.mean) moments.row(y, measured);
    }
    if (a.mean) moments.merge();
  }
  finish_streaming();
  if (!a.mean) return;
  team.barrier();
  const Range finished = team.share(outputs, 32);
  for (int64_t o = finished.begin; o < finished.end; ++o) finish_moments<A>(a, plan, partial, o);
}
