// Gradients of a dense mask or bias: summed over what it is broadcast over, by whoever owns its element.

// Rows and columns of the gradient that a tile belongs to: (1 or queries, 1 or keys).
template <class T>
void add_tile(const Head<T>& a, const AttentionAdded& t, T* to, int64_t q0, int64_t m, int64_t k0, int64_t n) {
  for (int64_t i = 0; i < m; ++i) {
    const T* g = a.w.grad_scores + i * kScoreRow;
    T* row = to + (t.query ? (q0 + i) * t.query : 0);
    if (t.key) {
      for (int64_t j = 0; j < n; ++j) row[k0 + j] += g[j];
    } else {
      T sum = 0;
      for (int64_t j = 0; j < n; ++j) sum += g[j];
      *row += sum;
    }
  }
}

// `like` has the strides of the gradient, dense, and 0 where it is broadcast.
template <class T>
void added_gradient(const AttentionBackwardContext& f, Head<T>& a, const AttentionAdded& like, void* gradient,
                    std::atomic<int64_t>& counter) {
  if (gradient == nullptr) return;
  const AttentionProblem& p = f.args.problem;
  const int64_t heads = like.head ? p.heads : 1, blocks = query_blocks(p.queries), cuts = like.query ? blocks : 1;
  for (int64_t task; (task = next_task(counter)) < like.batches * heads * cuts;) {
    const int64_t cut = task % cuts, head = task / cuts % heads, batch = task / cuts / heads;
    T* to = static_cast<T*>(gradient) + batch * like.batch + head * like.head;
    for (int64_t h = head; h < p.heads; h += heads)
      for (int64_t b = batch; b < p.batch; b += like.batches) {
        if (take_unit(a, Unit{h / f.plan.group, b, 0, 0})) load_backward_keys(a, false);
        a.h = h;
        fill_diagonals(a);
        for (int64_t block = cut; block < blocks; block += cuts) {
          const Range rows = block_of(p.queries, block);
          const int64_t q0 = rows.begin, m = rows.end - q0;
          load_query(a, q0, m);
          load_gradient(a, f.args, q0, m);
          const Keys keys = visible_keys(a, q0, m);
          for (int64_t k0 = keys.begin; k0 < keys.end; k0 += keys.step) {
            const int64_t n = std::min(keys.step, keys.end - k0);
            make_scores<T, false>(a, q0, m, k0, n);
            make_gradient(a, f.args, q0, m, k0, n);
            add_tile(a, like, to, q0, m, k0, n);
          }
        }
      }
  }
}

// The strides of a dense gradient of a mask or bias of these sizes.
inline AttentionAdded dense_like(const AttentionAdded& t, const AttentionProblem& p) {
  AttentionAdded d = t;
  d.key = t.key ? 1 : 0;
  int64_t size = t.key ? p.keys : 1;
  d.query = t.query ? size : 0;
  size *= t.query ? p.queries : 1;
  d.head = t.head ? size : 0;
  size *= t.head ? p.heads : 1;
  d.batch = size;
  return d;
}

template <class T>
void backward_tasks(const AttentionBackwardContext& f, Team team) {
  const AttentionBackward& args = f.args;
  const AttentionProblem& p = args.problem;
  AttentionWork<T> work{};
  AttentionWork<T>::layout(work, p, f.plan, true, static_cast<T*>(f.memory) + team.rank * f.plan.per_thread);
  if (work.grad_tile && f.plan.positions) std::fill_n(work.grad_tile, kQueryBlock * kScoreRow, T(0));
  if (f.plan.distances)
    std::fill_n(work.grad_diagonals, f.plan.most_queries + padded(f.plan.most_keys) + 2 * kPadded, T(0));
  Head<T> a(p, f.plan, work);
  if (args.grad_query.data || args.grad_key.data || args.grad_value.data || args.grad_table) backward_units(f, a);
  added_gradient(f, a, dense_like(p.mask, p), args.grad_mask, f.next[1]);
  added_gradient(f, a, dense_like(p.bias, p), args.grad_bias, f.next[2]);
  team.barrier();
  if (f.plan.parts > 1) reduce_keys<T>(f, team);
  if (args.grad_table) reduce_tables<T>(f, team);
}
