// The time loop of the variants: each batch element's steps by one thread, which waits for no other. A step is walked
// in rows: the recurrent product, its norm, the gates, and of an LSTM the cell's norm. Included by recurrent.inl.

constexpr double kNormEpsilon = 1e-5;  // EPS of kernels/reference/recurrent_variants.py

// Calls f(j, tail, n) for each vector of a row.
template <class T, class F>
DLKERN_INLINE void each_vector(int64_t count, const F& f) {
  constexpr int w = kLanes<T>;
  int64_t j = 0;
  for (; j + w <= count; j += w) f(j, Flag<false>{}, w);
  if (j < count) f(j, Flag<true>{}, (int)(count - j));
}

template <class T>
struct Moments {
  T mean, inverse;  // inverse: 1 / sqrt(variance + epsilon)
};

// Of the lanes that a tail has not, vectors from load() are zero, which the centred sum must not count.
template <class T>
DLKERN_NOINLINE Moments<T> moments(const T* row, int64_t count) {
  typedef vec_t<T> V;
  V sum{};
  each_vector<T>(count, [&](int64_t j, auto tail, int n) DLKERN_LAMBDA { sum += load<tail.value>(row + j, n); });
  const T mean = lane_sum<T>(sum) / (T)count;
  V squares{};
  each_vector<T>(count, [&](int64_t j, auto tail, int n) DLKERN_LAMBDA {
    V centred = load<tail.value>(row + j, n) - mean;
    if (tail.value) centred = select(first_lanes(centred, n), centred, V{});
    squares = fma(centred, centred, squares);
  });
  return {mean, T(1) / std::sqrt(lane_sum<T>(squares) / (T)count + (T)kNormEpsilon)};
}

// The gradient of a norm's input, from g = grad * norm: inverse (g - mean(g) - normal mean(g normal)), where `normal`
// is (row - m.mean) m.inverse.
template <class T>
DLKERN_NOINLINE void norm_backward(T* out, const T* grad, const T* norm, const T* row, Moments<T> m, T inverse,
                                   int64_t count) {
  typedef vec_t<T> V;
  V sum{}, along{};
  each_vector<T>(count, [&](int64_t j, auto tail, int n) DLKERN_LAMBDA {
    const V g = load<tail.value>(grad + j, n) * load<tail.value>(norm + j, n);
    sum += g;
    along = fma(g, (load<tail.value>(row + j, n) - m.mean) * m.inverse, along);
  });
  const T mean = lane_sum<T>(sum) / (T)count, slope = lane_sum<T>(along) / (T)count;
  each_vector<T>(count, [&](int64_t j, auto tail, int n) DLKERN_LAMBDA {
    const V g = load<tail.value>(grad + j, n) * load<tail.value>(norm + j, n);
    const V normal = (load<tail.value>(row + j, n) - m.mean) * m.inverse;
    store<tail.value>(out + j, inverse * (g - mean - normal * slope), n);
  });
}

template <class T>
struct Functions {
  typedef vec_t<T> V;
  const RecurrentVariant& v;
  template <int k>
  DLKERN_INLINE void bend(V (&z)[k]) const {
    activate(v.activation, z, v.param);
  }
  template <int k>
  DLKERN_INLINE void gate(V (&z)[k]) const {
    activate(v.recurrent_activation, z, v.recurrent_param);
  }
  // grad * act'(z) from y = act(z)
  DLKERN_INLINE V bend_back(V grad, V y) const {
    V g[1] = {grad};
    const V from[1] = {y};
    activation_gradient_from_output(v.activation, g, from, v.param);
    return g[0];
  }
  DLKERN_INLINE V gate_back(V grad, V y) const {
    V g[1] = {grad};
    const V from[1] = {y};
    activation_gradient_from_output(v.recurrent_activation, g, from, v.recurrent_param);
    return g[0];
  }
};

// ------------------------------------------------------------------------------------------ forward
// What a step adds to the projected input: product * norm + bias.
template <class T>
struct Recurrent {
  typedef vec_t<T> V;
  const T *product, *norm, *bias;
  template <bool kTail>
  DLKERN_INLINE V sum(int64_t j, int n) const {
    const V p = load<kTail>(product + j, n), b = load_or_zero<kTail>(bias, j, n);
    return norm ? fma(p, load<kTail>(norm + j, n), b) : p + b;
  }
};

// gates -> activated gates, c_before -> c, h before a projection.
template <class T>
void variant_lstm_row(const RecurrentVariant& v, const Recurrent<T>& r, T* gates, int64_t hidden, const T* c_before,
                      T* c, T* kept_c, T* h) {
  typedef vec_t<T> V;
  const Functions<T> act{v};
  const T* const p = (const T*)v.peephole;
  each_vector<T>(hidden, [&](int64_t j, auto tail, int n) DLKERN_LAMBDA {
    constexpr bool kTail = tail.value;
    const auto sum = [&](int gate) DLKERN_LAMBDA {
      return load<kTail>(gates + gate * hidden + j, n) + r.template sum<kTail>(gate * hidden + j, n);
    };
    const V before = load_or_zero<kTail>(c_before, j, n);
    V in[2] = {sum(0), sum(1)}, g[1] = {sum(2)}, o[1] = {sum(3)};
    if (p) {
      in[0] = fma(load<kTail>(p + j, n), before, in[0]);
      in[1] = fma(load<kTail>(p + hidden + j, n), before, in[1]);
    }
    act.gate(in);
    act.bend(g);
    const V now = fma(in[1], before, in[0] * g[0]);
    if (p) o[0] = fma(load<kTail>(p + 2 * hidden + j, n), now, o[0]);
    act.gate(o);
    store<kTail>(gates + j, in[0], n);
    store<kTail>(gates + hidden + j, in[1], n);
    store<kTail>(gates + 2 * hidden + j, g[0], n);
    store<kTail>(gates + 3 * hidden + j, o[0], n);
    store<kTail>(c + j, now, n);
    if (kept_c) store<kTail>(kept_c + j, now, n);
  });
  const Moments<T> m = v.norm_c ? moments(c, hidden) : Moments<T>{0, 1};
  each_vector<T>(hidden, [&](int64_t j, auto tail, int n) DLKERN_LAMBDA {
    constexpr bool kTail = tail.value;
    V bent[1] = {load<kTail>(c + j, n)};
    if (v.norm_c)
      bent[0] = fma((bent[0] - m.mean) * m.inverse, load<kTail>((const T*)v.norm_c + j, n),
                    load<kTail>((const T*)v.norm_c_bias + j, n));
    act.bend(bent);
    store<kTail>(h + j, load<kTail>(gates + 3 * hidden + j, n) * bent[0], n);
  });
}

template <class T>
void variant_gru_row(const RecurrentVariant& v, const Recurrent<T>& r, T* gates, int64_t hidden, const T* h_before,
                     T* part, T* h) {
  typedef vec_t<T> V;
  const Functions<T> act{v};
  each_vector<T>(hidden, [&](int64_t j, auto tail, int n) DLKERN_LAMBDA {
    constexpr bool kTail = tail.value;
    V in[2];
    for (int gate = 0; gate < 2; ++gate)
      in[gate] = load<kTail>(gates + gate * hidden + j, n) + r.template sum<kTail>(gate * hidden + j, n);
    act.gate(in);
    const V recurrent = r.template sum<kTail>(2 * hidden + j, n);
    V fresh[1] = {fma(in[0], recurrent, load<kTail>(gates + 2 * hidden + j, n))};
    act.bend(fresh);
    store<kTail>(gates + j, in[0], n);
    store<kTail>(gates + hidden + j, in[1], n);
    store<kTail>(gates + 2 * hidden + j, fresh[0], n);
    store<kTail>(part + j, recurrent, n);
    store<kTail>(h + j, fma(in[1], load_or_zero<kTail>(h_before, j, n) - fresh[0], fresh[0]), n);
  });
}

template <class T>
void variant_rnn_row(const RecurrentVariant& v, const Recurrent<T>& r, T* gates, int64_t hidden, T* h) {
  typedef vec_t<T> V;
  const Functions<T> act{v};
  each_vector<T>(hidden, [&](int64_t j, auto tail, int n) DLKERN_LAMBDA {
    constexpr bool kTail = tail.value;
    V made[1] = {load<kTail>(gates + j, n) + r.template sum<kTail>(j, n)};
    act.bend(made);
    store<kTail>(gates + j, made[0], n);
    store<kTail>(h + j, made[0], n);
  });
}

inline int gates_in(RecurrentCell cell) { return cell == kLstm ? 4 : cell == kGru ? 3 : 1; }

template <class T>
void variant_forward(const RecurrentForward& a, Team team) {
  const RecurrentVariant& v = *a.variant;
  const Share share = share_of(a.size, team, true);
  const int gates_count = gates_in(a.size.cell);
  const int64_t hidden = a.size.hidden, outputs = a.size.outputs, width = gates_count * hidden;
  T* const product = (T*)v.work;                      // (batch, width)
  T* const dropped = product + a.size.batch * width;  // (batch, outputs)
  const bool keeps_normal = v.norm_hh && a.saves;
  for (Walk walk(a.size, true); !walk.done(); walk.next()) {
    const Step s = walk.step();
    const Range batch = intersect(share.batch, 0, s.batch);
    if (!size_of(batch)) continue;
    T* const gates = (T*)a.gates + s.offset * width;
    if (a.x) project_input<T>(a, s, gates_count, batch, share.units);
    T* const sums = product + batch.begin * width;
    std::memset(sums, 0, size_of(batch) * width * sizeof(T));
    if (v.dropout) {
      for (int64_t b = batch.begin; b < batch.end; ++b) {
        const T* const from = row_before(s, (const T*)a.output, (const T*)a.h0, outputs, b);
        const T* const factor = (const T*)v.dropout + b * outputs;
        T* const to = dropped + b * outputs;
        for (int64_t j = 0; j < outputs; ++j) to[j] = from ? from[j] * factor[j] : T(0);
      }
      dot_product(sums, width, dropped + batch.begin * outputs, outputs, size_of(batch), (const T*)a.weight_hh, outputs,
                  width, outputs);
    } else {
      add_recurrent(product, width, a, s, batch, (const T*)a.weight_hh, width);
    }
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      T* const row = product + b * width;
      if (v.norm_hh) {
        const Moments<T> m = moments(row, width);
        for (int64_t j = 0; j < width; ++j) row[j] = (row[j] - m.mean) * m.inverse;
        if (keeps_normal) {
          std::memcpy((T*)v.normal + (s.offset + b) * width, row, width * sizeof(T));
          ((T*)v.inverse)[s.offset + b] = m.inverse;
        }
      }
      const Recurrent<T> r{row, (const T*)v.norm_hh, (const T*)a.bias_hh};
      T* const out = (T*)a.output + (s.offset + b) * outputs;
      const T* const h_before = row_before(s, (const T*)a.output, (const T*)a.h0, outputs, b);
      if (a.size.cell == kLstm) {
        T* const c = (T*)a.c_n + b * hidden;
        const T* const first = a.c0 ? (const T*)a.c0 + b * hidden : nullptr;
        T* const made = a.weight_hr ? (T*)a.extra + (a.saves ? s.offset + b : b) * hidden : out;
        variant_lstm_row(v, r, gates + b * width, hidden, b < s.before_batch ? c : first, c,
                         a.cells ? (T*)a.cells + (s.offset + b) * hidden : nullptr, made);
        if (a.weight_hr) {
          std::memset(out, 0, outputs * sizeof(T));
          dot_product(out, outputs, made, hidden, 1, (const T*)a.weight_hr, hidden, outputs, hidden);
        }
      } else if (a.size.cell == kGru) {
        variant_gru_row(v, r, gates + b * width, hidden, h_before, (T*)a.extra + (a.saves ? s.offset + b : b) * hidden,
                        out);
      } else {
        variant_rnn_row(v, r, gates + b * width, hidden, out);
      }
      if (v.zoneout) {
        const T* const share_kept = (const T*)v.zoneout + (s.offset + b) * outputs;
        for (int64_t j = 0; j < outputs; ++j)
          out[j] = (1 - share_kept[j]) * out[j] + share_kept[j] * (h_before ? h_before[j] : T(0));
      }
      std::memcpy((T*)a.h_n + b * outputs, out, outputs * sizeof(T));
    }
  }
}

// ----------------------------------------------------------------------------------------- backward
// grad_made: of h before the projection; grad_c: in of c from the step after, out of the c before.
template <class T>
void variant_lstm_row_backward(const RecurrentVariant& v, const T* gates, int64_t hidden, const T* c, const T* c_before,
                               const T* grad_made, const T* grad_cells, T* grad_c, T* grad_gates, T* grad_normal,
                               T* grad_bent) {
  typedef vec_t<T> V;
  const Functions<T> act{v};
  const T* const p = (const T*)v.peephole;
  const Moments<T> m = v.norm_c ? moments(c, hidden) : Moments<T>{0, 1};
  T* const to = v.norm_c ? grad_normal : grad_bent;
  each_vector<T>(hidden, [&](int64_t j, auto tail, int n) DLKERN_LAMBDA {
    constexpr bool kTail = tail.value;
    V bent[1] = {load<kTail>(c + j, n)};
    if (v.norm_c)
      bent[0] = fma((bent[0] - m.mean) * m.inverse, load<kTail>((const T*)v.norm_c + j, n),
                    load<kTail>((const T*)v.norm_c_bias + j, n));
    act.bend(bent);
    const V dh = load<kTail>(grad_made + j, n), o = load<kTail>(gates + 3 * hidden + j, n);
    store<kTail>(grad_gates + 3 * hidden + j, act.gate_back(dh * bent[0], o), n);
    store<kTail>(to + j, act.bend_back(dh * o, bent[0]), n);
  });
  if (v.norm_c) norm_backward(grad_bent, grad_normal, (const T*)v.norm_c, c, m, m.inverse, hidden);
  each_vector<T>(hidden, [&](int64_t j, auto tail, int n) DLKERN_LAMBDA {
    constexpr bool kTail = tail.value;
    const V i = load<kTail>(gates + j, n), f = load<kTail>(gates + hidden + j, n);
    const V g = load<kTail>(gates + 2 * hidden + j, n);
    V dc = load<kTail>(grad_c + j, n) + load<kTail>(grad_bent + j, n) + load_or_zero<kTail>(grad_cells, j, n);
    if (p) dc = fma(load<kTail>(p + 2 * hidden + j, n), load<kTail>(grad_gates + 3 * hidden + j, n), dc);
    const V di = act.gate_back(dc * g, i), df = act.gate_back(dc * load_or_zero<kTail>(c_before, j, n), f);
    store<kTail>(grad_gates + j, di, n);
    store<kTail>(grad_gates + hidden + j, df, n);
    store<kTail>(grad_gates + 2 * hidden + j, act.bend_back(dc * i, g), n);
    V before = dc * f;
    if (p) before = fma(load<kTail>(p + j, n), di, fma(load<kTail>(p + hidden + j, n), df, before));
    store<kTail>(grad_c + j, before, n);
  });
}

// grad_h: in of the step's h, out what passes to the h before beside the product.
template <class T>
void variant_gru_row_backward(const RecurrentVariant& v, const T* gates, int64_t hidden, const T* part,
                              const T* h_before, T* grad_h, T* grad_gates, T* grad_recurrent) {
  typedef vec_t<T> V;
  const Functions<T> act{v};
  each_vector<T>(hidden, [&](int64_t j, auto tail, int n) DLKERN_LAMBDA {
    constexpr bool kTail = tail.value;
    const V r = load<kTail>(gates + j, n), z = load<kTail>(gates + hidden + j, n);
    const V fresh = load<kTail>(gates + 2 * hidden + j, n), dh = load<kTail>(grad_h + j, n);
    const V dn = act.bend_back(dh * (1 - z), fresh);
    const V dr = act.gate_back(dn * load<kTail>(part + j, n), r);
    const V dz = act.gate_back(dh * (load_or_zero<kTail>(h_before, j, n) - fresh), z);
    for (T* const to : {grad_gates, grad_recurrent}) {
      store<kTail>(to + j, dr, n);
      store<kTail>(to + hidden + j, dz, n);
    }
    store<kTail>(grad_gates + 2 * hidden + j, dn, n);
    store<kTail>(grad_recurrent + 2 * hidden + j, dn * r, n);
    store<kTail>(grad_h + j, dh * z, n);
  });
}

template <class T>
void variant_backward(const RecurrentBackward& a, Team team) {
  typedef vec_t<T> V;
  const RecurrentVariant& v = *a.variant;
  const Share share = share_of(a.size, team, true);
  const int64_t hidden = a.size.hidden, outputs = a.size.outputs, width = gates_in(a.size.cell) * hidden;
  const bool projects = a.weight_hr != nullptr, gru = a.size.cell == kGru;
  T* const state = (T*)v.work;                     // (batch, outputs)
  T* const made = state + a.size.batch * outputs;  // (batch, hidden)
  T* const bent = made + a.size.batch * hidden;    // (batch, hidden)
  for (Walk walk(a.size, false); !walk.done(); walk.next()) {
    const Step s = walk.step();
    const Range batch = intersect(share.batch, 0, s.batch);
    if (!size_of(batch)) continue;
    T* const grad_gates = (T*)a.grad_gates + s.offset * width;
    T* const grad_recurrent = gru ? (T*)a.grad_extra + s.offset * width : grad_gates;
    T* const grad_product = v.norm_hh ? (T*)v.grad_product + s.offset * width : grad_recurrent;
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      T* const passing = (T*)a.grad_h + b * outputs;  // what zoneout keeps, or zero
      T* const grad_h = projects ? (T*)a.grad_extra + (s.offset + b) * outputs : state + b * outputs;
      const T* const grad_output = grad_row<T>(a, s, b);
      const T* const kept = v.zoneout ? (const T*)v.zoneout + (s.offset + b) * outputs : nullptr;
      for (int64_t j = 0; j < outputs; ++j) {
        const T all = passing[j] + (grad_output ? grad_output[j] : T(0));
        passing[j] = kept ? kept[j] * all : T(0);
        grad_h[j] = all - passing[j];
      }
      if (projects) std::memset(made + b * hidden, 0, hidden * sizeof(T));
    }
    if (projects)
      add_product(a, made, hidden, Range{0, hidden}, (const T*)a.grad_extra + s.offset * outputs, outputs, batch,
                  a.weight_hr);
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      const int64_t row = s.offset + b;
      T* const passing = (T*)a.grad_h + b * outputs;
      if (a.size.cell == kLstm) {
        variant_lstm_row_backward(v, (const T*)a.gates + row * width, hidden, (const T*)a.cells + row * hidden,
                                  row_before(s, (const T*)a.cells, (const T*)a.c0, hidden, b),
                                  projects ? made + b * hidden : state + b * outputs,
                                  v.grad_cells ? (const T*)v.grad_cells + row * hidden : nullptr,
                                  (T*)a.grad_c + b * hidden, grad_gates + b * width,
                                  v.norm_c ? (T*)v.grad_normal + row * hidden : nullptr, bent + b * hidden);
      } else if (gru) {
        variant_gru_row_backward(v, (const T*)a.gates + row * width, hidden, (const T*)a.extra + row * hidden,
                                 row_before(s, (const T*)a.output, (const T*)a.h0, hidden, b), state + b * outputs,
                                 grad_gates + b * width, grad_recurrent + b * width);
        for (int64_t j = 0; j < hidden; ++j) passing[j] += state[b * hidden + j];
      } else {
        const T* const y = (const T*)(v.zoneout ? a.gates : a.output) + row * hidden;
        const Functions<T> act{v};
        each_vector<T>(hidden, [&](int64_t j, auto tail, int n) DLKERN_LAMBDA {
          const V g = act.bend_back(load<tail.value>(state + b * hidden + j, n), load<tail.value>(y + j, n));
          store<tail.value>(grad_gates + b * width + j, g, n);
        });
      }
      if (v.norm_hh)  // `normal` is normalised already
        norm_backward(grad_product + b * width, grad_recurrent + b * width, (const T*)v.norm_hh,
                      (const T*)v.normal + row * width, Moments<T>{0, 1}, ((const T*)v.inverse)[row], width);
    }
    if (!v.dropout) {
      add_product(a, (T*)a.grad_h, outputs, Range{0, outputs}, grad_product, width, batch, a.weight_hh);
      continue;
    }
    T* const moved = state;
    std::memset(moved + batch.begin * outputs, 0, size_of(batch) * outputs * sizeof(T));
    add_product(a, moved, outputs, Range{0, outputs}, grad_product, width, batch, a.weight_hh);
    for (int64_t at = batch.begin * outputs; at < batch.end * outputs; ++at)
      ((T*)a.grad_h)[at] += moved[at] * ((const T*)v.dropout)[at];
  }
}

#undef DLKERN_LAMBDA
