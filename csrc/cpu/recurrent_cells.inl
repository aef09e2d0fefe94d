// The gates of one row and one step, forward and backward: kernels for over_single (simd/vector.inl).
//
// Gates come in as sums, without the hidden bias, and go out activated; gradients are of the sums. sigmoid and tanh
// saturate without an overflow that shows (simd/vector_math.inl).

// Loads, or zero where there is nothing to load from.
template <bool kTail, class T>
DLKERN_INLINE vec_t<T> load_or_zero(const T* p, int64_t i, int n) {
  return p ? load<kTail>(p + i, n) : vec_t<T>{};
}

template <class T>
struct LstmForwardGates {
  typedef vec_t<T> V;
  static constexpr int lanes = kLanes<T>;
  T* gates;  // i; f, g and o follow at multiples of `hidden`
  int64_t hidden;
  const T *bias, *c_before;
  T *c, *kept_c, *h, *h_last;

  template <bool kTail>
  DLKERN_INLINE V sum(int64_t j, int n) const {
    return load<kTail>(gates + j, n) + load_or_zero<kTail>(bias, j, n);
  }
  template <bool kTail, int, int>
  DLKERN_INLINE void step(int64_t j, int n) {
    const V i = sigmoid(sum<kTail>(j, n)), f = sigmoid(sum<kTail>(hidden + j, n));
    const V g = tanh(sum<kTail>(2 * hidden + j, n)), o = sigmoid(sum<kTail>(3 * hidden + j, n));
    const V now = fma(f, load_or_zero<kTail>(c_before, j, n), i * g), out = o * tanh(now);
    store<kTail>(c + j, now, n);
    store<kTail>(h + j, out, n);
    if (h_last) store<kTail>(h_last + j, out, n);
    if (kept_c) {
      store<kTail>(kept_c + j, now, n);
      store<kTail>(gates + j, i, n);
      store<kTail>(gates + hidden + j, f, n);
      store<kTail>(gates + 2 * hidden + j, g, n);
      store<kTail>(gates + 3 * hidden + j, o, n);
    }
  }
};

template <class T>
struct LstmBackwardGates {
  typedef vec_t<T> V;
  static constexpr int lanes = kLanes<T>;
  const T* gates;
  int64_t hidden;
  const T *c, *c_before, *grad_h;  // grad_h: of this step's h, before the projection
  const T* grad_output;            // added to it
  T *grad_state, *grad_c, *grad_gates;

  template <bool kTail, int, int>
  DLKERN_INLINE void step(int64_t j, int n) {
    const V i = load<kTail>(gates + j, n), f = load<kTail>(gates + hidden + j, n);
    const V g = load<kTail>(gates + 2 * hidden + j, n), o = load<kTail>(gates + 3 * hidden + j, n);
    const V dh = load<kTail>(grad_h + j, n) + load_or_zero<kTail>(grad_output, j, n);
    const V bent = tanh(load<kTail>(c + j, n));
    const V dc = fma(dh * o, one_minus_square(bent), load<kTail>(grad_c + j, n));
    store<kTail>(grad_gates + j, dc * g * bell(i), n);
    store<kTail>(grad_gates + hidden + j, dc * load_or_zero<kTail>(c_before, j, n) * bell(f), n);
    store<kTail>(grad_gates + 2 * hidden + j, dc * i * one_minus_square(g), n);
    store<kTail>(grad_gates + 3 * hidden + j, dh * bent * bell(o), n);
    store<kTail>(grad_c + j, dc * f, n);
    if (grad_state) store<kTail>(grad_state + j, V{}, n);  // the product adds to it
  }
};

template <class T>
struct GruForwardGates {
  typedef vec_t<T> V;
  static constexpr int lanes = kLanes<T>;
  T* gates;  // r; z and n follow
  int64_t hidden;
  const T *bias, *h_before;
  T* part;  // W_hn h, and then + b_hn
  T *h, *h_last;
  bool saves;

  template <bool kTail, int, int>
  DLKERN_INLINE void step(int64_t j, int n) {
    const V r = sigmoid(load<kTail>(gates + j, n) + load_or_zero<kTail>(bias, j, n));
    const V z = sigmoid(load<kTail>(gates + hidden + j, n) + load_or_zero<kTail>(bias, hidden + j, n));
    const V scaled = load<kTail>(part + j, n) + load_or_zero<kTail>(bias, 2 * hidden + j, n);
    const V fresh = tanh(fma(r, scaled, load<kTail>(gates + 2 * hidden + j, n)));
    const V out = fma(z, load_or_zero<kTail>(h_before, j, n) - fresh, fresh);
    store<kTail>(h + j, out, n);
    store<kTail>(h_last + j, out, n);
    if (saves) {
      store<kTail>(gates + j, r, n);
      store<kTail>(gates + hidden + j, z, n);
      store<kTail>(gates + 2 * hidden + j, fresh, n);
      store<kTail>(part + j, scaled, n);
    }
  }
};

template <class T>
struct GruBackwardGates {
  typedef vec_t<T> V;
  static constexpr int lanes = kLanes<T>;
  const T* gates;
  int64_t hidden;
  const T *part, *h_before, *grad_output;
  T *grad_h, *grad_gates, *grad_recurrent;

  template <bool kTail, int, int>
  DLKERN_INLINE void step(int64_t j, int n) {
    const V r = load<kTail>(gates + j, n), z = load<kTail>(gates + hidden + j, n);
    const V fresh = load<kTail>(gates + 2 * hidden + j, n);
    const V dh = load<kTail>(grad_h + j, n) + load_or_zero<kTail>(grad_output, j, n);
    const V dn = dh * (1 - z) * one_minus_square(fresh);
    const V dr = dn * load<kTail>(part + j, n) * bell(r);
    const V dz = dh * (load_or_zero<kTail>(h_before, j, n) - fresh) * bell(z);
    for (T* const to : {grad_gates, grad_recurrent}) {
      store<kTail>(to + j, dr, n);
      store<kTail>(to + hidden + j, dz, n);
    }
    store<kTail>(grad_gates + 2 * hidden + j, dn, n);
    store<kTail>(grad_recurrent + 2 * hidden + j, dn * r, n);
    store<kTail>(grad_h + j, dh * z, n);
  }
};

template <class T, bool kRelu>
struct RnnForwardGates {
  typedef vec_t<T> V;
  static constexpr int lanes = kLanes<T>;
  const T *gates, *bias;
  T *h, *h_last;

  template <bool kTail, int, int>
  DLKERN_INLINE void step(int64_t j, int n) {
    const V z = load<kTail>(gates + j, n) + load_or_zero<kTail>(bias, j, n);
    const V out = kRelu ? select(z <= V{}, V{}, z) : tanh(z);  // a NaN stays
    store<kTail>(h + j, out, n);
    store<kTail>(h_last + j, out, n);
  }
};

template <class T, bool kRelu>
struct RnnBackwardGates {
  typedef vec_t<T> V;
  static constexpr int lanes = kLanes<T>;
  const T *output, *grad_output;
  T *grad_h, *grad_gates;

  template <bool kTail, int, int>
  DLKERN_INLINE void step(int64_t j, int n) {
    const V y = load<kTail>(output + j, n);
    const V dh = load<kTail>(grad_h + j, n) + load_or_zero<kTail>(grad_output, j, n);
    store<kTail>(grad_gates + j, kRelu ? select(y <= V{}, V{}, dh) : dh * one_minus_square(y), n);
    store<kTail>(grad_h + j, V{}, n);
  }
};
