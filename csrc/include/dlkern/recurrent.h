// One direction of one recurrent layer over a whole sequence, on the CPU: the time loop of an LSTM, a GRU or an RNN.
//
// A sequence is stored as rows, one a step and batch element: step t has batch_sizes[t] of them (never growing with t),
// or `batch` where batch_sizes is null, and they follow those of step t - 1. With `reverse` the steps run from the last
// to the first. Every pointer is the address of a dense row-major array of `dtype` (kFloat32 or kFloat64). G is the
// number of gates (LSTM i f g o: 4; GRU r z n: 3; RNN: 1) and P = `outputs` the length of h: `hidden`, or less with
// an LSTM's projection. A null pointer stands for "not given", "not wanted", or for h0 and c0: zero.
#pragma once

#include <cstdint>

#include "dlkern/activation.h"
#include "dlkern/batch_norm_act.h"  // DType

namespace dlkern {

enum RecurrentCell : int { kLstm = 0, kGru = 1, kRnnTanh = 2, kRnnRelu = 3 };

struct RecurrentSize {
  DType dtype;
  RecurrentCell cell;
  int64_t steps, batch, rows;  // rows: of all steps
  int64_t inputs, hidden, outputs;
  const int64_t* batch_sizes;
  bool reverse;
};

// What a layer does that PyTorch's does not (kernels/reference/recurrent_variants.py). Activations are those of which
// the derivative can be had from the output, by their codes (activation.h); an RNN's is not in `cell` then.
struct RecurrentVariant {
  Activation activation, recurrent_activation;
  double param, recurrent_param;
  const void* peephole;                        // LSTM: (3 hidden,)
  const void *norm_hh, *norm_c, *norm_c_bias;  // (G hidden,), (hidden,): norm_c and its bias are both given or neither
  const void *zoneout, *dropout;               // (rows, outputs), (batch, outputs)
  void *normal, *inverse;                      // (rows, G hidden), (rows,): with norm_hh, kept by forward for backward
  const void* grad_cells;                      // backward: (rows, hidden)
  void *grad_product, *grad_normal;            // backward: (rows, G hidden) with norm_hh; (rows, hidden) with norm_c
  void* work;                                  // (batch, G hidden + 2 outputs + 2 hidden)
};

struct RecurrentForward {
  RecurrentSize size;
  const RecurrentVariant* variant;  // null: PyTorch's own layer
  // Where x is given, (rows, inputs), x W_ih^T + b_ih is made here from weight_ih (G hidden, inputs) and bias_ih
  // (G hidden,); otherwise `gates` comes in holding it.
  const void *x, *weight_ih, *bias_ih;
  const void *weight_hh, *bias_hh;  // (G hidden, outputs), (G hidden,)
  const void* weight_hr;            // LSTM with a projection: (outputs, hidden)
  const void *h0, *c0;              // (batch, outputs), (batch, hidden)
  bool saves;                       // backward will come
  // (rows, G hidden): read, then overwritten; with `saves`, and in a variant, by the activated gates. Null where x is
  // given and backward will not come: working memory is then allocated here.
  void* gates;
  void* cells;  // with `saves`, LSTM: (rows, hidden), each step's c
  // GRU: W_hn h + b_hn. LSTM with a projection: h before it. (rows, hidden) with `saves`, else working memory of
  // (batch, hidden).
  void* extra;
  void *output, *h_n, *c_n;  // (rows, outputs), (batch, outputs), (batch, hidden): written
};

struct RecurrentBackward {
  RecurrentSize size;
  const RecurrentVariant* variant;
  const void* grad_output;  // (rows, outputs)
  const void *weight_hh, *weight_hr, *h0, *c0;
  bool transposed;  // the weights come as (outputs, G hidden), (hidden, outputs): better for more than a few rows
  const void *output, *gates, *cells, *extra;  // as forward left them
  // In: the gradients of h_n and c_n. Out: those of h0 and c0.
  void *grad_h, *grad_c;
  void* grad_gates;  // (rows, G hidden), of the sums that the gates were made from; GRU: of x W_ih^T + b_ih
  void* grad_extra;  // GRU: (rows, G hidden), of h W_hh^T + b_hh. With a projection: (rows, outputs), of h
  void* scratch;     // with a projection: (batch, hidden)
};

namespace cpu {

// At most `threads` threads run, one for small problems. Results do not depend on their number, bit for bit.
void recurrent_forward(const RecurrentForward& args, int threads);
void recurrent_backward(const RecurrentBackward& args, int threads);

}  // namespace cpu
}  // namespace dlkern
