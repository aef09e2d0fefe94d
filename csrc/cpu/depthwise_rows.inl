// depthwise on rows of pixels (channels last): the lanes of a vector are channels. A tile is a few neighbouring outputs
// of one row, kept in registers over all taps; the channels of a tile are walked innermost, so that memory is read and
// written in order. Taps outside the image are left out by row and by segment of columns.

// What a row of outputs is made from: the valid rows of taps.
template <class T>
struct Correlation {
  typedef wide_t<T> A;
  int64_t pixel, out_pixel;  // elements from one pixel to the next, of input and output
  int64_t weight_tap;        // elements from one tap of the weights to the next
  int64_t repeats, divisor;  // gathered: channel c sums over inputs (c / divisor) * repeats + j, j < repeats
  const A* bias;             // or null
  int activation;
  double param;
  bool streaming;  // stores go past the caches: channels are whole cache lines
  const A* shift;  // with sums of y - shift and of its squares: (channels,) each, or null
  A *sum, *square;
  const T* ahead[2];    // rows of the input that the next row of outputs needs, or null
  int64_t ahead_pixel;  // elements from one of their pixels to the next
  int64_t rows;
  const T* in[kMaxKernel];       // the input's row for each row of taps
  const A* weights[kMaxKernel];  // tap 0 of that row of taps
};

template <class T>
struct Tile {
  const Correlation<T>& c;
  const Axis& axis;
  int64_t begin, end;      // channels
  int64_t t, first, taps;  // the first output; the taps
  T* out;                  // pixel 0 of the row
};

template <class T, class V>
DLKERN_INLINE V as_stored(V v) {
  if constexpr (sizeof(T) == 2)
    return widen(narrow(v, (T*)nullptr), (T*)nullptr);
  else
    return v;
}

// What is stored past the caches: whole lines at once. A processor has few buffers for lines that are written so, and
// one that is taken from a line half full is written to memory as it is, at a loss.
template <class T, int kWidth>
struct Lines {
  typedef vec_t<T> V;
  static constexpr int kVectors = 64 / (kLanes<T> * (int)sizeof(T));
  V held[kVectors][kWidth];

  // Vectors of kWidth pixels, `next` elements apart, from channel c on; stored once their lines are full.
  DLKERN_INLINE void add(const V (&v)[kWidth], T* out, int64_t next, int64_t c) {
    const int last = (int)(c / kLanes<T> % kVectors);
    DLKERN_UNROLL
    for (int i = 0; i < kWidth; ++i) held[last][i] = v[i];
    if (last < kVectors - 1) return;
    DLKERN_UNROLL
    for (int i = 0; i < kWidth; ++i) DLKERN_UNROLL
    for (int q = 0; q < kVectors; ++q) stream(out + i * next + (q - last) * kLanes<T>, held[q][i]);
  }
};

// kStep > 0: taps side by side, outputs kStep columns apart; each column under the tile is loaded once, and with kEdge
// those outside the image are left out. kStep 0: any distances, all taps inside the image.
template <class T, int kTaps, int kStep, int kWidth, bool kEdge, bool kTail>
DLKERN_INLINE void tile_step(const Tile<T>& tile, int64_t column, int64_t weight_offset, T* out, int64_t c, int n,
                             Lines<T, kWidth>& lines) {
  typedef vec_t<T> V;
  const Correlation<T>& p = tile.c;
  V acc[kWidth];
  const V start = p.bias ? load<kTail>(p.bias + c, n) : V{};
  DLKERN_UNROLL
  for (int i = 0; i < kWidth; ++i) acc[i] = start;
  const int64_t pixel = p.pixel, weight_tap = p.weight_tap * tile.axis.next;
  for (int64_t r = 0; r < p.rows; ++r) {
    const T* in = p.in[r] + column * pixel + c;
    const wide_t<T>* w = p.weights[r] + weight_offset + c;
    if constexpr (kStep > 0) {
      V taps[kTaps];
      DLKERN_UNROLL
      for (int k = 0; k < kTaps; ++k) taps[k] = load<kTail>(w + k * weight_tap, n);
      DLKERN_UNROLL
      for (int j = 0; j < (kWidth - 1) * kStep + kTaps; ++j) {
        if (kEdge && (uint64_t)(column + j) >= (uint64_t)tile.axis.in) continue;
        const V x = load<kTail>(in + j * pixel, n);
        DLKERN_UNROLL
        for (int k = 0; k < kTaps; ++k)
          if (j >= k && (j - k) % kStep == 0 && (j - k) / kStep < kWidth)
            acc[(j - k) / kStep] = fma(taps[k], x, acc[(j - k) / kStep]);
      }
    } else {
      const int64_t taps = kTaps ? kTaps : tile.taps, across = tile.axis.spacing * pixel;
      const int64_t step = tile.axis.step * pixel;
      for (int64_t k = 0; k < taps; ++k) {
        const V weight = load<kTail>(w + k * weight_tap, n);
        const T* x = in + k * across;
        DLKERN_UNROLL
        for (int i = 0; i < kWidth; ++i) acc[i] = fma(weight, load<kTail>(x + i * step, n), acc[i]);
      }
    }
  }
  finish<kWidth>(acc, p.activation, p.param);
  const int64_t next = tile.axis.stride * p.out_pixel;
  if (!kTail && p.streaming) {
    lines.add(acc, out + c, next, c);
  } else {
    DLKERN_UNROLL
    for (int i = 0; i < kWidth; ++i) store<kTail>(out + i * next + c, acc[i], n);
  }
  if (p.shift) {
    const V shift = load<kTail>(p.shift + c, n);
    V sum{}, square{};  // of the tile alone, so that no sum has many terms
    DLKERN_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      const V d = as_stored<T>(acc[i]) - shift;
      sum += d;
      square = fma(d, d, square);
    }
    store<kTail>(p.sum + c, load<kTail>(p.sum + c, n) + sum, n);
    store<kTail>(p.square + c, load<kTail>(p.square + c, n) + square, n);
  }
}

template <class T, int kTaps, int kStep, int kWidth, bool kEdge>
DLKERN_NOINLINE void run_tile(const Tile<T>& tile) {
  constexpr int lanes = kLanes<T>;
  const Correlation<T>& p = tile.c;
  const int64_t column = tile.axis.input(tile.t, tile.first);
  const int64_t weight_offset = (tile.axis.first + tile.first * tile.axis.next) * p.weight_tap;
  T* out = tile.out + (tile.axis.start + tile.t * tile.axis.stride) * p.out_pixel;
  const int64_t ahead = tile.t * tile.axis.step * p.ahead_pixel;
  Lines<T, kWidth> lines;
  int64_t c = tile.begin;
  for (; c + lanes <= tile.end; c += lanes) {
    if ((c * sizeof(T)) % 64 == 0) {
      for (const T* row : p.ahead)
        for (int i = 0; row && i < kWidth * (kStep ? kStep : 1); ++i)
          __builtin_prefetch(row + (ahead + i * p.ahead_pixel + c), 0, kStep ? 2 : 3);
    }
    tile_step<T, kTaps, kStep, kWidth, kEdge, false>(tile, column, weight_offset, out, c, lanes, lines);
  }
  if (c < tile.end)
    tile_step<T, kTaps, kStep, kWidth, kEdge, true>(tile, column, weight_offset, out, c, (int)(tile.end - c), lines);
}

// Where output channels are not input channels: depth multipliers above 1.
template <class T>
DLKERN_NOINLINE void run_gathered(const Tile<T>& tile) {
  typedef vec_t<T> V;
  constexpr int lanes = kLanes<T>;
  const Correlation<T>& p = tile.c;
  const Axis& axis = tile.axis;
  T* out = tile.out + (axis.start + tile.t * axis.stride) * p.out_pixel;
  for (int64_t c = tile.begin; c < tile.end; c += lanes) {
    const int n = (int)std::min<int64_t>(lanes, tile.end - c);
    V acc[1] = {p.bias ? load_some(p.bias + c, n) : V{}};
    for (int64_t j = 0; j < p.repeats; ++j) {
      int64_t from[lanes], weight[lanes];
      for (int i = 0; i < lanes; ++i) {
        from[i] = (c + i) / p.divisor * p.repeats + j;
        weight[i] = p.repeats > 1 ? from[i] : c + i;
      }
      for (int64_t r = 0; r < p.rows; ++r)
        for (int64_t k = tile.first; k < tile.first + tile.taps; ++k) {
          const wide_t<T>* w = p.weights[r] + (axis.first + k * axis.next) * p.weight_tap;
          const T* x = p.in[r] + axis.input(tile.t, k) * p.pixel;
          acc[0] = fma(gather(w, weight, n), gather(x, from, n), acc[0]);
        }
    }
    finish<1>(acc, p.activation, p.param);
    store_some(out + c, acc[0], n);
    if (p.shift) {
      const V d = as_stored<T>(acc[0]) - load_some(p.shift + c, n);
      store_some(p.sum + c, load_some(p.sum + c, n) + d, n);
      store_some(p.square + c, fma(d, d, load_some(p.square + c, n)), n);
    }
  }
}

template <class T>
struct TileRunner {
  void (*run)(const Tile<T>&);
  int64_t width;
};

// Image sizes are often multiples of 7. What dilation leaves is cut into tiles of about the same width.
template <class T, int kTaps>
inline TileRunner<T> spaced_tile(int64_t left) {
  if constexpr (kTaps > 0) {
    const int64_t tiles = (left + 6) / 7;
    switch ((left + tiles - 1) / tiles) {
      case 6:
        return {&run_tile<T, kTaps, 0, 6, false>, 6};
      case 5:
        return {&run_tile<T, kTaps, 0, 5, false>, 5};
      case 2:
        return {&run_tile<T, kTaps, 0, 2, false>, 2};
    }
  }
  if (left >= 7) return {&run_tile<T, kTaps, 0, 7, false>, 7};
  if (left >= 4) return {&run_tile<T, kTaps, 0, 4, false>, 4};
  return {&run_tile<T, kTaps, 0, 1, false>, 1};
}

// The kernel for so many taps, all inside, and at most so many outputs.
template <class T>
inline TileRunner<T> pick_spaced(int64_t taps, int64_t left, bool gathered) {
  if (gathered) return {&run_gathered<T>, 1};
#if DLKERN_AVX2
  if (taps == 3) return spaced_tile<T, 3>(left);
  if (taps == 2) return spaced_tile<T, 2>(left);
  if (taps == 1) return spaced_tile<T, 1>(left);
#else
  (void)taps;
#endif
  return spaced_tile<T, 0>(left);
}

template <class T, int kTaps, int kStep>
inline TileRunner<T> sliding_tile(int64_t left, bool edge) {
  if (left >= 7) return {edge ? &run_tile<T, kTaps, kStep, 7, true> : &run_tile<T, kTaps, kStep, 7, false>, 7};
  if (left >= 4) return {edge ? &run_tile<T, kTaps, kStep, 4, true> : &run_tile<T, kTaps, kStep, 4, false>, 4};
  return {&run_tile<T, kTaps, kStep, 1, true>, 1};
}

// Whether there is a kernel that takes taps side by side, and those outside the image along with the others.
inline bool slides(const Axis& axis, bool gathered) {
  return DLKERN_AVX2 && !gathered && axis.spacing == 1 && axis.step <= 2 &&
         (axis.taps == 3 || axis.taps == 5 || axis.taps == 7);
}

template <class T>
inline TileRunner<T> pick_sliding(const Axis& axis, int64_t t) {
#if DLKERN_AVX2
  const int64_t left = axis.out - t, width = left >= 7 ? 7 : left >= 4 ? 4 : 1;
  const bool edge = axis.input(t, 0) < 0 || axis.input(t + width - 1, axis.taps - 1) >= axis.in;
  const bool two = axis.step == 2;
  if (axis.taps == 3) return two ? sliding_tile<T, 3, 2>(left, edge) : sliding_tile<T, 3, 1>(left, edge);
  if (axis.taps == 5) return two ? sliding_tile<T, 5, 2>(left, edge) : sliding_tile<T, 5, 1>(left, edge);
  return two ? sliding_tile<T, 7, 2>(left, edge) : sliding_tile<T, 7, 1>(left, edge);
#else
  return spaced_tile<T, 0>(axis.out - t);  // never called: see slides
#endif
}

// Channels that are walked together: their weights are to stay in the first-level cache, and where taps are far from
// each other, so that a tile reads its columns more than once, the `rows` of `width` pixels under them as well.
template <class T>
inline int64_t channel_block(int64_t taps, int64_t rows, int64_t width, bool sliding) {
  constexpr int64_t line = 64 / sizeof(T);
  int64_t block = 4096 / taps;
  if (!sliding) block = std::min<int64_t>(block, 20480 / ((int64_t)sizeof(T) * rows * width));
  block = std::max<int64_t>(block / line, 1) * line;
  if (sliding) block = std::max<int64_t>(block, 32);
  return block;
}

// One row of outputs (of one remainder of the columns), all its channels.
template <class T>
inline void correlate_row(const Correlation<T>& p, const Axis& axis, T* out, int64_t channels, int64_t taps,
                          bool gathered) {
  const bool sliding = slides(axis, gathered);
  const int64_t block = channel_block<T>(taps, std::max<int64_t>(p.rows, 1), axis.in, sliding || axis.taps <= 1);
  for (int64_t begin = 0; begin < channels; begin += block) {
    const int64_t end = std::min(channels, begin + block);
    if (sliding) {
      for (int64_t t = 0; t < axis.out;) {
        const TileRunner<T> tile = pick_sliding<T>(axis, t);
        tile.run(Tile<T>{p, axis, begin, end, t, 0, axis.taps, out});
        t += tile.width;
      }
      continue;
    }
    for (const Segment& s : axis.segments) {
      for (int64_t t = s.begin; t < s.end;) {
        const TileRunner<T> tile = pick_spaced<T>(s.tap_end - s.tap_begin, s.end - t, gathered);
        tile.run(Tile<T>{p, axis, begin, end, t, s.tap_begin, s.tap_end - s.tap_begin, out});
        t += tile.width;
      }
    }
  }
}

// Outputs from this many bytes on are stored past the caches, as in batch_norm_act_plan.h, where lines are whole.
template <class T>
inline bool streams(const T* out, int64_t channels, int64_t elements) {
  return elements * (int64_t)sizeof(T) >= kDepthwiseStreamedBytes && whole_lines(out, channels);
}

// Rows of one image: where they are, or copies of them (RowCopies).
template <class T>
struct Rows {
  const RowCopies& plan;
  T* copies;
  const T* image = nullptr;
  int64_t held[kMaxKernel];

  int64_t pixel() const { return plan.pixel ? plan.pixel : plan.channels; }
  const T* original(int64_t y) const { return image + y * plan.width * plan.channels; }
  int64_t slot(int64_t y) const { return y / plan.spacing % plan.capacity; }
  bool holds(int64_t y) const { return plan.pixel && held[slot(y)] == y; }

  void start(const T* from) {
    if (from == image) return;
    image = from;
    std::fill_n(held, plan.capacity, int64_t(-1));
  }
  const T* row(int64_t y) {
    if (!plan.pixel) return original(y);
    const int64_t at = slot(y);
    T* copy = copies + at * plan.width * plan.pixel;
    if (held[at] == y) return copy;
    held[at] = y;
    const T* from = original(y);
    for (int64_t x = 0; x < plan.width; ++x, from += plan.channels)
      std::memcpy(copy + x * plan.pixel, from, plan.channels * sizeof(T));
    return copy;
  }
};

// Sets the rows of taps of output row t that are inside the image; `next` is the row of outputs that follows, or -1.
template <class T>
inline void set_rows(Correlation<T>& p, const Axis& axis, int64_t t, int64_t next, Rows<T>& in,
                     const wide_t<T>* weights, int64_t weight_row) {
  p.rows = 0;
  p.pixel = in.pixel(), p.ahead_pixel = in.plan.channels;
  for (int64_t k = 0; k < axis.taps; ++k) {
    const int64_t y = axis.input(t, k);
    if (y < 0 || y >= axis.in) continue;
    p.in[p.rows] = in.row(y);
    p.weights[p.rows++] = weights + (axis.first + k * axis.next) * weight_row;
  }
  for (int64_t i = 0; i < 2; ++i) {
    const int64_t y = axis.input(next, axis.taps - 1) - i;
    const bool wanted = next >= 0 && axis.taps && i < axis.step && y >= 0 && y < axis.in && !in.holds(y);
    p.ahead[i] = wanted ? in.original(y) : nullptr;
  }
}

// Weights (outputs, taps) to (taps, outputs) in the wide type: this member's share.
template <class T>
inline void pack_weights(const void* weight, wide_t<T>* packed, int64_t outputs, int64_t taps, Team team) {
  const T* from = static_cast<const T*>(weight);
  const Range mine = team.share(outputs, 32);
  for (int64_t k = 0; k < taps; ++k)
    for (int64_t o = mine.begin; o < mine.end; ++o) packed[k * outputs + o] = read(from + o * taps + k);
}
