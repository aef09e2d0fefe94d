// Backward: scores are made again, block by block; gradients of keys and values gather in working memory.

// Where the gradients of a unit's keys and values gather: rows of plan.row, then rows of plan.value_row.
template <class T>
struct KeyGradients {
  T *key, *value;
};

template <class T>
KeyGradients<T> partial_keys(const AttentionBackwardContext& f, int64_t unit) {
  const AttentionPlan& plan = f.plan;
  const int64_t rows = padded(plan.most_keys) + kPadded;
  T* first = static_cast<T*>(f.partial_keys) + unit * rows * (plan.row + plan.value_row);
  return {first, first + rows * plan.row};
}

template <class T>
void load_gradient(Head<T>& a, const AttentionBackward& f, int64_t q0, int64_t m) {
  // sum(grad_out * out) - grad_lse of each row into w.top, and what is subtracted from its scores into w.sum
  typedef vec_t<T> V;
  constexpr int w = kLanes<T>;
  const int64_t row = a.plan.value_row, dim = a.p.value_dim, first = a.s.first_query + q0;
  const int64_t lse_at = ((a.p.cu_queries ? 0 : a.b * a.p.heads) + a.h) * a.p.queries + first;
  const T* lse = static_cast<const T*>(f.lse) + lse_at;
  const T* grad_lse = f.grad_lse ? static_cast<const T*>(f.grad_lse) + lse_at : nullptr;
  for (int64_t i = 0; i < m; ++i) {
    a.w.top[i] = grad_lse && lse[i] != -kInfinity<T> ? -grad_lse[i] : T(0);
    a.w.sum[i] = lse[i] == -kInfinity<T> ? kInfinity<T> : lse[i];  // a row that sees nothing: its exponentials are 0
  }
  if (f.grad_out.data == nullptr) return;
  as_stored<T>(f.grad_out.data, a.p.dtype, [&](const auto* grad) {
    const auto* from = grad + a.b * f.grad_out.batch + a.h * f.grad_out.head + first * f.grad_out.row;
    const auto* out =
        static_cast<decltype(from)>(f.out.data) + a.b * f.out.batch + a.h * f.out.head + first * f.out.row;
    a.grad_out = rows_in_place(from, f.grad_out.row, m, dim, a.w.grad_out, row);
    const T* grad_row = a.grad_out.first;
    for (int64_t i = 0; i < m; ++i, out += f.out.row, grad_row += a.grad_out.row) {
      V sum{};
      int64_t j = 0;
      for (; j + w <= dim; j += w) sum = fma(load<false>(grad_row + j, w), load<false>(out + j, w), sum);
      if (j < dim) sum = fma(load<false>(grad_row + j, w), load<true>(out + j, (int)(dim - j)), sum);
      a.w.top[i] += sum_lanes<T>(sum);
    }
  });
}

// From w.scores: the softmax in its place, and in w.grad_scores its scores' gradient (before softcap's derivative).
// With dropout w.dropped becomes what multiplied the values.
template <class T>
void make_gradient(Head<T>& a, const AttentionBackward& f, int64_t q0, int64_t m, int64_t k0, int64_t n) {
  typedef vec_t<T> V;
  constexpr int w = kLanes<T>;
  const bool given = f.grad_out.data != nullptr;
  if (given) {
    const int64_t dim = padded(a.p.value_dim);
    product(a.w.grad_scores, kScoreRow, a.grad_out.first, a.grad_out.row, 1, a.w.value_panels + k0 * dim,
            2 * kLanes<T> * dim, 2 * kLanes<T>, m, n, a.p.value_dim, false);
  }
  const bool drops = a.p.dropout > 0;
  if (drops) fill_kept(a, q0, m, k0, n);
  for (int64_t i = 0; i < m; ++i) {
    T *s = a.w.scores + i * kScoreRow, *g = a.w.grad_scores + i * kScoreRow;
    const V lse = broadcast(a.w.sum[i]), delta = broadcast(a.w.top[i]);
    const T* kept = drops ? a.w.kept + i * kScoreRow : nullptr;
    for (int64_t j = 0; j < n; j += w) {
      const V p = exponential(load<false>(s + j, w) - lse);
      V d = given ? load<false>(g + j, w) : V{};
      if (drops) {
        const V k = load<false>(kept + j, w);
        store<false>(a.w.dropped + i * kScoreRow + j, p * k, w);
        d = d * k;
      }
      store<false>(s + j, p, w);
      store<false>(g + j, p * (d - delta), w);
    }
  }
}

// Adds a tile of the scores' gradient to what the table's gradient gathers in.
template <class T>
void gather_table(Head<T>& a, int64_t q0, int64_t m, int64_t k0, int64_t n) {
  constexpr int w = kLanes<T>;
  for (int64_t i = 0; i < m; ++i) {
    const T* g = a.w.grad_scores + i * kScoreRow;
    T* to = a.plan.positions ? a.w.grad_tile + i * kScoreRow : a.w.grad_diagonals + k0 - (q0 + i) + a.s.queries - 1;
    for (int64_t j = 0; j < n; j += w) store<false>(to + j, load<false>(to + j, w) + load<false>(g + j, w), w);
  }
}

// Adds what w.grad_tile gathered to the sums of its head; clears it.
template <class T>
void flush_tile(Head<T>& a, double* tables, int64_t head, int64_t q0, int64_t m, int64_t k0, int64_t n) {
  double* table = tables + head * a.p.rows;
  for (int64_t i = 0; i < m; ++i) {
    T* row = a.w.grad_tile + i * kScoreRow;
    const int64_t at = (q0 + i) * a.p.keys + k0;
    for (int64_t j = 0; j < n; ++j) table[index_at(a.p, at + j)] += row[j];
    std::fill_n(row, padded(n), T(0));
  }
}

template <class T>
void flush_diagonals(Head<T>& a, double* tables, int64_t head) {
  double* table = tables + head * a.p.rows;
  const int64_t n = a.s.queries + a.s.keys - 1, first = -(a.s.queries - 1) - a.s.offset;
  for (int64_t i = 0; i < n; ++i)
    table[index_at(a.p, std::clamp(first + i, -a.p.reach, a.p.reach) + a.p.reach)] += a.w.grad_diagonals[i];
  std::fill_n(a.w.grad_diagonals, n + kPadded, T(0));
}

// The tile of positions whose gradient w.grad_tile gathers; head -1: none.
struct Gathered {
  int64_t head, q0, m, k0, n;
};

template <class T>
void backward_block(Head<T>& a, const AttentionBackward& f, int64_t q0, int64_t m, KeyGradients<T> grads,
                    double* tables, Gathered& gathered) {
  AttentionWork<T>& w = a.w;
  const AttentionPlan& plan = a.plan;
  constexpr int lanes = kLanes<T>;
  const int64_t dim = divided_up(a.p.dim, lanes) * lanes, value_dim = divided_up(a.p.value_dim, lanes) * lanes;
  const Keys keys = visible_keys(a, q0, m);
  load_query(a, q0, m);
  load_gradient(a, f, q0, m);
  for (int64_t k0 = keys.begin; k0 < keys.end; k0 += keys.step) {
    const int64_t n = std::min(keys.step, keys.end - k0);
    if (a.p.softcap != 0)
      make_scores<T, true>(a, q0, m, k0, n);
    else
      make_scores<T, false>(a, q0, m, k0, n);
    make_gradient(a, f, q0, m, k0, n);
    if (f.grad_value.data && f.grad_out.data)
      product_of_rows(grads.value + k0 * plan.value_row, plan.value_row, a.p.dropout > 0 ? w.dropped : w.scores,
                      int64_t(1), kScoreRow, a.grad_out.first, a.grad_out.row, n, value_dim, m, true);
    if (f.grad_table) {
      if (plan.positions && (gathered.head != a.h || gathered.q0 != q0 || gathered.k0 != k0 || gathered.n != n)) {
        if (gathered.head >= 0) flush_tile(a, tables, gathered.head, gathered.q0, gathered.m, gathered.k0, gathered.n);
        gathered = {a.h, q0, m, k0, n};
      }
      gather_table(a, q0, m, k0, n);
    }
    if (a.p.softcap != 0) multiply_rows(w.grad_scores, w.grad_scores, w.slopes, m, n);
    if (f.grad_query.data)
      product_of_rows(w.grad_query, plan.row, w.grad_scores, kScoreRow, 1, a.key.first + k0 * a.key.row, a.key.row, m,
                      dim, n, k0 != keys.begin);
    if (f.grad_key.data)
      product_of_rows(grads.key + k0 * plan.row, plan.row, w.grad_scores, int64_t(1), kScoreRow, a.query.first,
                      a.query.row, n, dim, m, true);
  }
  if (f.grad_query.data == nullptr) return;
  if (keys.begin == keys.end) std::fill_n(w.grad_query, m * plan.row, T(0));
  as_stored<T>(f.grad_query.data, a.p.dtype, [&](const auto* data) {
    auto* to = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(data)>>*>(data);
    to += a.b * f.grad_query.batch + a.h * f.grad_query.head + (a.s.first_query + q0) * f.grad_query.row;
    const T scale = (T)a.p.scale;
    store_rows(to, f.grad_query.row, w.grad_query, plan.row, m, a.p.dim, &scale, 0);
  });
}

template <class T>
void store_keys(const AttentionProblem& p, const AttentionTensor& t, const Sequence& s, int64_t b, int64_t head,
                const T* from, int64_t ld, int64_t first, int64_t last, int64_t dim, T factor) {
  if (t.data == nullptr) return;
  as_stored<T>(t.data, p.dtype, [&](const auto* data) {
    auto* to = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(data)>>*>(data);
    to += b * t.batch + head * t.head + (s.first_key + first) * t.row;
    store_rows(to, t.row, from + first * ld, ld, last - first, dim, &factor, 0);
  });
}

template <class T>
void load_backward_keys(Head<T>& a, bool rows) {
  load_keys(a);
  const AttentionProblem& p = a.p;
  as_stored<T>(p.value.data, p.dtype, [&](const auto* data) {
    const auto* from = data + a.b * p.value.batch + a.key_head * p.value.head + a.s.first_key * p.value.row;
    copy_panels(a.w.value_panels, from, p.value.row, a.from, a.to, p.value_dim, T(1));
  });
  if (rows) a.key = load_rows(a, p.key, p.dim, a.w.key_rows, a.plan.row);
}

template <class T>
void backward_units(const AttentionBackwardContext& f, Head<T>& a) {
  const AttentionBackward& args = f.args;
  const AttentionProblem& p = args.problem;
  const AttentionPlan& plan = f.plan;
  AttentionWork<T>& w = a.w;
  for (int64_t c; (c = next_task(f.next[0])) < plan.chunks;) {
    double* tables = args.grad_table ? f.partial_tables + c * p.heads * p.rows : nullptr;
    if (tables) std::fill_n(tables, p.heads * p.rows, 0.0);
    Gathered gathered{-1, 0, 0, 0, 0};
    for (int64_t number = c * plan.chunk; number < std::min(plan.units, (c + 1) * plan.chunk); ++number) {
      const Unit u = unit_of(p, plan, number);
      if (take_unit(a, u)) load_backward_keys(a, args.grad_query.data != nullptr);
      KeyGradients<T> grads{w.grad_key, w.grad_value};
      if (plan.parts > 1) grads = partial_keys<T>(f, number);
      if (args.grad_key.data) std::fill_n(grads.key, padded(a.s.keys) * plan.row, T(0));
      if (args.grad_value.data) std::fill_n(grads.value, padded(a.s.keys) * plan.value_row, T(0));
      const int64_t blocks = query_blocks(a.s.queries);
      for (int64_t item = u.first, filled = -1; item < u.last; ++item) {
        a.h = u.key_head * plan.group + item / blocks;
        if (filled != a.h) {
          if (filled >= 0 && plan.distances && tables) flush_diagonals(a, tables, filled);
          fill_diagonals(a), filled = a.h;
        }
        const Range rows = block_of(a.s.queries, item % blocks);
        backward_block(a, args, rows.begin, rows.end - rows.begin, grads, tables, gathered);
      }
      if (u.first < u.last && plan.distances && tables) flush_diagonals(a, tables, a.h);
      if (plan.parts > 1) continue;
      store_keys(p, args.grad_key, a.s, a.b, a.key_head, w.grad_key, plan.row, 0, a.s.keys, p.dim, (T)p.scale);
      store_keys(p, args.grad_value, a.s, a.b, a.key_head, w.grad_value, plan.value_row, 0, a.s.keys, p.value_dim,
                 T(1));
    }
    if (gathered.head >= 0) flush_tile(a, tables, gathered.head, gathered.q0, gathered.m, gathered.k0, gathered.n);
  }
}

// Adds the parts of a unit's sums to the first one, and stores them.
template <class T>
void reduce_keys(const AttentionBackwardContext& f, Team team) {
  const AttentionProblem& p = f.args.problem;
  const AttentionPlan& plan = f.plan;
  constexpr int64_t kRowsAtOnce = 64;
  const int64_t blocks = divided_up(plan.most_keys, kRowsAtOnce);
  const Range share = team.share(p.key_heads * p.batch * blocks);
  for (int64_t task = share.begin; task < share.end; ++task) {
    const int64_t pair = task / blocks;
    const Unit u = unit_of(p, plan, pair * plan.parts);
    const Sequence s = sequence(p, u.b);
    const int64_t first = task % blocks * kRowsAtOnce, last = std::min(first + kRowsAtOnce, s.keys);
    if (first >= last) continue;
    const auto add = [&](const AttentionTensor& t, T* KeyGradients<T>::* member, int64_t ld, int64_t dim, T factor) {
      if (t.data == nullptr) return;
      T* total = partial_keys<T>(f, pair * plan.parts).*member;
      for (int64_t part = 1; part < plan.parts; ++part) {
        const T* more = partial_keys<T>(f, pair * plan.parts + part).*member;
        for (int64_t i = first * ld; i < last * ld; ++i) total[i] += more[i];
      }
      store_keys(p, t, s, u.b, u.key_head, total, ld, first, last, dim, factor);
    };
    add(f.args.grad_key, &KeyGradients<T>::key, plan.row, p.dim, (T)p.scale);
    add(f.args.grad_value, &KeyGradients<T>::value, plan.value_row, p.value_dim, T(1));
  }
}

template <class T>
void reduce_tables(const AttentionBackwardContext& f, Team team) {
  const AttentionProblem& p = f.args.problem;
  const Range share = team.share(p.heads * p.rows);
  for (int64_t i = share.begin; i < share.end; ++i) {
    double sum = 0;
    for (int64_t c = 0; c < f.plan.chunks; ++c) sum += f.partial_tables[c * p.heads * p.rows + i];
    static_cast<T*>(f.args.grad_table)[i % p.rows * p.heads + i / p.rows] = (T)sum;
  }
}
