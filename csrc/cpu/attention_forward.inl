// Forward: blocks of queries, each over the keys that it sees.

// The next task of a counter, shared by all threads: which thread runs a task does not show in its result.
inline int64_t next_task(std::atomic<int64_t>& counter) { return counter.fetch_add(1, std::memory_order_relaxed); }

// A share of the blocks of queries that read one key head of one sequence.
struct Unit {
  int64_t key_head, b, first, last;  // of group * blocks
};
inline Unit unit_of(const AttentionProblem& p, const AttentionPlan& plan, int64_t number) {
  Unit u{};
  const int64_t part = number % plan.parts, pair = number / plan.parts;
  const int64_t band = pair / (kBatches * p.key_heads), batches = std::min(kBatches, p.batch - band * kBatches);
  const int64_t within = pair - band * kBatches * p.key_heads;
  u.key_head = within / batches;
  u.b = band * kBatches + within % batches;
  const int64_t items = plan.group * query_blocks(sequence(p, u.b).queries);
  u.first = items * part / plan.parts, u.last = items * (part + 1) / plan.parts;
  return u;
}

// Rows of a block of queries: nearly as many in each.
inline Range block_of(int64_t queries, int64_t block) {
  const int64_t blocks = query_blocks(queries);
  return {queries * block / blocks, queries * (block + 1) / blocks};
}

// Makes a head of a unit's the one at work; false where it was so already.
template <class T>
bool take_unit(Head<T>& a, const Unit& u) {
  if (a.b == u.b && a.key_head == u.key_head) return false;
  a.b = u.b, a.key_head = u.key_head;
  find_keys(a);
  return true;
}

template <class T>
void load_keys(Head<T>& a) {  // times the scale
  as_stored<T>(a.p.key.data, a.p.dtype, [&](const auto* data) {
    const auto* from = data + a.b * a.p.key.batch + a.key_head * a.p.key.head + a.s.first_key * a.p.key.row;
    copy_panels(a.w.key_panels, from, a.p.key.row, a.from, a.to, a.p.dim, (T)a.p.scale);
  });
}

// The head's values, or its keys, in rows.
template <class T>
Rows<T> load_rows(const Head<T>& a, const AttentionTensor& t, int64_t n, T* to, int64_t ld) {
  Rows<T> rows{};
  as_stored<T>(t.data, a.p.dtype, [&](const auto* data) {
    const auto* from = data + a.b * t.batch + a.key_head * t.head + a.s.first_key * t.row;
    const int64_t first = a.from / kPadded * kPadded;
    rows = rows_in_place(from + first * t.row, t.row, a.to - first, n, to + first * ld, ld);
    rows.first -= first * rows.row;
  });
  return rows;
}

// Query of rows q0 to q0 + m.
template <class T>
void load_query(Head<T>& a, int64_t q0, int64_t m) {
  as_stored<T>(a.p.query.data, a.p.dtype, [&](const auto* data) {
    const auto* from = data + a.b * a.p.query.batch + a.h * a.p.query.head + (a.s.first_query + q0) * a.p.query.row;
    a.query = rows_in_place(from, a.p.query.row, m, a.p.dim, a.w.query, a.plan.row);
  });
}

// w.scores of rows q0.., keys k0..
template <class T, bool kSlopes>
void make_scores(Head<T>& a, int64_t q0, int64_t m, int64_t k0, int64_t n) {
  const int64_t dim = padded(a.p.dim);
  product(a.w.scores, kScoreRow, a.query.first, a.query.row, 1, a.w.key_panels + k0 * dim, 2 * kLanes<T> * dim,
          2 * kLanes<T>, m, n, a.p.dim, false);
  finish_scores<T, kSlopes>(a, q0, m, k0, n);
}

template <class T>
DLKERN_INLINE T largest_lane(vec_t<T> v) {
  T top = v[0];
  for (int i = 1; i < kLanes<T>; ++i) top = v[i] > top ? v[i] : top;
  return top;
}
template <class T>
DLKERN_INLINE T sum_lanes(vec_t<T> v) {
  if constexpr (sizeof(T) == 4)
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  else
    return (v[0] + v[2]) + (v[1] + v[3]);
}

// Turns a row of scores into exponentials about the largest seen so far; returns what earlier sums shrink by.
template <class T>
DLKERN_INLINE T online_softmax(T* row, int64_t n, T& top, T& sum) {
  typedef vec_t<T> V;
  constexpr int w = kLanes<T>;
  V most = load<false>(row, w);
  for (int64_t j = w; j < n; j += w) most = larger(load<false>(row + j, w), most);
  const T here = largest_lane<T>(most), now = here > top ? here : top;
  const T centre = now == -kInfinity<T> ? T(0) : now;  // nothing seen yet: every exponential is 0
  const V shift = broadcast(centre);
  V total{};
  for (int64_t j = 0; j < n; j += w) {
    const V e = exponential(load<false>(row + j, w) - shift);
    store<false>(row + j, e, w);
    total += e;
  }
  const T shrink = top == now ? T(1) : (T)std::exp(top - centre);
  sum = sum * shrink + sum_lanes<T>(total);
  top = now;
  return shrink;
}

template <class T>
DLKERN_INLINE void scale_row(T* row, int64_t n, T factor) {
  constexpr int w = kLanes<T>;
  const auto f = broadcast(factor);
  for (int64_t j = 0; j < n; j += w) store<false>(row + j, load<false>(row + j, w) * f, w);
}

template <class T>
void forward_block(Head<T>& a, const AttentionForward& f, int64_t q0, int64_t m) {
  AttentionWork<T>& w = a.w;
  const int64_t value_dim = padded(a.p.value_dim), row = a.plan.value_row;
  const Keys keys = visible_keys(a, q0, m);
  load_query(a, q0, m);
  for (int64_t i = 0; i < m; ++i) w.top[i] = -kInfinity<T>, w.sum[i] = 0;
  for (int64_t k0 = keys.begin; k0 < keys.end; k0 += keys.step) {
    const int64_t n = std::min(keys.step, keys.end - k0);
    const bool first = k0 == keys.begin;
    make_scores<T, false>(a, q0, m, k0, n);
    for (int64_t i = 0; i < m; ++i) {
      const T shrink = online_softmax(w.scores + i * kScoreRow, padded(n), w.top[i], w.sum[i]);
      if (!first && shrink != 1) scale_row(w.out + i * row, value_dim, shrink);
    }
    if (a.p.dropout > 0) {
      fill_kept(a, q0, m, k0, n);
      multiply_rows(w.scores, w.scores, w.kept, m, n);
    }
    product_of_rows(w.out, row, w.scores, kScoreRow, 1, a.value.first + k0 * a.value.row, a.value.row, m,
                    divided_up(a.p.value_dim, kLanes<T>) * kLanes<T>, n, !first);
  }
  const int64_t lse_row = a.p.cu_queries ? 0 : a.b * a.p.heads;
  T* lse = static_cast<T*>(f.lse) + (lse_row + a.h) * a.p.queries + a.s.first_query + q0;
  for (int64_t i = 0; i < m; ++i) {
    const bool nothing = w.sum[i] == 0;
    lse[i] = nothing ? -kInfinity<T> : w.top[i] + (T)std::log(w.sum[i]);
    w.scaled[i] = nothing ? T(0) : 1 / w.sum[i];
    if (nothing) std::fill_n(w.out + i * row, value_dim, T(0));
  }
  as_stored<T>(f.out.data, a.p.dtype, [&](const auto* data) {
    auto* to = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(data)>>*>(data);
    to += a.b * f.out.batch + a.h * f.out.head + (a.s.first_query + q0) * f.out.row;
    store_rows(to, f.out.row, w.out, row, m, a.p.value_dim, w.scaled, 1);
  });
}

template <class T>
void forward_tasks(const AttentionForwardContext& f, Team team) {
  const AttentionProblem& p = f.args.problem;
  const AttentionPlan& plan = f.plan;
  AttentionWork<T> work{};
  AttentionWork<T>::layout(work, p, plan, false, static_cast<T*>(f.memory) + team.rank * plan.per_thread);
  Head<T> a(p, plan, work);
  for (int64_t c; (c = next_task(f.next[0])) < plan.chunks;) {
    for (int64_t number = c * plan.chunk; number < std::min(plan.units, (c + 1) * plan.chunk); ++number) {
      const Unit u = unit_of(p, plan, number);
      if (u.first == u.last) continue;
      if (take_unit(a, u)) {
        load_keys(a);
        a.value = load_rows(a, p.value, p.value_dim, work.value_rows, plan.value_row);
      }
      const int64_t blocks = query_blocks(a.s.queries);
      for (int64_t item = u.first, filled = -1; item < u.last; ++item) {
        a.h = u.key_head * plan.group + item / blocks;
        if (filled != a.h) fill_diagonals(a), filled = a.h;
        const Range rows = block_of(a.s.queries, item % blocks);
        forward_block(a, f.args, rows.begin, rows.end - rows.begin);
      }
    }
  }
}
