// A tile of scores: what is added to it, what is hidden of it, what dropout leaves of it.

// What is at work on: a sequence of a head. `from` and `to` bound the keys that padding and lengths leave.
template <class T>
struct Head {
  const AttentionProblem& p;
  const AttentionPlan& plan;
  AttentionWork<T>& w;
  int64_t b, key_head;
  Sequence s;
  int64_t from, to;
  bool hides;                           // w.hidden says which keys between them are hidden
  Rows<T> query, grad_out, key, value;  // the block's, and the head's
  // What w.tile holds, and what w.grad_tile gathers.
  int64_t h, tile_head, tile_query, tile_key, tile_keys;

  Head(const AttentionProblem& problem, const AttentionPlan& a_plan, AttentionWork<T>& work)
      : p(problem),
        plan(a_plan),
        w(work),
        b(-1),
        key_head(-1),
        s{},
        from(0),
        to(0),
        hides(false),
        query{},
        grad_out{},
        key{},
        value{},
        h(0),
        tile_head(-1),
        tile_query(0),
        tile_key(0),
        tile_keys(0) {}
};

template <class T>
DLKERN_INLINE const void* row_at(const Head<T>& a, const AttentionTensor& t, int64_t head, int64_t row) {
  const int64_t size = a.p.dtype == kFloat64 ? 8 : a.p.dtype == kFloat32 ? 4 : 2;
  return static_cast<const char*>(t.data) + size * (a.b * t.batch + head * t.head + row * t.row);
}

// The keys of a batch that padding and lengths leave.
template <class T>
void find_keys(Head<T>& a) {
  a.s = sequence(a.p, a.b);
  a.from = 0, a.to = a.s.keys, a.hides = false;
  if (a.p.lengths) a.to = std::clamp<int64_t>(a.p.lengths[a.b], 0, a.s.keys);
  if (a.p.padding == nullptr) return;
  const uint8_t* padding = a.p.padding + a.b * a.p.keys;
  while (a.to > a.from && padding[a.to - 1]) --a.to;
  while (a.from < a.to && padding[a.from]) ++a.from;
  for (int64_t j = a.from; j < a.to; ++j) a.hides |= padding[j] != 0;
  if (!a.hides) return;
  for (int64_t j = 0; j < padded(a.s.keys); ++j) a.w.hidden[j] = j < a.s.keys && padding[j] ? -kInfinity<T> : T(0);
}

// What is added by distance: w.diagonals[j - i + queries - 1] for key j of query i.
template <class T>
void fill_diagonals(Head<T>& a) {
  const AttentionProblem& p = a.p;
  if (!a.plan.distances && !p.slopes) return;
  const T* table = a.plan.distances ? static_cast<const T*>(p.table) + a.h * p.rows : nullptr;
  const T slope = p.slopes ? static_cast<const T*>(p.slopes)[(p.slope_batches == 1 ? 0 : a.b) * p.heads + a.h] : T(0);
  const int64_t n = a.s.queries + a.s.keys - 1, first = -(a.s.queries - 1) - a.s.offset;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t d = first + i;
    T value = 0;
    if (table) {
      const int64_t at = std::clamp(d, -p.reach, p.reach) + p.reach;
      value =
          table[p.index_is_64 ? static_cast<const int64_t*>(p.index)[at] : static_cast<const int32_t*>(p.index)[at]];
    }
    a.w.diagonals[i] = p.slopes ? value - slope * (T)(d < 0 ? -d : d) : value;
  }
  for (int64_t i = n; i < n + kPadded; ++i) a.w.diagonals[i] = 0;
}

DLKERN_INLINE int64_t index_at(const AttentionProblem& p, int64_t at) {
  return p.index_is_64 ? static_cast<const int64_t*>(p.index)[at] : static_cast<const int32_t*>(p.index)[at];
}

// Makes w.tile what a table adds to rows q0.. and keys k0..: windows of the same head find it made.
template <class T>
void fill_tile(Head<T>& a, int64_t q0, int64_t m, int64_t k0, int64_t n) {
  if (a.tile_head == a.h && a.tile_query == q0 && a.tile_key == k0 && a.tile_keys == n) return;
  a.tile_head = a.h, a.tile_query = q0, a.tile_key = k0, a.tile_keys = n;
  const T* table = static_cast<const T*>(a.p.table) + a.h * a.p.rows;
  for (int64_t i = 0; i < m; ++i) {
    T* row = a.w.tile + i * kScoreRow;
    const int64_t at = (q0 + i) * a.p.keys + k0;
    for (int64_t j = 0; j < n; ++j) row[j] = table[index_at(a.p, at + j)];
    for (int64_t j = n; j < padded(n); ++j) row[j] = 0;
  }
}

template <class T>
DLKERN_INLINE int64_t added_at(const Head<T>& a, const AttentionAdded& t, int64_t i, int64_t k0) {
  return a.b % t.batches * t.batch + a.h * t.head + i * t.query + k0 * t.key;
}

// Adds n elements of a mask or bias of dtype S to a row.
template <class T, class S>
void add_row(T* row, const S* from, bool spread, int64_t n) {
  constexpr int w = kLanes<T>;
  if (spread) {
    const auto v = broadcast((T)load<true>(from, 1)[0]);
    for (int64_t j = 0; j < n; j += w) store<false>(row + j, load<false>(row + j, w) + v, w);
    return;
  }
  int64_t j = 0;
  for (; j + w <= n; j += w) store<false>(row + j, load<false>(row + j, w) + load<false>(from + j, w), w);
  if (j < n) store<false>(row + j, load<false>(row + j, w) + load<true>(from + j, (int)(n - j)), w);
}

template <class T>
void add_tensor(const Head<T>& a, const AttentionAdded& t, int64_t q0, int64_t m, int64_t k0, int64_t n) {
  if (t.data == nullptr) return;
  T* row = a.w.scores;
  for (int64_t i = 0; i < m; ++i, row += kScoreRow) {
    const int64_t at = added_at(a, t, q0 + i, k0);
    if (t.dtype == kAttentionBool) {
      const uint8_t* keeps = static_cast<const uint8_t*>(t.data) + at;
      for (int64_t j = 0; j < n; ++j) row[j] = keeps[j * t.key] ? row[j] : -kInfinity<T>;
    } else {
      // float32 may stand beside half data
      as_stored<T>(t.data, t.dtype, [&](const auto* data) { add_row(row, data + at, t.key == 0, n); });
    }
  }
}

// The keys that rows q0 to q0 + m see by band, padding and lengths; begins at a multiple of a panel.
struct Keys {
  int64_t begin, end, step;  // in blocks of `step`
};
template <class T>
Keys visible_keys(const Head<T>& a, int64_t q0, int64_t m) {
  int64_t begin = a.from, end = a.to;
  if (a.p.left != INT64_MIN) begin = std::max(begin, q0 + a.s.offset + a.p.left);
  if (a.p.right != INT64_MAX) end = std::min(end, q0 + m + a.s.offset + a.p.right);
  if (end <= begin) return {0, 0, 1};
  begin = begin / kPadded * kPadded;
  const int64_t length = end - begin, blocks = divided_up(length, kKeyBlock);
  return {begin, end, padded(divided_up(length, blocks))};
}

// scale q k in w.scores become the scores: rows q0.., keys k0.. . With kSlopes w.slopes gets softcap's derivative. What
// lies between n and the next whole multiple of kPadded becomes -infinity.
template <class T, bool kSlopes>
void finish_scores(Head<T>& a, int64_t q0, int64_t m, int64_t k0, int64_t n) {
  typedef vec_t<T> V;
  constexpr int w = kLanes<T>;
  const AttentionProblem& p = a.p;
  const int64_t wide = padded(n);
  if (p.softcap != 0) {
    const V cap = splat<V>(p.softcap), inverse = splat<V>(1 / p.softcap);
    for (int64_t i = 0; i < m; ++i) {
      T* row = a.w.scores + i * kScoreRow;
      for (int64_t j = 0; j < n; j += w) {
        const V t = tanh(load<false>(row + j, w) * inverse);
        store<false>(row + j, t * cap, w);
        if constexpr (kSlopes) store<false>(a.w.slopes + i * kScoreRow + j, 1 - t * t, w);
      }
    }
  }
  const T* more = nullptr;  // rows that are added: by position, then by distance
  if (a.plan.positions) {
    fill_tile(a, q0, m, k0, n);
    more = a.w.tile;
  }
  const bool diagonal = a.plan.distances || p.slopes;
  for (int64_t i = 0; i < m; ++i) {
    T* row = a.w.scores + i * kScoreRow;
    if (more)
      for (int64_t j = 0; j < n; j += w)
        store<false>(row + j, load<false>(row + j, w) + load<false>(more + i * kScoreRow + j, w), w);
    if (diagonal) {
      const T* d = a.w.diagonals + k0 - (q0 + i) + a.s.queries - 1;
      for (int64_t j = 0; j < n; j += w) store<false>(row + j, load<false>(row + j, w) + load<false>(d + j, w), w);
    }
  }
  add_tensor(a, p.mask, q0, m, k0, n);
  add_tensor(a, p.bias, q0, m, k0, n);
  const V none = broadcast(-kInfinity<T>);
  for (int64_t i = 0; i < m; ++i) {
    T* row = a.w.scores + i * kScoreRow;
    if (a.hides)
      for (int64_t j = 0; j < n; j += w) {
        const V h = load<false>(a.w.hidden + k0 + j, w);
        store<false>(row + j, select(h < 0, none, load<false>(row + j, w)), w);
      }
    int64_t begin = std::max<int64_t>(0, a.from - k0), end = n;
    if (p.left != INT64_MIN) begin = std::max(begin, q0 + i + a.s.offset + p.left - k0);
    if (p.right != INT64_MAX) end = std::min(end, q0 + i + a.s.offset + p.right + 1 - k0);
    for (int64_t j = 0; j < std::min(begin, wide); ++j) row[j] = -kInfinity<T>;
    for (int64_t j = std::max<int64_t>(end, 0); j < wide; ++j) row[j] = -kInfinity<T>;
  }
}

// ------------------------------------------------------------------------------------------- dropout
// Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011): Philox-4x32-10.
DLKERN_INLINE void philox(uint32_t (&c)[4], uint64_t seed) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int i = 0; i < 10; ++i) {
    const uint64_t a = (uint64_t)c[0] * 0xD2511F53u, b = (uint64_t)c[2] * 0xCD9E8D57u;
    const uint32_t c0 = (uint32_t)(b >> 32) ^ c[1] ^ k0, c2 = (uint32_t)(a >> 32) ^ c[3] ^ k1;
    c[0] = c0, c[1] = (uint32_t)b, c[2] = c2, c[3] = (uint32_t)a;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

// w.kept: what elements of the softmax are multiplied with; 0 from n on.
template <class T>
void fill_kept(const Head<T>& a, int64_t q0, int64_t m, int64_t k0, int64_t n) {
  const AttentionProblem& p = a.p;
  const uint32_t least = (uint32_t)std::min<int64_t>((int64_t)(p.dropout * 2147483648.0), 2147483647);
  const T factor = (T)(1.0 / (1.0 - p.dropout));
  for (int64_t i = 0; i < m; ++i) {
    T* row = a.w.kept + i * kScoreRow;
    for (int64_t j = 0; j < n; j += 4) {
      uint32_t words[4] = {(uint32_t)((k0 + j) / 4), (uint32_t)(q0 + i), (uint32_t)(a.b * p.heads + a.h), 0};
      philox(words, (uint64_t)p.seed);
      for (int k = 0; k < 4; ++k) row[j + k] = (words[k] >> 1) >= least ? factor : T(0);
    }
    for (int64_t j = n; j < padded(n); ++j) row[j] = 0;
  }
}

template <class T>
void multiply_rows(T* to, const T* from, const T* by, int64_t m, int64_t n) {
  constexpr int w = kLanes<T>;
  for (int64_t i = 0; i < m * kScoreRow; i += kScoreRow)
    for (int64_t j = 0; j < n; j += w)
      store<false>(to + i + j, load<false>(from + i + j, w) * load<false>(by + i + j, w), w);
}
