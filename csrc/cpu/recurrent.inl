// The time loop, forward and backward. Included once per instruction set (foreach_isa.h).

namespace recurrent {

#include "recurrent_cells.inl"
#include "recurrent_product.inl"

// Runs a kernel, whose pointers are at the row's beginning, over the units [begin, end).
template <class Kernel>
DLKERN_INLINE void over_units(Kernel& kernel, Range units) {
  constexpr int w = Kernel::lanes;
  int64_t j = units.begin;
  for (; j + w <= units.end; j += w) kernel.template step<false, 0, 1>(j, w);
  if (j < units.end) kernel.template step<true, 0, 1>(j, (int)(units.end - j));
}

inline Range intersect(Range r, int64_t begin, int64_t end) {
  const int64_t from = std::max(r.begin, begin);
  return {from, std::max(from, std::min(r.end, end))};
}

inline int64_t size_of(Range r) { return r.end - r.begin; }

// Row b of what the step before left in `kept` (rows, width), else of the initial state (null: zero).
template <class T>
DLKERN_INLINE const T* row_before(const Step& s, const T* kept, const T* initial, int64_t width, int64_t b) {
  if (b < s.before_batch) return kept + (s.before + b) * width;
  return initial ? initial + b * width : nullptr;
}

// y (rows of the step, ldy) += h_before w^T, for the first `columns` rows of w (*, outputs).
template <class T>
void add_recurrent(T* y, int64_t ldy, const RecurrentForward& a, const Step& s, Range batch, const T* w,
                   int64_t columns) {
  const int64_t p = a.size.outputs;
  const Range running = intersect(batch, 0, std::min(s.before_batch, s.batch));
  const Range joining = intersect(batch, s.before_batch, s.batch);
  if (size_of(running))
    dot_product(y + running.begin * ldy, ldy, (const T*)a.output + (s.before + running.begin) * p, p, size_of(running),
                w, p, columns, p);
  if (size_of(joining) && a.h0)
    dot_product(y + joining.begin * ldy, ldy, (const T*)a.h0 + joining.begin * p, p, size_of(joining), w, p, columns,
                p);
}

// gates of the step, for some units, = bias_ih + x w_ih^T
template <class T>
void project_input(const RecurrentForward& a, const Step& s, int gates, Range batch, Range units) {
  const int64_t hidden = a.size.hidden, inputs = a.size.inputs, width = gates * hidden;
  const int64_t count = size_of(units) * (int64_t)sizeof(T);
  T* const out = (T*)a.gates + s.offset * width;
  for (int gate = 0; gate < gates; ++gate) {
    const int64_t column = gate * hidden + units.begin;
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      if (a.bias_ih)
        std::memcpy(out + b * width + column, (const T*)a.bias_ih + column, count);
      else
        std::memset(out + b * width + column, 0, count);
    }
    dot_product(out + batch.begin * width + column, width, (const T*)a.x + (s.offset + batch.begin) * inputs, inputs,
                size_of(batch), (const T*)a.weight_ih + column * inputs, inputs, size_of(units), inputs);
  }
}

template <class T>
void lstm_forward(const RecurrentForward& a, const Share& share, Team team) {
  const int64_t hidden = a.size.hidden, outputs = a.size.outputs, width = 4 * hidden;
  const bool projects = a.weight_hr != nullptr;
  for (Walk walk(a.size, true); !walk.done(); walk.next()) {
    const Step s = walk.step();
    const Range batch = intersect(share.batch, 0, s.batch);
    T* const gates = (T*)a.gates + s.offset * width;
    if (a.x) project_input<T>(a, s, 4, batch, share.units);
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t column = gate * hidden + share.units.begin;
      add_recurrent(gates + column, width, a, s, batch, (const T*)a.weight_hh + column * outputs, size_of(share.units));
    }
    T* const h = projects ? (T*)a.extra + (a.saves ? s.offset * hidden : 0) : (T*)a.output + s.offset * hidden;
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      T* const c = (T*)a.c_n + b * hidden;
      const T* const first = a.c0 ? (const T*)a.c0 + b * hidden : nullptr;
      LstmForwardGates<T> kernel{gates + b * width,
                                 hidden,
                                 (const T*)a.bias_hh,
                                 b < s.before_batch ? c : first,
                                 c,
                                 a.cells ? (T*)a.cells + (s.offset + b) * hidden : nullptr,
                                 h + b * hidden,
                                 projects ? nullptr : (T*)a.h_n + b * hidden};
      over_units(kernel, share.units);
    }
    if (projects) {
      if (share.together) team.barrier();
      const int64_t column = share.outputs.begin, columns = size_of(share.outputs);
      T* const out = (T*)a.output + s.offset * outputs + column;
      for (int64_t b = batch.begin; b < batch.end; ++b) std::memset(out + b * outputs, 0, columns * sizeof(T));
      dot_product(out + batch.begin * outputs, outputs, h + batch.begin * hidden, hidden, size_of(batch),
                  (const T*)a.weight_hr + column * hidden, hidden, columns, hidden);
      for (int64_t b = batch.begin; b < batch.end; ++b)
        std::memcpy((T*)a.h_n + b * outputs + column, out + b * outputs, columns * sizeof(T));
    }
    if (share.together) team.barrier();
  }
}

template <class T>
void gru_forward(const RecurrentForward& a, const Share& share, Team team) {
  const int64_t hidden = a.size.hidden, width = 3 * hidden;
  for (Walk walk(a.size, true); !walk.done(); walk.next()) {
    const Step s = walk.step();
    const Range batch = intersect(share.batch, 0, s.batch);
    T* const gates = (T*)a.gates + s.offset * width;
    T* const part = (T*)a.extra + (a.saves ? s.offset * hidden : 0);
    if (a.x) project_input<T>(a, s, 3, batch, share.units);
    const int64_t column = share.units.begin, columns = size_of(share.units);
    for (int64_t b = batch.begin; b < batch.end; ++b) std::memset(part + b * hidden + column, 0, columns * sizeof(T));
    for (int gate = 0; gate < 3; ++gate) {
      const T* const w = (const T*)a.weight_hh + (gate * hidden + column) * hidden;
      if (gate < 2)
        add_recurrent(gates + gate * hidden + column, width, a, s, batch, w, columns);
      else
        add_recurrent(part + column, hidden, a, s, batch, w, columns);
    }
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      GruForwardGates<T> kernel{gates + b * width,      hidden,
                                (const T*)a.bias_hh,    row_before(s, (const T*)a.output, (const T*)a.h0, hidden, b),
                                part + b * hidden,      (T*)a.output + (s.offset + b) * hidden,
                                (T*)a.h_n + b * hidden, a.saves};
      over_units(kernel, share.units);
    }
    if (share.together) team.barrier();
  }
}

template <class T, bool kRelu>
void rnn_forward(const RecurrentForward& a, const Share& share, Team team) {
  const int64_t hidden = a.size.hidden;
  for (Walk walk(a.size, true); !walk.done(); walk.next()) {
    const Step s = walk.step();
    const Range batch = intersect(share.batch, 0, s.batch);
    T* const gates = (T*)a.gates + s.offset * hidden;
    if (a.x) project_input<T>(a, s, 1, batch, share.units);
    const int64_t column = share.units.begin;
    add_recurrent(gates + column, hidden, a, s, batch, (const T*)a.weight_hh + column * hidden, size_of(share.units));
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      RnnForwardGates<T, kRelu> kernel{gates + b * hidden, (const T*)a.bias_hh, (T*)a.output + (s.offset + b) * hidden,
                                       (T*)a.h_n + b * hidden};
      over_units(kernel, share.units);
    }
    if (share.together) team.barrier();
  }
}

template <class T>
DLKERN_INLINE const T* grad_row(const RecurrentBackward& a, const Step& s, int64_t b) {
  return a.grad_output ? (const T*)a.grad_output + (s.offset + b) * a.size.outputs : nullptr;
}

// y (rows, ldy), some columns, += x (rows, length) w (length, width), where w may come transposed.
template <class T>
void add_product(const RecurrentBackward& a, T* y, int64_t ldy, Range columns, const T* x, int64_t length, Range batch,
                 const void* w) {
  T* const to = y + batch.begin * ldy + columns.begin;
  const T* const from = x + batch.begin * length;
  if (a.transposed)
    dot_product(to, ldy, from, length, size_of(batch), (const T*)w + columns.begin * length, length, size_of(columns),
                length);
  else
    sum_product(to, ldy, from, length, size_of(batch), (const T*)w + columns.begin, ldy, size_of(columns), length);
}

template <class T>
void lstm_backward(const RecurrentBackward& a, const Share& share, Team team) {
  const int64_t hidden = a.size.hidden, outputs = a.size.outputs, width = 4 * hidden;
  const bool projects = a.weight_hr != nullptr;
  for (Walk walk(a.size, false); !walk.done(); walk.next()) {
    const Step s = walk.step();
    const Range batch = intersect(share.batch, 0, s.batch);
    T* const grad_gates = (T*)a.grad_gates + s.offset * width;
    T* const grad_h = (T*)(projects ? a.scratch : a.grad_h);
    if (projects) {
      T* const grad_projected = (T*)a.grad_extra + s.offset * outputs;
      for (int64_t b = batch.begin; b < batch.end; ++b) {
        T* const state = (T*)a.grad_h + b * outputs;
        const T* const grad_output = grad_row<T>(a, s, b);
        for (int64_t j = share.outputs.begin; j < share.outputs.end; ++j) {
          grad_projected[b * outputs + j] = state[j] + (grad_output ? grad_output[j] : T(0));
          state[j] = 0;
        }
        std::memset(grad_h + b * hidden + share.units.begin, 0, size_of(share.units) * sizeof(T));
      }
      if (share.together) team.barrier();
      add_product(a, grad_h, hidden, share.units, grad_projected, outputs, batch, a.weight_hr);
    }
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      LstmBackwardGates<T> kernel{(const T*)a.gates + (s.offset + b) * width,
                                  hidden,
                                  (const T*)a.cells + (s.offset + b) * hidden,
                                  row_before(s, (const T*)a.cells, (const T*)a.c0, hidden, b),
                                  grad_h + b * hidden,
                                  projects ? nullptr : grad_row<T>(a, s, b),
                                  projects ? nullptr : grad_h + b * hidden,
                                  (T*)a.grad_c + b * hidden,
                                  grad_gates + b * width};
      over_units(kernel, share.units);
    }
    if (share.together) team.barrier();
    add_product(a, (T*)a.grad_h, outputs, share.outputs, grad_gates, width, batch, a.weight_hh);
  }
}

template <class T>
void gru_backward(const RecurrentBackward& a, const Share& share, Team team) {
  const int64_t hidden = a.size.hidden, width = 3 * hidden;
  for (Walk walk(a.size, false); !walk.done(); walk.next()) {
    const Step s = walk.step();
    const Range batch = intersect(share.batch, 0, s.batch);
    T* const grad_gates = (T*)a.grad_gates + s.offset * width;
    T* const grad_recurrent = (T*)a.grad_extra + s.offset * width;
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      GruBackwardGates<T> kernel{(const T*)a.gates + (s.offset + b) * width,
                                 hidden,
                                 (const T*)a.extra + (s.offset + b) * hidden,
                                 row_before(s, (const T*)a.output, (const T*)a.h0, hidden, b),
                                 grad_row<T>(a, s, b),
                                 (T*)a.grad_h + b * hidden,
                                 grad_gates + b * width,
                                 grad_recurrent + b * width};
      over_units(kernel, share.units);
    }
    if (share.together) team.barrier();
    add_product(a, (T*)a.grad_h, hidden, share.units, grad_recurrent, width, batch, a.weight_hh);
  }
}

template <class T, bool kRelu>
void rnn_backward(const RecurrentBackward& a, const Share& share, Team team) {
  const int64_t hidden = a.size.hidden;
  for (Walk walk(a.size, false); !walk.done(); walk.next()) {
    const Step s = walk.step();
    const Range batch = intersect(share.batch, 0, s.batch);
    T* const grad_gates = (T*)a.grad_gates + s.offset * hidden;
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      RnnBackwardGates<T, kRelu> kernel{(const T*)a.output + (s.offset + b) * hidden, grad_row<T>(a, s, b),
                                        (T*)a.grad_h + b * hidden, grad_gates + b * hidden};
      over_units(kernel, share.units);
    }
    if (share.together) team.barrier();
    add_product(a, (T*)a.grad_h, hidden, share.units, grad_gates, hidden, batch, a.weight_hh);
  }
}

#include "recurrent_variants.inl"

template <class T>
void forward_as(const RecurrentForward& a, Team team) {
  if (a.variant) return variant_forward<T>(a, team);
  const Share share = share_of(a.size, team);
  switch (a.size.cell) {
    case kLstm:
      return lstm_forward<T>(a, share, team);
    case kGru:
      return gru_forward<T>(a, share, team);
    case kRnnTanh:
      return rnn_forward<T, false>(a, share, team);
    case kRnnRelu:
      return rnn_forward<T, true>(a, share, team);
  }
}

template <class T>
void backward_as(const RecurrentBackward& a, Team team) {
  if (a.variant) return variant_backward<T>(a, team);
  const Share share = share_of(a.size, team);
  switch (a.size.cell) {
    case kLstm:
      return lstm_backward<T>(a, share, team);
    case kGru:
      return gru_backward<T>(a, share, team);
    case kRnnTanh:
      return rnn_backward<T, false>(a, share, team);
    case kRnnRelu:
      return rnn_backward<T, true>(a, share, team);
  }
}

inline void forward_body(const RecurrentForward& a, Team team) {
  a.size.dtype == kFloat64 ? forward_as<double>(a, team) : forward_as<float>(a, team);
}

inline void backward_body(const RecurrentBackward& a, Team team) {
  a.size.dtype == kFloat64 ? backward_as<double>(a, team) : backward_as<float>(a, team);
}

}  // namespace recurrent
