// batch_norm_act on planes (N, C, *): a channel is a run of planes, each of consecutive elements.
//
// A thread takes a channel at a time through all passes, so that the later pass finds it in the L2 cache. Where
// channels are too few for the threads, they share the blocks of all channels instead, one pass after the other.

// `ahead`, in each kernel: Plan::ahead, the distance of what it prefetches.
template <class T>
struct PlaneSum {
  static constexpr int lanes = kLanes<T>;
  static constexpr bool together = false;
  const T* x;
  int64_t ahead;
  vec_t<T> sum[4];

  template <bool kTail, int kSlot, int kVectors>
  DLKERN_INLINE void step(int64_t i, int n) {
    prefetch<T>(x + ahead + i, kSlot);
    sum[kSlot] += load<kTail>(x + i, n);
  }
};

template <class T>
struct PlaneMoments {
  static constexpr int lanes = kLanes<T>;
  static constexpr bool together = false;
  const T* x;
  int64_t ahead;
  vec_t<T> shift, sum[4], square[4];

  template <bool kTail, int kSlot, int kVectors>
  DLKERN_INLINE void step(int64_t i, int n) {
    prefetch<T>(x + ahead + i, kSlot);
    vec_t<T> d = load<kTail>(x + i, n) - shift;
    if constexpr (kTail) d = select(first_lanes(d, n), d, vec_t<T>{});
    sum[kSlot] += d;
    square[kSlot] = fma(d, d, square[kSlot]);
  }
};

template <class T, int kShape, bool kResidual>
struct PlaneApply {
  static constexpr int lanes = kLanes<T>;
  static constexpr bool together = kShape == kAny;
  const T *x, *residual;
  T* y;
  int64_t ahead;
  bool streaming;
  vec_t<T> mean, scale, bias;
  int activation;
  double param;

  template <bool kTail, int kSlot, int kVectors>
  DLKERN_INLINE void step(int64_t i, int n) {
    vec_t<T> z[kVectors];
    for (int q = 0; q < kVectors; ++q) {
      const int64_t at = i + q * lanes;
      prefetch<T>(x + ahead + at, kSlot + q);
      if (!streaming) prefetch<T, true>(y + ahead + at, kSlot + q);
      z[q] = fma(load<kTail>(x + at, n) - mean, scale, bias);
      if constexpr (kResidual) {
        prefetch<T>(residual + ahead + at, kSlot + q);
        z[q] += load<kTail>(residual + at, n);
      }
    }
    apply_activation<kShape>(z, activation, param);
    for (int q = 0; q < kVectors; ++q) put<kTail>(y + i + q * lanes, z[q], n, streaming);
  }
};

template <class T, int kShape, int kSource>
struct PlaneReduce {
  static constexpr int lanes = kLanes<T>;
  static constexpr bool together = kShape == kAny;
  const T *g, *x, *other;
  T *dz, *dx;
  int64_t ahead;
  vec_t<T> mean, scale, bias, sum[4], dot[4];
  int activation;
  double param;

  template <bool kTail, int kSlot, int kVectors>
  DLKERN_INLINE void step(int64_t i, int n) {
    typedef vec_t<T> V;
    V d[kVectors], v[kVectors], from[kVectors];
    for (int q = 0; q < kVectors; ++q) {
      const int64_t at = i + q * lanes;
      prefetch<T>(x + ahead + at, kSlot + q);
      prefetch<T>(g + ahead + at, kSlot + q);
      if constexpr (kSource != kFromInput) prefetch<T>(other + ahead + at, kSlot + q);
      d[q] = load<kTail>(x + at, n) - mean;
      v[q] = load<kTail>(g + at, n);
      from[q] = derivative_argument<kTail, kShape, kSource>(d[q], scale, bias, other + at, n);
    }
    input_gradient<kShape, kSource>(v, from, activation, param);
    for (int q = 0; q < kVectors; ++q) {
      const int64_t at = i + q * lanes;
      if constexpr (kTail) v[q] = select(first_lanes(v[q], n), v[q], V{});
      if (dz) store<kTail>(dz + at, v[q], n);
      if (dx) store<kTail>(dx + at, v[q] * scale, n);
      sum[kSlot + q] += v[q];
      dot[kSlot + q] = fma(v[q], d[q], dot[kSlot + q]);
    }
  }
};

template <class T, int kShape, int kSource>
struct PlaneInputGradient {
  static constexpr int lanes = kLanes<T>;
  static constexpr bool together = kShape == kAny;
  const T *g, *x, *other;
  T *dz, *dx;
  int64_t ahead;
  bool streaming;
  vec_t<T> mean, scale, bias, slope, offset;
  int activation;
  double param;

  template <bool kTail, int kSlot, int kVectors>
  DLKERN_INLINE void step(int64_t i, int n) {
    typedef vec_t<T> V;
    V d[kVectors], v[kVectors], from[kVectors];
    for (int q = 0; q < kVectors; ++q) {
      const int64_t at = i + q * lanes;
      if (!streaming) prefetch<T, true>(dx + ahead + at, kSlot + q);
      if (!streaming && dz) prefetch<T, true>(dz + ahead + at, kSlot + q);
      d[q] = load<kTail>(x + at, n) - mean;
      v[q] = load<kTail>(g + at, n);
      from[q] = derivative_argument<kTail, kShape, kSource>(d[q], scale, bias, other + at, n);
    }
    input_gradient<kShape, kSource>(v, from, activation, param);
    for (int q = 0; q < kVectors; ++q) {
      if (dz) put<kTail>(dz + i + q * lanes, v[q], n, streaming);
      put<kTail>(dx + i + q * lanes, fma(v[q], scale, -fma(d[q], slope, offset)), n, streaming);
    }
  }
};

// The pieces of one channel.
struct Channel {
  const Plan& plan;
  const Geometry& geometry;
  int64_t c;

  DLKERN_INLINE int64_t offset(int64_t piece) const { return offset(piece, geometry.channels * geometry.inner); }
  // In a map of `step` elements an image.
  DLKERN_INLINE int64_t offset(int64_t piece, int64_t step) const {
    int64_t image = piece, part = 0;
    if (plan.parts > 1) image = piece / plan.parts, part = piece % plan.parts;
    return image * step + c * geometry.inner + part * plan.part_length;
  }
  DLKERN_INLINE int64_t length(int64_t piece) const {
    if (plan.parts == 1) return geometry.inner;
    return std::min(plan.part_length, geometry.inner - piece % plan.parts * plan.part_length);
  }
  Range block(int64_t b) const {
    return {b * plan.pieces_per_block, std::min(plan.pieces, (b + 1) * plan.pieces_per_block)};
  }
  Range chunk(int64_t piece, Range block) const { return {piece, std::min(block.end, piece + plan.pieces_per_chunk)}; }
  double count(Range pieces) const {
    if (plan.parts == 1) return (double)((pieces.end - pieces.begin) * geometry.inner);
    int64_t n = 0;
    for (int64_t p = pieces.begin; p < pieces.end; ++p) n += length(p);
    return (double)n;
  }
};

// Runs a kernel that accumulates over the pieces of a chunk; bind(kernel, offset, offset in a map of owner.step
// elements an image) sets its pointers, flush(kernel) takes its sums after each kRun elements or so.
template <class Kernel, class Owner>
DLKERN_INLINE void over_chunk(Kernel& k, Owner& owner, const Channel& channel, Range chunk) {
  int64_t pending = 0;
  k.ahead = channel.plan.ahead;
  for (int64_t p = chunk.begin; p < chunk.end; ++p) {
    int64_t at = channel.offset(p), left = channel.length(p);
    const int64_t further = owner.step ? channel.offset(p, owner.step) - at : 0;
    while (left > 0) {
      const int64_t n = std::min(left, kRun);
      owner.bind(k, at, at + further);
      over(k, n);
      at += n, left -= n, pending += n;
      if (pending >= kRun) owner.flush(k), pending = 0;
    }
  }
  owner.flush(k);
}

template <class T>
struct SumOwner {
  static constexpr int64_t step = 0;
  const T* x;
  Total<vec_t<T>> sum;

  DLKERN_INLINE void bind(PlaneSum<T>& k, int64_t at, int64_t) const { k.x = x + at; }
  DLKERN_INLINE void flush(PlaneSum<T>& k) { sum.take(k.sum); }
};

template <class T>
struct MomentsOwner {
  static constexpr int64_t step = 0;
  const T* x;
  Total<vec_t<T>> sum, square;

  DLKERN_INLINE void bind(PlaneMoments<T>& k, int64_t at, int64_t) const { k.x = x + at; }
  DLKERN_INLINE void flush(PlaneMoments<T>& k) { sum.take(k.sum), square.take(k.square); }
};

// The moments of a block: those of its chunks, merged in order. Sums of squares are taken about a shift and corrected
// for it. The first chunk is shifted by the mean of an eighth of it, each further one by the mean so far: where a shift
// is far from a chunk's mean, so are the values it was made from, and the variance is at least as large as a share of
// that distance; so the correction cannot cancel by more than a few bits.
template <class T>
Moments plane_moments(const T* x, const Channel& channel, Range block) {
  typedef vec_t<T> V;
  Moments total{0, 0, 0};
  for (int64_t p = block.begin; p < block.end;) {
    const Range chunk = channel.chunk(p, block);
    const double n = channel.count(chunk);
    if (p == block.begin) {
      PlaneSum<T> k{};
      SumOwner<T> owner{x, {}};
      const Range sample{p, p + std::max<int64_t>(1, (chunk.end - p) / 8)};
      over_chunk(k, owner, channel, sample);
      total.mean = owner.sum.value() / channel.count(sample);
    }
    const wide_t<T> shift = (wide_t<T>)total.mean;
    PlaneMoments<T> k{};
    k.shift = V{} + shift;
    MomentsOwner<T> owner{x, {}, {}};
    over_chunk(k, owner, channel, chunk);
    const double sum = owner.sum.value(), square = owner.square.value();
    total.merge(n, shift + sum / n, square - sum * (sum / n));
    p = chunk.end;
  }
  return total;
}

template <class T, int kShape, bool kResidual>
void plane_apply(const BatchNormActForward& a, const Channel& channel, Range pieces, Affine<wide_t<T>> affine) {
  typedef vec_t<T> V;
  PlaneApply<T, kShape, kResidual> k{};
  k.mean = V{} + affine.mean, k.scale = V{} + affine.scale, k.bias = V{} + affine.bias;
  k.activation = a.activation, k.param = a.param, k.ahead = channel.plan.ahead;
  for (int64_t p = pieces.begin; p < pieces.end; ++p) {
    const int64_t at = channel.offset(p), n = channel.length(p);
    k.x = static_cast<const T*>(a.x) + at;
    if constexpr (kResidual) k.residual = static_cast<const T*>(a.residual) + at;
    k.y = static_cast<T*>(a.y) + channel.offset(p, a.y_step);
    k.streaming = channel.plan.streaming && a.y != a.x && whole_lines(k.y, n);
    over(k, n);
  }
  if (channel.plan.streaming) finish_streaming();
}

template <class T>
struct PickPlaneApply {
  template <int kShape, bool kResidual>
  static auto get() {
    return &plane_apply<T, kShape, kResidual>;
  }
};

// Whether each thread takes whole channels.
inline bool by_channel(const Geometry& g, const Plan& plan, Team team) {
  return team.size == 1 || plan.blocks == 1 || g.channels % team.size == 0 || g.channels >= 8 * team.size;
}

template <class T>
void forward_planes(const ForwardContext& f, Team team) {
  typedef wide_t<T> A;
  const BatchNormActForward& a = f.args;
  const T* x = static_cast<const T*>(a.x);
  const int64_t channels = a.geometry.channels, blocks = f.plan.blocks;
  const auto apply = pick_forward<PickPlaneApply<T>>(a.activation, a.residual != nullptr);
  if (by_channel(a.geometry, f.plan, team)) {
    const Range mine = team.share(channels);
    for (int64_t c = mine.begin; c < mine.end; ++c) {
      const Channel channel{f.plan, a.geometry, c};
      Moments total{0, 0, 0};
      if (a.batch_stats) {
        total = plane_moments<T>(x, channel, channel.block(0));
        for (int64_t b = 1; b < blocks; ++b) {
          const Moments m = plane_moments<T>(x, channel, channel.block(b));
          total.merge(m.count, m.mean, m.m2);
        }
      }
      apply(a, channel, {0, f.plan.pieces}, finish_channel<A>(a, c, total));
    }
    return;
  }
  const Range mine = team.share(channels * blocks);
  if (a.batch_stats) {
    for (int64_t t = mine.begin; t < mine.end; ++t) {
      const Channel channel{f.plan, a.geometry, t / blocks};
      const Moments m = plane_moments<T>(x, channel, channel.block(t % blocks));
      f.common[2 * t] = m.mean;
      f.common[2 * t + 1] = m.m2;
    }
    team.barrier();
  }
  const Range finished = team.share(channels);
  for (int64_t c = finished.begin; c < finished.end; ++c) {
    const Channel channel{f.plan, a.geometry, c};
    Moments total{0, 0, 0};
    for (int64_t b = 0; a.batch_stats && b < blocks; ++b) {
      const double *partial = f.common + 2 * (c * blocks + b), n = channel.count(channel.block(b));
      if (b == 0)
        total = {n, partial[0], partial[1]};
      else
        total.merge(n, partial[0], partial[1]);
    }
    finish_channel<A>(a, c, total);
  }
  team.barrier();
  for (int64_t t = mine.begin; t < mine.end; ++t) {
    const int64_t c = t / blocks;
    const Channel channel{f.plan, a.geometry, c};
    apply(a, channel, channel.block(t % blocks),
          affine<A>(static_cast<A*>(a.mean)[c], static_cast<A*>(a.invstd)[c], a.weight, a.bias, a.param_dtype, c));
  }
}

// ---------------------------------------------------------------------------------- backward
struct Sums {
  double sum, dot;
};

template <class T, int kShape, int kSource>
struct ReduceOwner {
  const BatchNormActBackward& a;
  const BackwardPasses& passes;
  int64_t step;
  Total<vec_t<T>> sum, dot;

  DLKERN_INLINE void bind(PlaneReduce<T, kShape, kSource>& k, int64_t at, int64_t at_gradient) const {
    k.g = static_cast<const T*>(a.grad_y) + at_gradient;
    k.x = static_cast<const T*>(a.x) + at;
    if constexpr (kSource != kFromInput) k.other = static_cast<const T*>(passes.other) + at;
    if (passes.first_dz) k.dz = static_cast<T*>(passes.first_dz) + at;
    if (passes.first_writes_x) k.dx = static_cast<T*>(a.grad_x) + at;
  }
  DLKERN_INLINE void flush(PlaneReduce<T, kShape, kSource>& k) { sum.take(k.sum), dot.take(k.dot); }
};

template <class T, int kShape, int kSource>
Sums plane_reduce(const BatchNormActBackward& a, const BackwardPasses& passes, const Channel& channel, Range block,
                  Affine<wide_t<T>> affine) {
  typedef vec_t<T> V;
  PlaneReduce<T, kShape, kSource> k{};
  k.mean = V{} + affine.mean, k.scale = V{} + affine.scale, k.bias = V{} + affine.bias;
  k.activation = a.activation, k.param = a.param;
  ReduceOwner<T, kShape, kSource> owner{a, passes, a.grad_y_step, {}, {}};
  over_chunk(k, owner, channel, block);
  return {owner.sum.value(), owner.dot.value()};
}

template <class T, int kShape, int kSource>
void plane_input_gradient(const BatchNormActBackward& a, const BackwardPasses& passes, const Channel& channel,
                          Range pieces, Affine<wide_t<T>> affine, Centring<wide_t<T>> centring) {
  typedef vec_t<T> V;
  PlaneInputGradient<T, kShape, kSource> k{};
  k.mean = V{} + affine.mean, k.scale = V{} + affine.scale, k.bias = V{} + affine.bias;
  k.slope = V{} + centring.slope, k.offset = V{} + centring.offset;
  k.activation = a.activation, k.param = a.param, k.ahead = channel.plan.ahead;
  for (int64_t p = pieces.begin; p < pieces.end; ++p) {
    const int64_t at = channel.offset(p), n = channel.length(p);
    k.g = static_cast<const T*>(passes.grad) + channel.offset(p, passes.grad_step);
    k.x = static_cast<const T*>(a.x) + at;
    if constexpr (kSource != kFromInput) k.other = static_cast<const T*>(passes.other) + at;
    if (passes.second_dz) k.dz = static_cast<T*>(passes.second_dz) + at;
    k.dx = static_cast<T*>(a.grad_x) + at;
    k.streaming = channel.plan.streaming && whole_lines(k.dx, n) && whole_lines(k.dz, n);
    over(k, n);
  }
  if (channel.plan.streaming) finish_streaming();
}

template <class T>
struct PickPlaneReduce {
  template <int kShape, int kSource>
  static auto get() {
    return &plane_reduce<T, kShape, kSource>;
  }
};
template <class T>
struct PickPlaneInputGradient {
  template <int kShape, int kSource>
  static auto get() {
    return &plane_input_gradient<T, kShape, kSource>;
  }
};

template <class T>
void backward_planes(const BackwardContext& f, Team team) {
  typedef wide_t<T> A;
  const BatchNormActBackward& a = f.args;
  const BackwardPasses passes = passes_of(a);
  const int64_t channels = a.geometry.channels, blocks = f.plan.blocks;
  const auto reduce = pick_backward<PickPlaneReduce<T>>(a.activation, passes.source);
  const auto input_gradient = passes.differentiate
                                  ? pick_backward<PickPlaneInputGradient<T>>(a.activation, passes.source)
                                  : PickPlaneInputGradient<T>::template get<kPlainIdentity, kFromInput>();
  const auto affine_of = [&](int64_t c) {
    return affine<A>(static_cast<const A*>(a.mean)[c], static_cast<const A*>(a.invstd)[c], a.weight, a.bias,
                     a.param_dtype, c);
  };
  if (by_channel(a.geometry, f.plan, team)) {
    const Range mine = team.share(channels);
    for (int64_t c = mine.begin; c < mine.end; ++c) {
      const Channel channel{f.plan, a.geometry, c};
      const Affine<A> parameters = affine_of(c);
      Sums total{0, 0};
      for (int64_t b = 0; b < blocks; ++b) {
        const Sums s = reduce(a, passes, channel, channel.block(b), parameters);
        total.sum += s.sum, total.dot += s.dot;
      }
      const Centring<A> centring = finish_gradient<A>(a, c, parameters.scale, total.sum, total.dot);
      if (passes.second) input_gradient(a, passes, channel, {0, f.plan.pieces}, parameters, centring);
    }
    return;
  }
  const Range mine = team.share(channels * blocks);
  for (int64_t t = mine.begin; t < mine.end; ++t) {
    const Channel channel{f.plan, a.geometry, t / blocks};
    const Sums s = reduce(a, passes, channel, channel.block(t % blocks), affine_of(channel.c));
    f.common[2 * t] = s.sum;
    f.common[2 * t + 1] = s.dot;
  }
  team.barrier();
  A* centrings = reinterpret_cast<A*>(f.common + 2 * channels * blocks);
  const Range finished = team.share(channels);
  for (int64_t c = finished.begin; c < finished.end; ++c) {
    Sums total{0, 0};
    for (int64_t t = c * blocks; t < (c + 1) * blocks; ++t) {
      total.sum += f.common[2 * t];
      total.dot += f.common[2 * t + 1];
    }
    const Centring<A> centring = finish_gradient<A>(a, c, affine_of(c).scale, total.sum, total.dot);
    centrings[2 * c] = centring.slope;
    centrings[2 * c + 1] = centring.offset;
  }
  if (!passes.second) return;
  team.barrier();
  for (int64_t t = mine.begin; t < mine.end; ++t) {
    const Channel channel{f.plan, a.geometry, t / blocks};
    input_gradient(a, passes, channel, channel.block(t % blocks), affine_of(channel.c),
                   {centrings[2 * channel.c], centrings[2 * channel.c + 1]});
  }
}
